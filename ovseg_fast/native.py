"""The native library: finds, loads and checks `libovseg.so`, and calls its functions.

The library is built from csrc when the package is installed where nvcc is found. It is looked at when it is first needed, never
on import. `FUNCTIONS` says what ovseg.h says; a test compares the two.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

ABI_VERSION = 1
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
AGAIN = "build it again with `pip install --force-reinstall --no-deps -e .`"

POINTER, SIZE, NUMBER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_RUN = (NUMBER, NUMBER, POINTER)  # dtype, device, stream: the last arguments of every operator

# Argument types of the operators' functions; each returns an error code.
FUNCTIONS = {
    "ovseg_spatial_aggregation_fwd": (*[POINTER] * 17, *[SIZE] * 9, *_RUN),
    "ovseg_spatial_aggregation_bwd": (*[POINTER] * 4, *[SIZE] * 8, *_RUN),
    "ovseg_class_aggregation_fwd": (*[POINTER] * 15, *[SIZE] * 10, *_RUN),
    "ovseg_class_aggregation_attention_bwd": (*[POINTER] * 6, *[SIZE] * 7, *_RUN),
    "ovseg_class_aggregation_resize_fwd": (*[POINTER] * 3, *[SIZE] * 6, *_RUN),
    "ovseg_class_aggregation_resize_bwd": (*[POINTER] * 2, *[SIZE] * 6, *_RUN),
}

# Operators whose kernels a GPU has run and found right; until then they run only where they are forced.
VERIFIED: frozenset[str] = frozenset()


class NativeLibraryError(RuntimeError):
    """The native library cannot be used; the message says why and what helps."""


def path() -> Path:
    """Where the library is expected: beside this module, or where the environment variable OVSEG_NATIVE_LIBRARY says."""
    return Path(os.environ.get("OVSEG_NATIVE_LIBRARY") or Path(__file__).with_name("libovseg.so"))


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The library, loaded and checked, with the types of its functions.

    Raises:
        NativeLibraryError: it is not there, cannot be loaded, or is of another version.
    """
    file = path()
    if not file.exists():
        raise NativeLibraryError(
            "the native library is not built; `pip install -e .` builds it where nvcc is on PATH or in CUDA_HOME/bin"
        )
    try:
        loaded = ctypes.CDLL(str(file))
        version = loaded.ovseg_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"the native library {file.name} cannot be loaded ({error}); {AGAIN}") from error
    if version != ABI_VERSION:
        raise NativeLibraryError(
            f"the native library {file.name} has interface version {version}, this package needs {ABI_VERSION}; {AGAIN}"
        )
    loaded.ovseg_error_string.restype = ctypes.c_char_p
    try:
        for name, types in FUNCTIONS.items():
            getattr(loaded, name).argtypes = types
    except AttributeError as error:
        raise NativeLibraryError(f"the native library {file.name} lacks a function ({error}); {AGAIN}") from error
    return loaded


@lru_cache(maxsize=1)
def problem() -> str | None:
    """Why the library cannot be used, or None where it can."""
    try:
        library()
    except NativeLibraryError as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def architectures() -> tuple[int, ...]:
    """What GPUs the library was built for (80, 86, ...); none says that it emulates one on the CPU."""
    found = (ctypes.c_int * 32)()
    return tuple(found[: library().ovseg_architectures(found, len(found))])


def refusal(device: str, capability: tuple[int, int] | None) -> str | None:
    """Why the library's kernels cannot run on tensors of this kind of device, or None where they can."""
    if reason := problem():
        return reason
    if not architectures():
        return None if device == "cpu" else "this native library emulates a GPU: it takes tensors of the CPU"
    if device == "cpu":
        return "the tensors are on the CPU"
    if capability is None:
        return f"its kernels run on CUDA tensors, not on {device}"
    major, minor = capability
    # Machine code runs on GPUs of its own major number with at least its minor one.
    if any(built // 10 == major and built % 10 <= minor for built in architectures()):
        return None
    built = ", ".join(f"{number // 10}.{number % 10}" for number in architectures())
    return (
        f"the native library was built for GPUs of compute capability {built}, this one has {major}.{minor}; "
        f"build it again with OVSEG_CUDA_ARCHS={major}{minor}"
    )


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Queue a function's kernels on the current stream of the tensors' device, without waiting.

    Args:
        name: the function, of `FUNCTIONS`.
        arguments: its arguments up to the sizes; tensors are contiguous and of one dtype and device, None is a null
            pointer.

    Raises:
        RuntimeError: the library refuses the call or the launch fails.
    """
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    stream = torch.cuda.current_stream(first.device).cuda_stream if first.is_cuda else None
    values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    error = getattr(library(), name)(*values, DTYPES[first.dtype], max(first.get_device(), 0), stream)
    if error:
        operator = name.removeprefix("ovseg_").rpartition("_")[0]
        raise RuntimeError(f"{operator}: {library().ovseg_error_string(error).decode()}.")


def aligned(tensor: Tensor) -> Tensor:
    """The tensor contiguous and beginning at a multiple of 16 bytes, as the kernels read it: itself, or a copy."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
