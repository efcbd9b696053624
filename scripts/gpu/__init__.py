"""The GPU benchmark: what scripts/benchmark_gpu.py is made of."""
