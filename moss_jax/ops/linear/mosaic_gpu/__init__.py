"""GEMM kernels for NVIDIA's Hopper GPUs in Pallas (Mosaic GPU)."""
