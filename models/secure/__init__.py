"""Sums of which nobody learns a part (secure aggregation)."""
