"""Every function of ovseg.h by itself: what it refuses, with which message, and that no sizes crash the process.

Each has a row in SMALLEST: the smallest call that it takes, and what it refuses. A function without a row fails. The
calls are made in another process, with pointers to no memory: a function that launched a kernel, or read a tensor on
the host, would crash it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

import ovseg_fast as ovs
from native.header import OPERATOR_FUNCTIONS, defined, name_of
from ovseg_fast import native
from ovseg_fast.ops.spatial_aggregation import SHARED_MEMORY
from samples import Sample
from test_kernels import CASES, DEVICE, has_gradient
from test_operators import gradients

Sizes = Mapping[str, int]


class Smallest(NamedTuple):
    """Sizes of the smallest call, the others in place of some of them."""

    sizes: Sizes
    refused: list[Sizes]  # for which there is no kernel
    empty: Sizes | None = None  # with which there is nothing to do, where the function then launches nothing
    long: tuple[str, ...] = ()  # what may pass 2^31, as a block takes many


def ones(*names: str, **others: int) -> Sizes:
    return {**dict.fromkeys(names, 1), **others}


def each(value: int, *names: str) -> list[Sizes]:
    """One size at a time is `value`."""
    return [{name: value} for name in names]


ATTENTION_REFUSED: list[Sizes] = [{"channels": 64}, {"channels": 256}, {"heads": 8}]
WINDOWS_REFUSED: list[Sizes] = [
    *ATTENTION_REFUSED, {"window": 13, "height": 13, "width": 13}, {"window": 2}, {"window": 0}, {"shift": 1},
    {"shift": -1},
]  # fmt: skip
CLASSES_REFUSED: list[Sizes] = [*ATTENTION_REFUSED, {"classes": 0}, {"classes": 2**24 + 1}, {"pads": -1}]
TOKENS_REFUSED: list[Sizes] = [
    {"layers": 33}, {"patches": 2}, *each(0, "layers", "tokens", "patches", "channels"),
]  # fmt: skip
RESIZE = Smallest(
    ones("maps", "height", "width", "low_height", "low_width", channels=8),
    [
        {"channels": 2}, {"low_height": 2}, {"low_width": 2}, {"height": 2**15 + 1}, {"width": 2**15 + 1},
        *each(0, "height", "width", "low_height", "low_width", "channels"),
    ],
    {"maps": 0},
)  # fmt: skip

SMALLEST = {
    "ovseg_spatial_aggregation_fwd": Smallest(
        ones("batch", "classes", "height", "width", channels=128, hidden=128, heads=4, window=1, shift=0),
        [*WINDOWS_REFUSED, {"hidden": 96}, {"hidden": 0}],
        {"batch": 0},
    ),
    "ovseg_spatial_aggregation_attention_bwd": Smallest(
        ones("batch", "classes", "height", "width", channels=128, heads=4, window=1, shift=0),
        WINDOWS_REFUSED,
        {"batch": 0},
    ),
    "ovseg_residual_mlp_bwd": Smallest(
        ones("rows", channels=128, hidden=32, gelu=1),
        [{"channels": 64}, {"hidden": 48}, {"hidden": 0}],
        {"rows": 0},
        long=("rows",),
    ),
    "ovseg_layer_gather_fwd": Smallest(
        ones("layers", "batch", "tokens", "patches", "channels", "width", "batch_stride", "token_stride"),
        [*TOKENS_REFUSED, {"width": 1025}, {"width": 0}],
        {"batch": 0},
    ),
    "ovseg_layer_gather_normed_bwd": Smallest(
        ones("layers", "batch", "tokens", "patches", "channels", "batch_stride", "token_stride"),
        TOKENS_REFUSED,
        {"batch": 0},
    ),
    "ovseg_layer_gather_length_bwd": Smallest(
        ones("layers", "rows", "width"), [{"layers": 33}, *each(0, "layers", "width")]
    ),
    "ovseg_layer_gather_norms_bwd": Smallest(
        ones("layers", "batch", "tokens", "patches", "channels", "count", "batch_stride", "token_stride"),
        [*TOKENS_REFUSED, {"count": 2}],
        {"batch": 0, "count": 0},
    ),
    "ovseg_gaussian_aggregation_fwd": Smallest(
        ones("layers", "size"), [{"layers": 0}], {"size": 0}, long=("size",)
    ),
    "ovseg_gaussian_aggregation_bwd": Smallest(ones("layers", "size", count=8), [{"layers": 0}, {"count": 7}]),
    "ovseg_label_map_fwd": Smallest(
        ones(
            "windows", "classes", "height", "width", "window_height", "window_width", "canvas_height", "canvas_width",
            "out_height", "out_width", "k",
        ),
        [
            {"windows": 65}, {"classes": 9, "k": 9}, {"k": 2}, {"k": -1}, {"height": 2**16, "width": 2**15},
            *each(
                0, "windows", "classes", "height", "width", "window_height", "window_width", "canvas_height",
                "canvas_width", "out_height", "out_width",
            ),
        ],
    ),
    "ovseg_upsampling_decoder_norm_fwd": Smallest(
        ones("batch", "classes", "positions", "channels", "groups", "chunk"),
        [{"groups": 2}, *each(0, "classes", "positions", "channels", "groups", "chunk")],
        {"batch": 0},
    ),
    "ovseg_upsampling_decoder_norm_bwd": Smallest(
        ones("batch", "classes", "positions", "channels", "groups", "chunk", "splits"),
        [{"groups": 2}, {"splits": 2}, *each(0, "classes", "positions", "channels", "groups", "chunk", "splits")],
        {"batch": 0},
    ),
    "ovseg_cost_volume_fwd": Smallest(
        ones("batch", "patches", "prompts", "channels"),
        each(0, "patches", "prompts", "channels"),
        {"batch": 0},
    ),
    "ovseg_cost_volume_norm_bwd": Smallest(
        ones("rows", "channels"), [{"channels": 0}, {"channels": 2**30}], {"rows": 0}, long=("rows",)
    ),
    "ovseg_cost_embedding_fwd": Smallest(
        ones("batch", "height", "width", "channels", "classes", "prompts", "outputs", "size"),
        [{"size": 2}, {"size": 13}, *each(0, "height", "width", "channels", "classes", "prompts", "size")],
        {"batch": 0},
    ),
    "ovseg_cost_embedding_cost_bwd": Smallest(
        ones("maps", "prompts", "height", "width", "outputs", "size"),
        [{"size": 2}, {"size": 13}, *each(0, "prompts", "height", "width", "size")],
        {"maps": 0},
    ),
    "ovseg_cost_embedding_weight_bwd": Smallest(
        ones("maps", "prompts", "height", "width", "outputs", "size", "parts"),
        [{"size": 2}, {"size": 13}, *each(0, "prompts", "height", "width", "size", "parts")],
    ),
    "ovseg_class_aggregation_fwd": Smallest(
        ones(
            "batch", "classes", "height", "width", channels=128, hidden=32, heads=4, pooling=1, pads=0,
            images_of_terms=1,
        ),
        [*CLASSES_REFUSED, {"pooling": 2}, *each(0, "height", "width", "pooling", "hidden"), {"hidden": 48}],
        {"batch": 0},
    ),
    "ovseg_class_aggregation_attention_bwd": Smallest(
        ones("batch", "classes", "positions", channels=128, heads=4, pads=0, images_of_terms=1),
        [*CLASSES_REFUSED, {"positions": 0}],
        {"batch": 0},
    ),
    "ovseg_class_aggregation_resize_fwd": RESIZE,
    "ovseg_class_aggregation_resize_bwd": RESIZE,
}  # fmt: skip

ANY_NUMBER = {"gelu", "images_of_terms", "batch_stride", "token_stride"}  # yes or no, one or many, strides
ON_THE_HOST = {"positions"}  # the function itself reads it
UNMAPPED = 4096  # an aligned address at which no process has memory


def tensors_of(function: str) -> list[str]:
    pointers = [name_of(parameter) for parameter in OPERATOR_FUNCTIONS[function] if "*" in parameter]
    return [name for name in pointers if name != "stream" and name not in ON_THE_HOST]


def arguments(
    function: str, sizes: Sizes = MappingProxyType({}), *, memory: Any = UNMAPPED, misaligned: str = "", **run: int
) -> list[Any]:
    """Of the smallest call with these sizes instead. Every tensor is at `memory`; a list stands for pointers to it.

    One tensor may be misaligned; `run` may hold another dtype or device.
    """
    numbers = {"dtype": 0, "device": 0, "stream": 0, **run, **SMALLEST[function].sizes, **sizes}
    found: list[Any] = []
    for parameter in OPERATOR_FUNCTIONS[function]:
        name = name_of(parameter)
        if name in numbers:
            found.append(numbers[name])
        elif name in ON_THE_HOST:
            found.append("zeros")
        elif "*" in parameter:
            address = memory + 4 if name == misaligned else memory
            found.append([address] if parameter.count("*") > 1 else address)
        else:
            found.append(1e-5)
    return found


CALLS = """
import ctypes, json, sys
from ovseg_fast import native

zeros = ctypes.create_string_buffer(2**20)

def value(argument):
    if isinstance(argument, list):
        return (ctypes.c_void_p * 64)(*map(value, 64 * argument))
    return ctypes.addressof(zeros) + 127 & ~127 if argument == "zeros" else argument

shared_memory = getattr(native.library(), "emulated_shared_memory", int)
for function, arguments in json.load(sys.stdin):
    *values, dtype, device, stream = map(value, arguments)
    called = getattr(native.library(), function)(*native.packed(function, values), dtype, device, stream)
    print(called, shared_memory(), flush=True)
"""

Calls = dict[tuple[str, ...], list[Any]]  # (function, what is special of the call) -> its arguments


def outcomes(library: Path, calls: Calls) -> dict[tuple[str, ...], int]:
    """What each call returns, in another process."""
    return {call: code for call, (code, _) in runs(library, calls).items()}


def runs(library: Path, calls: Calls) -> dict[tuple[str, ...], tuple[int, int]]:
    """What each call returns and, of the emulated library, the most shared memory that its launches ask for."""
    result = subprocess.run(
        [sys.executable, "-c", CALLS],
        input=json.dumps([(function, values) for (function, *_), values in calls.items()]),
        env=os.environ | {"OVSEG_NATIVE_LIBRARY": str(library)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    found = [(int(code), int(shared)) for code, shared in map(str.split, result.stdout.splitlines())]
    if result.returncode:
        pytest.fail(f"{[*calls, 'no call'][len(found)]} ended the process\n{result.stderr[-2000:]}")
    return dict(zip(calls, found, strict=True))


def others(found: Mapping[tuple[str, ...], int], *expected: str) -> dict[tuple[str, ...], int]:
    """The calls whose code has none of these names."""
    codes = {defined(name) for name in expected}
    return {call: code for call, code in found.items() if code not in codes}


@pytest.fixture(params=["emulated", "built"])
def library(request: pytest.FixtureRequest) -> Path:
    """The emulated library, then the one that was built for GPUs: what is refused needs none."""
    return request.getfixturevalue("emulated_library" if request.param == "emulated" else "built_library")


def test_every_function_has_a_smallest_call() -> None:
    assert set(SMALLEST) == set(native.FUNCTIONS), "give every function a row"
    for function, row in SMALLEST.items():
        sizes = [name_of(word) for word in OPERATOR_FUNCTIONS[function] if word.startswith("int64_t")]
        assert list(row.sizes) == sizes, function
        assert row.refused and all(set(special) <= set(sizes) for special in row.refused), function
        assert len(tensors_of(function)) >= 2


def smallest_calls() -> Calls:
    return {
        (function, str(dtype).removeprefix("torch.")): arguments(function, memory="zeros", dtype=number)
        for function in SMALLEST
        for dtype, number in native.DTYPE_CODES.items()
    }


def test_smallest_calls_run(emulated_library: Path) -> None:
    """So that what another size or pointer makes of them is its doing."""
    assert others(outcomes(emulated_library, smallest_calls()), "OVSEG_OK") == {}


def shared_memory(library: Path) -> dict[str, dict[str, int]]:
    """Function -> dtype -> bytes of shared memory that its launches ask for."""
    found: dict[str, dict[str, int]] = {}
    for (function, dtype), (_, shared) in runs(library, smallest_calls()).items():
        found.setdefault(function, {})[dtype] = shared
    return found


EVERYWHERE = 99  # KB of shared memory that a block has on every GPU; sm_86 has no more


def test_launches_ask_for_no_more_shared_memory_than_a_block_may_have(emulated_library: Path) -> None:
    """99 KB, which every GPU has, unless the operator says otherwise."""
    found = shared_memory(emulated_library)
    large = {
        (function, dtype): size
        for function, row in found.items()
        for dtype, size in row.items()
        if size > EVERYWHERE * 1024
    }
    allowed = {
        ("ovseg_spatial_aggregation_fwd", str(dtype).removeprefix("torch.")): kilobytes
        for dtype, kilobytes in SHARED_MEMORY.items()
    }
    assert set(large) == set(allowed)
    assert all(size <= allowed[call] * 1024 for call, size in large.items())


def test_empty_calls_launch_nothing(library: Path) -> None:
    calls: Calls = {
        (function, str(row.empty)): arguments(function, row.empty)
        for function, row in SMALLEST.items()
        if row.empty is not None
    }
    assert others(outcomes(library, calls), "OVSEG_OK") == {}


def test_unknown_dtypes_are_refused(library: Path) -> None:
    calls: Calls = {
        (function, str(dtype)): arguments(function, dtype=dtype)
        for function in SMALLEST
        for dtype in (-1, len(native.DTYPE_CODES), 2**31 - 1)
    }
    assert others(outcomes(library, calls), "OVSEG_BAD_DTYPE") == {}


def test_misaligned_pointers_are_refused(library: Path) -> None:
    """Each tensor of each function, one at a time."""
    calls: Calls = {
        (function, name): arguments(function, misaligned=name) for function in SMALLEST for name in tensors_of(function)
    }
    assert others(outcomes(library, calls), "OVSEG_MISALIGNED") == {}


def test_sizes_without_a_kernel_are_refused(library: Path) -> None:
    calls: Calls = {
        (function, str(special)): arguments(function, special)
        for function, row in SMALLEST.items()
        for special in row.refused
    }
    assert others(outcomes(library, calls), "OVSEG_UNSUPPORTED_SIZE") == {}


def test_sizes_past_2_to_the_31_are_refused(library: Path) -> None:
    """One at a time. What is counted in blocks may be longer, up to 2^31 - 1 of them."""
    calls: Calls = {
        (function, f"{name} = {size}"): arguments(function, {name: size})
        for function, row in SMALLEST.items()
        for name in row.sizes
        if name not in ANY_NUMBER
        for size in ((2**44,) if name in row.long else (2**31, 2**33 + 1, 2**44))
    }
    assert others(outcomes(library, calls), "OVSEG_UNSUPPORTED_SIZE", "OVSEG_TOO_LARGE") == {}


def test_sizes_that_are_all_huge_are_refused(library: Path) -> None:
    """Their product is past 64 bits."""
    calls: Calls = {
        (function, str(size)): arguments(function, dict.fromkeys(row.sizes, size))
        for function, row in SMALLEST.items()
        for size in (2**31, 2**40, 2**63 - 1)
    }
    assert others(outcomes(library, calls), "OVSEG_UNSUPPORTED_SIZE", "OVSEG_TOO_LARGE") == {}


def test_devices_that_do_not_exist_are_an_error_of_the_cuda_runtime(built_library: Path) -> None:
    """As is any device where there is no driver."""
    calls: Calls = {
        (function, str(device)): arguments(function, device=device) for function in SMALLEST for device in (-1, 10**6)
    }
    assert {call: code for call, code in outcomes(built_library, calls).items() if code <= 0} == {}


@pytest.mark.usefixtures("on_cpu")  # a GPU would launch what Python never asks for
def test_sizes_that_make_no_sense_end_no_process(built_library: Path) -> None:
    calls: Calls = {
        (function, f"{name} = {size}"): arguments(function, {name: size})
        for function, row in SMALLEST.items()
        for name in row.sizes
        for size in (0, -1, -(2**31), -(2**63), 2**63 - 1)
    }
    assert len(outcomes(built_library, calls)) == len(calls)


@pytest.mark.usefixtures("emulation")
def test_small_samples_call_every_function(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no sample calls has no numbers checked in test_kernels."""
    called = set()
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *values: (called.add(name), call(name, *values)))
    for backend, row in CASES:
        if backend == "cuda" and "small" in row.tags:
            inputs = row.build(rng, torch.float32, DEVICE)
            with ovs.backend("cuda"):
                (gradients if has_gradient("cuda", row.function) else Sample.run)(row, inputs)
    assert called == set(native.FUNCTIONS)


# --- each error code becomes a sentence of Python's ---


def call_from_python(function: str, sizes: Sizes = MappingProxyType({}), misaligned: str = "") -> None:
    """`native.call` on zeros."""
    memory = torch.zeros(2**18)
    tensors = {UNMAPPED: memory, UNMAPPED + 4: memory[1:], "zeros": memory}

    def value(argument: Any) -> Any:
        return [value(argument[0])] * 64 if isinstance(argument, list) else tensors.get(argument, argument)

    native.call(function, *map(value, arguments(function, sizes, misaligned=misaligned)[:-3]))


def operator_of(function: str) -> str:
    return function.removeprefix("ovseg_").rpartition("_")[0]


@pytest.mark.usefixtures("emulation", "on_cpu")
@pytest.mark.parametrize("function", SMALLEST)
def test_what_a_function_refuses_is_raised_as_a_sentence(function: str) -> None:
    sentence = rf"^{operator_of(function)}: there is no kernel for these sizes\.$"
    with pytest.raises(RuntimeError, match=sentence):
        call_from_python(function, SMALLEST[function].refused[0])
    sentence = rf"^{operator_of(function)}: a tensor does not begin at a multiple of 16 bytes\.$"
    with pytest.raises(RuntimeError, match=sentence):
        call_from_python(function, misaligned=tensors_of(function)[-1])


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("function", SMALLEST)
def test_without_a_driver_the_cuda_runtimes_sentence_is_raised(
    function: str, built_library: Path, use_library: Callable[[Path], None]
) -> None:
    use_library(built_library)
    with pytest.raises(RuntimeError, match=rf"^{operator_of(function)}: .*(driver|device).*\.$"):
        call_from_python(function)
