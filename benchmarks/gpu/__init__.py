"""What `benchmarks/gpu_check.py` runs on a GPU, in processes of its own."""
