"""Longer video: what scripts/length_study.py and scripts/length_timing.py are made of."""
