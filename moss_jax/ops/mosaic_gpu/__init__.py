"""Tools that the Mosaic GPU kernels (Hopper) of all ops share."""
