"""Serves every fork while a model runs: schedule, calls, dense backend, checks, observers."""
