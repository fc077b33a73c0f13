"""Launchers of the CUDA C++ kernels, one module an operator: they allocate what the native library fills."""
