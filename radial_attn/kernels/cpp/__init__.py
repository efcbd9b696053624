"""Computes sparse attention in C++ on CPUs, compiled on first use."""
