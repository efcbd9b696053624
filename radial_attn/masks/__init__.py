"""Masks: the radial rule, other patterns, density, drawing."""
