"""Utilities shared by the Mosaic GPU (Hopper) kernels of all ops."""
