"""Adapters: low-rank factors beside frozen weights, and what becomes of several of them."""
