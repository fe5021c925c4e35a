"""Differential privacy of what a board sends of its data: accounting, noise, and an emulated channel. Pure."""
