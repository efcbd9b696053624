"""Analyses attention maps: recall, decay, the error bound, sampled errors."""
