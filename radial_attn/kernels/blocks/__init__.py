"""Sparse attention from torch's own operations, on any device."""
