"""Benchmarks on an NVIDIA GPU; gpu.sh beside this folder runs them."""
