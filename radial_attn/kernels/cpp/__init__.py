"""Sparse attention in C++ for CPUs, compiled when first used."""
