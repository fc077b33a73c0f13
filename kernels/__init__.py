"""Triton kernels, one module per operator, named like its file in ``ovseg_fast/ops``.

Installed as ``ovseg_fast.kernels``. Import it by that name only: from the repository root ``import kernels``
would load a second copy of every module. Kernels import nothing from the operators that call them.
"""
