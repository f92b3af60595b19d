"""GPU kernels of methods."""
