"""The native library: one interface on both sides, what it exports and needs, and each way in which it may be unusable.

What cannot run says so in one sentence that holds the cure: as an error where the backend is forced, as a reason where
another one takes over. Nothing here needs a GPU or nvcc; what looks at the built library is skipped without one.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import emulated
import ovseg_fast as ovs
import samples
from ovseg_fast import backends, native

ROOT = Path(__file__).resolve().parent.parent
HEADER = (ROOT / "csrc" / "ovseg.h").read_text()
BUILT = ROOT / "ovseg_fast" / "libovseg.so"
ABOUT_ITSELF = {"ovseg_abi_version", "ovseg_error_string", "ovseg_architectures"}
C_TYPES = {"int64_t": native.SIZE, "int": native.NUMBER, "float": native.REAL}
AGAIN = "build it again with `pip install --force-reinstall --no-deps -e .`"


def declared() -> dict[str, list[str]]:
    """Function of ovseg.h -> its parameters."""
    code = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL)
    found = re.findall(r"OVSEG_API [\w *]+?\b(ovseg_\w+)\(([^)]*)\);", code)
    return {name: [parameter.strip() for parameter in parameters.split(",")] for name, parameters in found}


DECLARED = declared()
OPERATOR_FUNCTIONS = {name: parameters for name, parameters in DECLARED.items() if name not in ABOUT_ITSELF}


def c_type(parameter: str) -> type:
    return native.POINTER if "*" in parameter else C_TYPES[parameter.split()[0]]


def defined(name: str) -> int:
    """The number that ovseg.h gives a name."""
    value = re.search(rf"\b{name}\s*=?\s*(-?\d+)", HEADER)
    assert value is not None, name
    return int(value[1])


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


@pytest.fixture
def on_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("the state of a machine without a GPU")


# --- one interface, said twice ---


def test_the_header_is_read_in_full() -> None:
    assert len(DECLARED) == len(re.findall("^OVSEG_API ", HEADER, re.MULTILINE))
    assert set(DECLARED) > ABOUT_ITSELF


def test_functions_are_declared_to_python_as_in_the_header() -> None:
    assert set(native.FUNCTIONS) == set(OPERATOR_FUNCTIONS)
    for name, parameters in OPERATOR_FUNCTIONS.items():
        assert list(native.FUNCTIONS[name]) == [c_type(parameter) for parameter in parameters], name
        assert parameters[-3:] == ["int dtype", "int device", "void *stream"], name


def test_functions_are_named_after_operators() -> None:
    """Or after a custom operator that several of them share."""
    shared = {name.removeprefix("ovseg_fast::") for name in torch._C._dispatch_get_all_op_names()}
    names = {*backends.operators_with_kernels("cuda"), *(name for name in shared if "::" not in name)}
    for name in OPERATOR_FUNCTIONS:
        assert re.fullmatch(rf"ovseg_({'|'.join(names)})(_[a-z_]+)?_(fwd|bwd)", name), name


def test_version_and_dtypes_are_those_of_the_header() -> None:
    assert defined("OVSEG_ABI_VERSION") == native.ABI_VERSION
    assert set(native.DTYPES) == set(backends.DTYPES)
    for dtype, number in native.DTYPES.items():
        assert defined(f"OVSEG_{str(dtype).removeprefix('torch.').upper()}") == number


@pytest.mark.usefixtures("emulation", "on_cpu")
def test_every_error_has_a_sentence_of_its_own() -> None:
    codes = [int(code) for code in re.findall(r"OVSEG_[A-Z_]+ = (-\d+)", HEADER)]
    say = native.library().ovseg_error_string
    sentences = {say(code) for code in (0, *codes)}
    assert len(codes) >= 4 and len(sentences) == len(codes) + 1 and say(-99) not in sentences


# --- the built library ---


@pytest.fixture
def built() -> Path:
    if not BUILT.exists():
        pytest.skip("the native library is not built here; `make venv` builds it where nvcc is found")
    return BUILT


def tool(*command: object) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"there is no {command[0]}")
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def test_built_library_exports_what_the_header_declares_and_no_more(built: Path) -> None:
    symbols = tool("nm", "--dynamic", "--defined-only", built)
    assert {line.split()[-1] for line in symbols.splitlines()} == set(DECLARED)


def test_built_library_needs_neither_the_cuda_runtime_nor_torch_nor_python(built: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "--dynamic", built))
    assert needed and all(re.match(r"(ld-linux.*|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+))\.so", name) for name in needed)
    assert "RUNPATH" not in tool("readelf", "--dynamic", built)


def test_built_library_loads_and_tells_what_it_was_built_for(built: Path, use_library: Callable) -> None:
    use_library(built)
    assert native.problem() is None
    assert native.architectures() and min(native.architectures()) >= 80
    assert native.library().ovseg_architectures(None, 0) == len(native.architectures())


@pytest.mark.usefixtures("on_cpu")
def test_built_library_on_tensors_of_the_cpu(built: Path, use_library: Callable) -> None:
    use_library(built)
    refused(wide_call(), "the tensors are on the CPU")


def backward_call() -> tuple[object, ...]:
    """The smallest launch: one window of one token."""
    return (
        "ovseg_spatial_aggregation_bwd", torch.randn(1, 384), torch.randn(1, 128), torch.empty(1, 384), None,
        1, 1, 1, 1, 128, 4, 1, 0,
    )  # fmt: skip


@pytest.mark.usefixtures("on_cpu")
def test_without_a_driver_the_cuda_runtimes_sentence_is_raised(built: Path, use_library: Callable) -> None:
    use_library(built)
    with pytest.raises(RuntimeError, match=r"^spatial_aggregation: .*(driver|device).*\.$"):
        native.call(*backward_call())


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
    monkeypatch.setattr(native, "path", lambda: tmp_path / "libovseg.so")
    native.library.cache_clear()
    native.problem.cache_clear()
    refused(wide_call(), "is not built; `pip install -e .` builds it where nvcc is on PATH or in CUDA_HOME/bin")


@pytest.mark.parametrize("content", [b"", b"not a library\n" * 100, b"\x7fELF", b"\x7fELF\x02\x01" + bytes(200)])
def test_file_that_is_no_library(use_library: Callable, tmp_path: Path, content: bytes) -> None:
    library = tmp_path / "text.so"
    library.write_bytes(content)
    use_library(library)
    refused(wide_call(), f"text.so cannot be loaded ({library}: ")
    refused(wide_call(), AGAIN)


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
        assert line == f"the native library {size}.so cannot be loaded (it has {size} bytes of {len(whole)}); {AGAIN}"


def test_library_of_another_version(use_library: Callable, tmp_path: Path) -> None:
    use_library(compiled(tmp_path, "int ovseg_abi_version(void) { return 999; }"))
    words = f"libtiny.so has interface version 999, this package needs {native.ABI_VERSION}; {AGAIN}"
    refused(wide_call(), words)


@pytest.mark.parametrize("functions", ["", "int ovseg_abi_version(void) { return %d; }"])
def test_library_without_a_function(use_library: Callable, tmp_path: Path, functions: str) -> None:
    use_library(compiled(tmp_path, functions.replace("%d", str(native.ABI_VERSION)) + "int other;"))
    refused(wide_call(), "undefined symbol: ovseg_")
    refused(wide_call(), AGAIN)


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
    assert reason.endswith(f"build it again with OVSEG_CUDA_ARCHS={name}")
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
    assert ovs.last_backend("spatial_aggregation") == "torch"


@pytest.mark.usefixtures("emulation", "on_cpu")
@pytest.mark.parametrize("argument", [0, 1, 4])
def test_tensor_off_a_multiple_of_16_bytes(argument: int) -> None:
    call = wide_call()
    tensors = list(call[0])
    storage = torch.empty(tensors[argument].numel() + 1)
    tensors[argument] = storage[1:].view(tensors[argument].shape).copy_(tensors[argument])
    refused((tuple(tensors), call[1]), "a tensor does not begin at a multiple of 16 bytes; give it a .clone()")


@pytest.mark.usefixtures("emulation", "on_cpu")
def test_misaligned_pointers_are_refused_by_the_library_itself() -> None:
    name, _, *others = backward_call()
    with pytest.raises(
        RuntimeError, match=r"^spatial_aggregation: a tensor does not begin at a multiple of 16 bytes\.$"
    ):
        native.call(name, torch.randn(400)[1:385], *others)
    assert native.aligned(torch.randn(400)[1:385]).data_ptr() % 16 == 0


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


# Functions of which no size may pass 2^31 -> the smallest sizes that they take.
SMALLEST = {
    "ovseg_spatial_aggregation_fwd": {
        "batch": 1, "classes": 1, "height": 1, "width": 1, "channels": 128, "hidden": 32, "heads": 4, "window": 1,
        "shift": 0,
    },
    "ovseg_spatial_aggregation_bwd": {
        "batch": 1, "classes": 1, "height": 1, "width": 1, "channels": 128, "heads": 4, "window": 1, "shift": 0,
    },
}  # fmt: skip


def codes_in_another_process(library: Path, calls: list[tuple[str, list[int]]]) -> list[int]:
    """Error codes of calls with null pointers and these sizes: a launch would end the process."""
    code = f"""
import ctypes
from ovseg_fast import native
library = native.library()
for name, sizes in {calls}:
    types = native.FUNCTIONS[name]
    values = iter(sizes)
    arguments = [next(values) if kind is ctypes.c_int64 else kind(0).value for kind in types]
    print(getattr(library, name)(*arguments))
"""
    environment = os.environ | {"OVSEG_NATIVE_LIBRARY": str(library)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return [int(line) for line in result.stdout.split()]


def test_sizes_past_2_to_the_31_are_refused_without_a_launch(emulated_library: Path) -> None:
    too_large = {defined("OVSEG_UNSUPPORTED_SIZE"), defined("OVSEG_TOO_LARGE")}
    calls, expected = [], []
    for function, smallest in SMALLEST.items():
        names = [word.split()[-1] for word in OPERATOR_FUNCTIONS[function] if word.startswith("int64_t")]
        assert list(smallest) == names
        for name in names:
            for size in (2**31, 2**33 + 1, 2**44):
                calls.append((function, list({**smallest, name: size}.values())))
                expected.append(f"{function} {name} {size}")
        calls.append((function, [0, *list(smallest.values())[1:]]))
        expected.append("")
    for label, code in zip(expected, codes_in_another_process(emulated_library, calls), strict=True):
        assert code in too_large if label else code == 0, (label, code)


def test_sizes_that_are_all_huge_end_no_process(emulated_library: Path) -> None:
    """Their product is past 64 bits: whatever a function makes of it, it launches nothing."""
    calls = [(name, [2**40] * types.count(ctypes.c_int64)) for name, types in native.FUNCTIONS.items()]
    for code, (name, _) in zip(codes_in_another_process(emulated_library, calls), calls, strict=True):
        assert code <= 0, name
