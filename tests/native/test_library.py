"""The native library: the same interface on both sides, what it exports and needs, and each way it can be unusable.

A backend that cannot run says why and how to fix it in one sentence: as an error if it is forced, as a reason if
another one takes over. Nothing here needs a GPU or nvcc; tests of the built library are skipped without one.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ovseg_fast as ovs
import samples
from native import emulated
from native.header import (
    ABOUT_ITSELF,
    CPU_ABOUT_ITSELF,
    CPU_DECLARED,
    CPU_HEADER,
    DECLARED,
    HEADER,
    OPERATOR_FUNCTIONS,
    STRUCTS,
    defined,
    name_of,
)
from ovseg_fast import backends, native, ops
from ovseg_fast.ops.spatial_aggregation import SHARED_MEMORY

C_TYPES = {"int64_t": native.SIZE, "int": native.NUMBER, "float": native.REAL, "double": ctypes.c_double}
REBUILD = "rebuild it with `pip install --force-reinstall --no-deps -e .`"


def c_type(parameter: str) -> type:
    return native.POINTER if "*" in parameter else C_TYPES[parameter.split()[0]]


def wide_call(channels: int = 128) -> samples.Call:
    """A call of spatial_aggregation of the widths that its CUDA C++ kernel takes."""
    sizes = {**samples.WIDE, "channels": channels}
    return samples.draw(samples.spatial_aggregation(classes=1, height=3, width=3, window=3, **sizes), torch.float32)


def run(call: samples.Call) -> torch.Tensor:
    return ovs.ops.spatial_aggregation(*call[0], **call[1])


def refused(call: samples.Call, words: str) -> None:
    """The forced backend raises one sentence with these words; `auto` takes another backend."""
    with ovs.backend("cuda"), pytest.raises(RuntimeError) as caught:
        run(call)
    sentence = str(caught.value)
    assert sentence.startswith("spatial_aggregation: the cuda backend was asked for but cannot run: ")
    assert words in sentence and sentence.endswith(".") and "\n" not in sentence
    with ovs.backend("auto"):
        run(call)
    assert ovs.last_backend("spatial_aggregation") != "cuda"


# --- one interface, said twice ---


def test_the_headers_are_read_in_full() -> None:
    assert len(DECLARED) == len(re.findall("^OVSEG_API ", HEADER, re.MULTILINE))
    assert len(CPU_DECLARED) == len(re.findall("^OVSEG_API ", CPU_HEADER, re.MULTILINE))
    assert set(DECLARED) > ABOUT_ITSELF and {*DECLARED, *CPU_DECLARED} > CPU_ABOUT_ITSELF
    assert len(STRUCTS) == len(re.findall("^typedef struct", HEADER + CPU_HEADER, re.MULTILINE))
    assert STRUCTS["ovseg_residual_mlp_params"][1] == "const void *y"


def test_functions_are_declared_to_python_as_in_the_header() -> None:
    assert set(native.FUNCTIONS) == set(OPERATOR_FUNCTIONS)
    for name, parameters in OPERATOR_FUNCTIONS.items():
        types = native.FUNCTIONS[name]
        struct = re.match(r"const (\w+_params) \*params", DECLARED[name][0])
        if struct:
            fields = [(name_of(field), c_type(field)) for field in STRUCTS[struct[1]]]
            assert types[0]._fields_ == fields, name
            types = (*(kind for _, kind in fields), *types[1:])
        assert list(types) == [c_type(parameter) for parameter in parameters], name
        assert parameters[-3:] == ["int dtype", "int device", "void *stream"], name


def test_functions_with_many_pointers_take_a_params_struct() -> None:
    """Of more than ten, nobody keeps the order in mind."""
    declared = {**DECLARED, **CPU_DECLARED}
    many = {name for name, parameters in declared.items() if sum("*" in word for word in parameters) > 1 + 10}
    assert many == set()
    used = {word.split()[1] for parameters in declared.values() for word in parameters if "_params" in word}
    assert used == set(STRUCTS)


@pytest.mark.parametrize("count", [0, 15, 17])
def test_a_params_struct_takes_no_more_and_no_fewer_fields(count: int) -> None:
    with pytest.raises(TypeError, match=f"ovseg_residual_mlp_bwd takes 16 arguments before the dtype, not {count}"):
        native.packed("ovseg_residual_mlp_bwd", [0] * count)


def test_functions_are_named_after_operators() -> None:
    """Or after a part that several operators share."""
    shared = {path.stem for path in Path(ops.__file__).with_name("common").glob("*.py")}
    names = {*backends.operators_with_kernels("cuda"), *shared}
    for name in OPERATOR_FUNCTIONS:
        assert re.fullmatch(rf"ovseg_({'|'.join(names)})(_[a-z_]+)?_(fwd|bwd)", name), name


def test_version_and_dtypes_are_those_of_the_header() -> None:
    assert defined("OVSEG_ABI_VERSION") == native.ABI_VERSION
    assert set(native.DTYPE_CODES) == set(backends.DTYPES)
    for dtype, number in native.DTYPE_CODES.items():
        assert defined(f"OVSEG_{str(dtype).removeprefix('torch.').upper()}") == number


@pytest.mark.usefixtures("emulation", "on_cpu")
def test_every_error_has_a_sentence_of_its_own() -> None:
    codes = [int(code) for code in re.findall(r"OVSEG_[A-Z_]+ = (-\d+)", HEADER)]
    say = native.library().ovseg_error_string
    sentences = {say(code) for code in (0, *codes)}
    assert len(codes) >= 4 and len(sentences) == len(codes) + 1 and say(-99) not in sentences


# --- the built library ---


def tool(*command: object) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"there is no {command[0]}")
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def test_built_library_exports_what_the_header_declares_and_no_more(built_library: Path) -> None:
    symbols = tool("nm", "--dynamic", "--defined-only", built_library)
    assert {line.split()[-1] for line in symbols.splitlines()} == set(DECLARED)


def test_built_library_needs_neither_the_cuda_runtime_nor_torch_nor_python(built_library: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "--dynamic", built_library))
    assert needed and all(re.match(r"(ld-linux.*|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+))\.so", name) for name in needed)
    assert "RUNPATH" not in tool("readelf", "--dynamic", built_library)


def test_built_library_loads_and_tells_what_it_was_built_for(built_library: Path, use_library: Callable) -> None:
    use_library(built_library)
    assert native.problem() is None
    assert native.architectures() and min(native.architectures()) >= 80
    assert native.library().ovseg_architectures(None, 0) == len(native.architectures())


@pytest.mark.usefixtures("on_cpu")
def test_built_library_on_tensors_of_the_cpu(built_library: Path, use_library: Callable) -> None:
    use_library(built_library)
    refused(wide_call(), "the tensors are on the CPU")


# --- libraries that cannot be used ---


def compiled(folder: Path, code: str) -> Path:
    """A tiny library in place of the real one."""
    compiler = emulated.compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    path = folder / "libtiny.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-xc", "-", "-o", path], input=code, text=True, check=True)
    return path


def test_missing_library(use_library: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_library(tmp_path / "none.so")
    refused(wide_call(), "none.so, which does not exist; unset or correct it")
    monkeypatch.delenv("OVSEG_NATIVE_LIBRARY")
    monkeypatch.setattr(native, "path", lambda kind: tmp_path / native.LIBRARIES[kind])
    native.library.cache_clear()
    native.problem.cache_clear()
    refused(wide_call(), "is not built; `pip install -e .` builds it if nvcc is on PATH or in CUDA_HOME/bin")


@pytest.mark.parametrize("content", [b"", b"not a library\n" * 100, b"\x7fELF", b"\x7fELF\x02\x01" + bytes(200)])
def test_file_that_is_no_library(use_library: Callable, tmp_path: Path, content: bytes) -> None:
    library = tmp_path / "text.so"
    library.write_bytes(content)
    use_library(library)
    refused(wide_call(), f"text.so cannot be loaded ({library}: ")
    refused(wide_call(), REBUILD)


def test_folder_in_place_of_the_library(use_library: Callable, tmp_path: Path) -> None:
    use_library(tmp_path)
    refused(wide_call(), "Is a directory")


def test_truncated_library(emulated_library: Path, tmp_path: Path) -> None:
    """In a process of its own: the loader maps what is not there, and dies of SIGBUS, if nobody looks before."""
    whole = emulated_library.read_bytes()
    pieces = [64, 4096, len(whole) // 4, len(whole) // 2, len(whole) * 3 // 4, len(whole) - 1]
    for size in pieces:
        (tmp_path / f"{size}.so").write_bytes(whole[:size])
    code = f"""
import os
from ovseg_fast import native
for size in {pieces}:
    os.environ["OVSEG_NATIVE_LIBRARY"] = os.path.join({str(tmp_path)!r}, f"{{size}}.so")
    native.library.cache_clear()
    native.problem.cache_clear()
    print(native.problem())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert len(said) == len(pieces)
    for size, line in zip(pieces, said, strict=True):
        assert line == f"the native library {size}.so cannot be loaded (it has {size} bytes of {len(whole)}); {REBUILD}"


def test_library_of_another_version(use_library: Callable, tmp_path: Path) -> None:
    use_library(compiled(tmp_path, "int ovseg_abi_version(void) { return 999; }"))
    words = f"libtiny.so has interface version 999, not {native.ABI_VERSION}; {REBUILD}"
    refused(wide_call(), words)


@pytest.mark.parametrize("functions", ["", "int ovseg_abi_version(void) { return %d; }"])
def test_library_without_a_function(use_library: Callable, tmp_path: Path, functions: str) -> None:
    use_library(compiled(tmp_path, functions.replace("%d", str(native.ABI_VERSION)) + "int other;"))
    refused(wide_call(), "undefined symbol: ovseg_")
    refused(wide_call(), REBUILD)


def test_library_with_too_few_functions(use_library: Callable, tmp_path: Path) -> None:
    code = f"""
        int ovseg_abi_version(void) {{ return {native.ABI_VERSION}; }}
        const char *ovseg_error_string(int error) {{ return "bad"; }}
        int ovseg_architectures(int *architectures, int size) {{ return 0; }}
    """
    use_library(compiled(tmp_path, code))
    refused(wide_call(), "libtiny.so lacks a function")


def test_library_with_unresolved_symbols(use_library: Callable, tmp_path: Path) -> None:
    use_library(compiled(tmp_path, "int elsewhere; extern int nowhere(void); int (*pointer)(void) = nowhere;"))
    refused(wide_call(), "undefined symbol: nowhere")


# --- what the kernels do not take ---


@pytest.fixture
def gpu(use_library: Callable, monkeypatch: pytest.MonkeyPatch, emulated_library: Path) -> Callable:
    """Stands in for a GPU of some compute capability and a library built for these architectures."""

    def stand_in(capability: tuple[int, int], *architectures: int) -> ovs.backends.Explanation:
        use_library(emulated_library)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(native, "architectures", functools.cache(lambda: architectures))
        return ovs.explain("cuda:0")

    return stand_in


@pytest.mark.parametrize(
    ("capability", "architectures"),
    [((9, 0), (80, 86, 89)), ((8, 6), (89, 90)), ((10, 0), (90, 103)), ((12, 1), (80,))],
)
def test_architecture_that_was_not_built(
    gpu: Callable, capability: tuple[int, int], architectures: tuple[int, ...]
) -> None:
    name = "{}{}".format(*capability)
    reason = gpu(capability, *architectures).reasons["spatial_aggregation"]["cuda"]
    assert reason.startswith("the native library was built for GPUs of compute capability ")
    assert reason.endswith(f"rebuild it with OVSEG_CUDA_ARCHS={name}")
    with ovs.backend("cuda"):
        assert ovs.explain("cuda:0").choices["spatial_aggregation"] is None


@pytest.mark.parametrize(
    ("capability", "architectures"), [((9, 0), (90,)), ((8, 7), (80, 86)), ((10, 3), (90, 100)), ((12, 1), (120,))]
)
def test_kernels_that_no_gpu_has_verified_run_only_where_forced(
    gpu: Callable, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architectures: tuple[int, ...]
) -> None:
    explained = gpu(capability, *architectures)
    assert explained.choices["spatial_aggregation"] != "cuda"
    said = "no GPU has verified its CUDA C++ kernels yet; OVSEG_BACKEND=cuda tries them"
    assert explained.reasons["spatial_aggregation"]["cuda"] == said and said in str(explained)
    with ovs.backend("cuda"):
        assert ovs.explain("cuda:0").choices["spatial_aggregation"] == "cuda"
    monkeypatch.setattr(native, "VERIFIED", frozenset({"spatial_aggregation"}))
    assert ovs.explain("cuda:0").choices["spatial_aggregation"] == "cuda"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_gpus_with_too_little_shared_memory_for_float32(gpu: Callable, capability: tuple[int, int]) -> None:
    gpu(capability, 80, 86, 89, 90, 120)

    def reason(dtype: torch.dtype) -> str | None:
        return backends.refusal("spatial_aggregation", "cuda", "cuda", 0, dtype, True, SHARED_MEMORY.get(dtype, 0))

    assert reason(torch.bfloat16) is None
    assert reason(torch.float32) == (
        None
        if capability in {(8, 0), (9, 0)}
        else "its kernel needs 163 KB of shared memory in float32, this GPU has 99; float16 and bfloat16 need half"
    )


def test_verified_operators_have_kernels() -> None:
    assert set(backends.operators_with_kernels("cuda")) >= native.VERIFIED


def test_gpus_too_old_for_any_kernel(gpu: Callable) -> None:
    explained = gpu((7, 5), 80)
    assert set(explained.choices.values()) == {"torch"}
    reasons = explained.reasons["spatial_aggregation"]
    assert reasons["cuda"] == reasons["triton"] == "its kernels need compute capability 8.0, this GPU has 7.5"


@pytest.mark.usefixtures("emulation", "on_cpu")
def test_the_emulation_runs_only_where_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "VERIFIED", frozenset(backends.operators_with_kernels("cuda")))
    call = wide_call()
    with ovs.backend("cuda"):
        run(call)
    assert ovs.last_backend("spatial_aggregation") == "cuda"
    with ovs.backend("auto"):
        run(call)
    assert ovs.last_backend("spatial_aggregation") in ("cpu", "torch")


@pytest.mark.usefixtures("emulation", "on_cpu")
@pytest.mark.parametrize("argument", [0, 1, 4])
def test_tensor_off_a_multiple_of_16_bytes(argument: int) -> None:
    call = wide_call()
    tensor = samples.tensors(call)[argument]
    moved = torch.empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    call = samples.map_tensors(lambda other: moved if other is tensor else other, call)
    refused(call, "a tensor does not begin at a multiple of 16 bytes; give it a .clone()")


def test_tensors_are_copied_only_where_kernels_could_not_read_them() -> None:
    tensor = torch.randn(4, 97)
    assert native.aligned(tensor) is tensor
    for other in (tensor.view(-1)[1:385].view(4, 96), tensor.t()):
        copy = native.aligned(other)
        assert copy.is_contiguous() and copy.data_ptr() % 16 == 0 and torch.equal(copy, other)


@pytest.mark.usefixtures("emulation", "on_cpu")
def test_sizes_without_a_kernel() -> None:
    call = wide_call(channels=64)
    refused(
        call, "its kernel takes 128 channels in 4 heads, windows up to 12 and hidden units in multiples of 128, not 64"
    )
    wide = wide_call()
    heads = (wide[0], {**wide[1], "heads": 8})
    refused(heads, "not 128 channels in 8 heads")
    large = samples.draw(
        samples.spatial_aggregation(classes=1, height=13, width=13, window=13, **samples.WIDE), torch.float32
    )
    refused(large, "windows of 13")


@pytest.mark.usefixtures("emulation", "on_cpu")
def test_dtypes_without_a_kernel() -> None:
    call = samples.map_floating(torch.Tensor.double, wide_call())
    refused(call, "its kernels take float32, float16 and bfloat16, not float64")
