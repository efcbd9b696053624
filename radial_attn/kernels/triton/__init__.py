"""Computes sparse attention in Triton on GPUs."""
