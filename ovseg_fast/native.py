"""Finds, loads (when first needed) and checks the native libraries, and calls their functions.

`libovseg.so` holds the CUDA C++ kernels, `libovseg_cpu.so` those for CPUs, both behind the interface of ovseg.h, which
`FUNCTIONS` and the params structs repeat. Installing the package builds the first from csrc if nvcc is found, the
second from csrc/cpu if a C++ compiler is.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI_VERSION = 2
UNSUPPORTED_CPU = -101  # an error code of ovseg_cpu.h
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "neon")  # that kernels for CPUs are compiled for
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
REBUILD = "rebuild it with `pip install --force-reinstall --no-deps -e .`"
LIBRARIES = {"cuda": "libovseg.so", "cpu": "libovseg_cpu.so"}  # by backend
VARIABLES = {"cuda": "OVSEG_NATIVE_LIBRARY", "cpu": "OVSEG_CPU_LIBRARY"}  # of the environment: another file
NEEDED = {"cuda": "nvcc is on PATH or in CUDA_HOME/bin", "cpu": "a C++17 compiler is on PATH"}  # to build it

POINTER, SIZE, NUMBER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_RUN = (NUMBER, NUMBER, POINTER)  # dtype, device, stream: the last arguments of every operator


def _params(pointers: str, sizes: str, reals: str = "") -> type[ctypes.Structure]:
    """A params struct of ovseg.h with these fields."""
    kinds = {POINTER: pointers, SIZE: sizes, ctypes.c_double: reals}
    fields = [(name, kind) for kind, names in kinds.items() for name in names.split()]
    return type("Params", (ctypes.Structure,), {"_fields_": fields})


_SPATIAL_AGGREGATION = _params(
    "x q_term k_term norm1_weight norm1_bias qkv_weight v_bias proj_weight proj_bias norm2_weight norm2_bias "
    "fc1_weight fc1_bias fc2_weight fc2_bias out middle",
    "batch classes height width channels hidden heads window shift",
)
_CLASS_AGGREGATION = _params(
    "x terms norm1_weight norm1_bias qkv_weight v_bias padding_token norm2_weight norm2_bias "
    "fc1_weight fc1_bias fc2_weight fc2_bias out middle",
    "batch classes height width channels hidden heads pooling pads images_of_terms",
)
_RESIDUAL_MLP = _params(
    "grad y norm_weight norm_bias fc1_weight fc1_bias fc2_weight y_grad normed activated units_grad sums",
    "rows channels hidden gelu",
)
_ENCODER_BLOCK = _params(
    "x norm1_weight norm1_bias q_weight k_weight v_weight qkv_bias proj_weight proj_bias norm2_weight norm2_bias "
    "fc1_weight fc1_bias fc2_weight fc2_bias out",
    "batch tokens channels hidden heads quick dense",
    "norm1_eps norm2_eps",
)

_LABEL_MAP_KEPT = _params(
    "logits whole offset positions slots scores labels",
    "windows maps classes height width window_height window_width canvas_height canvas_width out_height out_width k",
    "dropped",
)

# Argument types of the operators' functions, or a params struct that holds all but the last three; each function
# returns an error code.
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ovseg_spatial_aggregation_fwd": (_SPATIAL_AGGREGATION, *_RUN),
    "ovseg_spatial_aggregation_attention_bwd": (*[POINTER] * 4, *[SIZE] * 8, *_RUN),
    "ovseg_residual_mlp_bwd": (_RESIDUAL_MLP, *_RUN),
    "ovseg_layer_gather_fwd": (*[POINTER] * 8, *[SIZE] * 8, REAL, REAL, *_RUN),
    "ovseg_layer_gather_normed_bwd": (*[POINTER] * 7, *[SIZE] * 7, REAL, REAL, *_RUN),
    "ovseg_layer_gather_length_bwd": (*[POINTER] * 5, *[SIZE] * 3, *_RUN),
    "ovseg_layer_gather_norms_bwd": (*[POINTER] * 9, *[SIZE] * 8, *_RUN),
    "ovseg_gaussian_aggregation_fwd": (*[POINTER] * 3, *[SIZE] * 2, *_RUN),
    "ovseg_gaussian_aggregation_bwd": (*[POINTER] * 6, *[SIZE] * 3, *_RUN),
    "ovseg_label_map_fwd": (*[POINTER] * 6, *[SIZE] * 11, *_RUN),
    "ovseg_upsampling_decoder_norm_fwd": (*[POINTER] * 7, *[SIZE] * 6, REAL, *_RUN),
    "ovseg_upsampling_decoder_norm_bwd": (*[POINTER] * 10, *[SIZE] * 7, *_RUN),
    "ovseg_cost_volume_fwd": (*[POINTER] * 3, *[SIZE] * 4, *_RUN),
    "ovseg_cost_volume_norm_bwd": (*[POINTER] * 3, *[SIZE] * 2, *_RUN),
    "ovseg_cost_embedding_fwd": (*[POINTER] * 5, *[SIZE] * 8, *_RUN),
    "ovseg_cost_embedding_cost_bwd": (*[POINTER] * 3, *[SIZE] * 6, *_RUN),
    "ovseg_cost_embedding_weight_bwd": (*[POINTER] * 5, *[SIZE] * 7, *_RUN),
    "ovseg_class_aggregation_fwd": (_CLASS_AGGREGATION, *_RUN),
    "ovseg_class_aggregation_attention_bwd": (*[POINTER] * 6, *[SIZE] * 7, *_RUN),
    "ovseg_class_aggregation_resize_fwd": (*[POINTER] * 3, *[SIZE] * 6, *_RUN),
    "ovseg_class_aggregation_resize_bwd": (*[POINTER] * 2, *[SIZE] * 6, *_RUN),
}


# Those of the library for CPUs: some of the same, and those of ovseg_cpu.h.
CPU_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    **{
        name: FUNCTIONS[name]
        for name in (
            "ovseg_class_aggregation_fwd",
            "ovseg_class_aggregation_resize_fwd",
            "ovseg_cost_embedding_fwd",
            "ovseg_cost_volume_fwd",
            "ovseg_gaussian_aggregation_fwd",
            "ovseg_label_map_fwd",
            "ovseg_layer_gather_fwd",
            "ovseg_spatial_aggregation_fwd",
            "ovseg_upsampling_decoder_norm_fwd",
        )
    },
    "ovseg_encoder_block_fwd": (_ENCODER_BLOCK, *_RUN),
    "ovseg_label_map_kept_fwd": (_LABEL_MAP_KEPT, *_RUN),
    "ovseg_mask_attention_fwd": (*[POINTER] * 4, *[SIZE] * 5, *_RUN),
    "ovseg_mask_attention_scores_fwd": (*[POINTER] * 3, *[SIZE] * 5, *_RUN),
    "ovseg_upsampling_decoder_head_fwd": (*[POINTER] * 4, *[SIZE] * 4, *_RUN),
    "ovseg_upsampling_decoder_stage_fwd": (*[POINTER] * 9, *[SIZE] * 7, REAL, *_RUN),
}

# Operators whose CUDA C++ kernels were verified on a GPU; the others run only when forced.
VERIFIED: frozenset[str] = frozenset()

# KB of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications"). Others have 99.
SHARED_MEMORY_OF = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}


class NativeLibraryError(RuntimeError):
    """The native library cannot be used; the message says why and how to fix it."""


def path(kind: str = "cuda") -> Path:
    """Where the library of a backend is expected: what its variable in `VARIABLES` says, or next to this module."""
    return Path(os.environ.get(VARIABLES[kind]) or Path(__file__).with_name(LIBRARIES[kind]))


@cache
def library(kind: str = "cuda") -> ctypes.CDLL:
    """The library of a backend, loaded and checked, with the types of its functions; raises NativeLibraryError."""
    file, variable = path(kind), VARIABLES[kind]
    if not file.exists():
        if os.environ.get(variable):
            raise NativeLibraryError(f"{variable} names {file}, which does not exist; unset or correct it")
        raise NativeLibraryError(f"{file.name} is not built; `pip install -e .` builds it if {NEEDED[kind]}")
    try:
        _check_whole(file)
        loaded = ctypes.CDLL(str(file))
        version = loaded.ovseg_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"the native library {file.name} cannot be loaded ({error}); {REBUILD}") from error
    if version != ABI_VERSION:
        found = f"has interface version {version}, not {ABI_VERSION}"
        raise NativeLibraryError(f"the native library {file.name} {found}; {REBUILD}")
    try:
        loaded.ovseg_error_string.restype = ctypes.c_char_p
        for name, types in (FUNCTIONS if kind == "cuda" else CPU_FUNCTIONS).items():
            first = ctypes.POINTER(types[0]) if issubclass(types[0], ctypes.Structure) else types[0]
            getattr(loaded, name).argtypes = (first, *types[1:])
        if kind == "cuda":
            loaded.ovseg_architectures.argtypes = (POINTER, NUMBER)
        else:
            loaded.ovseg_cpu_isa.restype = ctypes.c_char_p
            loaded.ovseg_cpu_choose.argtypes = (ctypes.c_char_p,)
    except AttributeError as error:
        raise NativeLibraryError(f"the native library {file.name} lacks a function ({error}); {REBUILD}") from error
    if kind == "cpu":
        _choose_isa(loaded)
    return loaded


def _choose_isa(loaded: ctypes.CDLL) -> None:
    """The instruction set that OVSEG_CPU_ISA names, or the best that the machine has."""
    found, wanted = loaded.ovseg_cpu_isa(), os.environ.get("OVSEG_CPU_ISA")
    if found is None:
        raise NativeLibraryError(loaded.ovseg_error_string(UNSUPPORTED_CPU).decode())
    if wanted and loaded.ovseg_cpu_choose(wanted.encode()):
        there = [name for name in ISAS if not loaded.ovseg_cpu_choose(name.encode())]
        loaded.ovseg_cpu_choose(found)
        raise NativeLibraryError(f"OVSEG_CPU_ISA is {wanted!r}; this machine runs {', '.join(there)}")


def isa() -> str:
    """The instruction set that the kernels for CPUs run on. Raises NativeLibraryError if they cannot be used."""
    return str(library("cpu").ovseg_cpu_isa().decode())


def _check_whole(file: Path) -> None:
    """Raises OSError if the end of the file is missing: the loader would map past it and kill the process."""
    with file.open("rb") as content:
        header = content.read(64)
        size = content.seek(0, os.SEEK_END)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return  # the loader rejects it by itself
    (table,) = struct.unpack_from("<Q", header, 40)  # of the sections, at the end of the file
    entry, count = struct.unpack_from("<HH", header, 58)
    if size < table + entry * count:
        raise OSError(f"it has {size} bytes of {table + entry * count}")


@cache
def problem(kind: str = "cuda") -> str | None:
    """Why the library of a backend cannot be used, or None."""
    try:
        library(kind)
    except NativeLibraryError as error:
        return str(error)
    return None


@cache
def architectures() -> tuple[int, ...]:
    """The GPUs that the library was built for (80, 86, ...); none if it emulates one on the CPU."""
    found = (ctypes.c_int * 32)()
    return tuple(found[: library().ovseg_architectures(found, len(found))])


def capabilities() -> str:
    """`architectures` as compute capabilities, as text."""
    return ", ".join(f"{number // 10}.{number % 10}" for number in architectures())


def refusal(device: str, capability: tuple[int, int] | None, shared_memory: int) -> str | None:
    """Why kernels that need `shared_memory` KB a block cannot run on this kind of device, or None if they can."""
    if reason := problem():
        return reason
    if not architectures():
        return None if device == "cpu" else "this native library emulates a GPU and takes CPU tensors"
    if device == "cpu":
        return "the tensors are on the CPU"
    if capability is None:
        return f"its kernels run on CUDA tensors, not on {device}"
    major, minor = capability
    # Machine code runs on GPUs with the same major number and at least the same minor number.
    if any(number // 10 == major and number % 10 <= minor for number in architectures()):
        there = SHARED_MEMORY_OF.get(capability, 99)
        needs = f"its kernel needs {shared_memory} KB of shared memory in float32, this GPU has {there}"
        return f"{needs}; float16 and bfloat16 need half" if shared_memory > there else None
    built = f"the native library was built for GPUs of compute capability {capabilities()}"
    return f"{built}, this one has {major}.{minor}; rebuild it with OVSEG_CUDA_ARCHS={major}{minor}"


def packed(name: str, arguments: Sequence[Any]) -> list[Any]:
    """A function's arguments up to the dtype as C takes them: the fields of a params struct packed into one.

    Raises TypeError for a wrong number of fields.
    """
    values = [_value(argument) for argument in arguments]
    kind = {**FUNCTIONS, **CPU_FUNCTIONS}[name][0]
    if not issubclass(kind, ctypes.Structure):
        return values
    if len(values) != len(kind._fields_):
        raise TypeError(f"{name} takes {len(kind._fields_)} arguments before the dtype, not {len(values)}")
    return [ctypes.byref(kind(*values))]


def call(
    name: str, *arguments: Tensor | Sequence[Tensor] | ctypes.Array[Any] | int | float | None, kind: str = "cuda"
) -> None:
    """Queue the kernels of `FUNCTIONS[name]` on the current stream of the tensors' device, without waiting; or, with
    `kind="cpu"`, run them on as many threads as PyTorch does.

    Args:
        arguments: those up to the dtype, the fields of a params struct one by one; tensors are contiguous and of one
            dtype and device, None is a null pointer, a list of tensors a pointer to their pointers, an array one to its
            numbers.

    Raises:
        RuntimeError: the library refuses the call or the launch fails.
    """
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    stream = torch.cuda.current_stream(first.device).cuda_stream if first.is_cuda else None
    device = torch.get_num_threads() if kind == "cpu" else max(first.get_device(), 0)
    error = getattr(library(kind), name)(*packed(name, arguments), DTYPE_CODES[first.dtype], device, stream)
    if error:
        operator = name.removeprefix("ovseg_").rpartition("_")[0]
        raise RuntimeError(f"{operator}: {library(kind).ovseg_error_string(error).decode()}.")


def _value(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, ctypes.Array):
        return ctypes.addressof(argument)
    if isinstance(argument, (list, tuple)):
        return (POINTER * len(argument))(*(tensor.data_ptr() for tensor in argument))
    return argument


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, contiguous and aligned to 16 bytes, as the kernels read it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
