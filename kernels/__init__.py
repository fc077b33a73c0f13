"""Triton kernels, one module per operator, named like its file in ``ovseg_fast/ops``.

Import it as ``ovseg_fast.kernels`` only: ``import kernels`` from the repository root loads every module twice.
Kernels import nothing from the operators that call them.
"""
