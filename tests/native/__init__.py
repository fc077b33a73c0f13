"""Tests of the native library: its interface, its kernels as they were compiled, and their emulation."""
