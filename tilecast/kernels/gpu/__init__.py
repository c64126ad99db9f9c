"""Expert GEMMs and routing in Triton, for NVIDIA and AMD GPUs."""
