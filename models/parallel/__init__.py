"""Shares one video between several processes."""
