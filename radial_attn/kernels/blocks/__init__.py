"""Computes sparse attention with torch's own operations, on any device."""
