"""Helpers of the tests: tiny models, cases, workers of several processes."""
