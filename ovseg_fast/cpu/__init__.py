"""Launchers of csrc/cpu: operators on the kernels for CPUs, which have no gradients."""
