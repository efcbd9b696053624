"""Several processes that share one video."""
