"""Tolerances that several tests share."""

MOST = 1e-5  # float32; relative to the largest value
