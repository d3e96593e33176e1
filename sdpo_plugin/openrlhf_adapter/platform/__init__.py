"""The machines of a run: the Ray cluster, and what stands in for CUDA on CPU."""
