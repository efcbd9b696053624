"""Measures attention and denoising steps for the benchmark commands."""
