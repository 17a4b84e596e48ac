"""Triton kernels; importing this package needs no Triton, calling a kernel does."""
