"""Runs FlashAttention-4, sparse and dense, on Hopper and Blackwell."""
