"""Sparse attention in Triton for GPUs."""
