"""The library with the kernels for CPUs: the same interface on both sides, what it exports and needs, each way it can
be unusable, threads and forks.

What is run in another process there has a time limit, as what may go wrong is that it never ends.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import ovseg_fast as ovs
import samples
from native import emulated
from native.header import (
    CPU_ABOUT_ITSELF,
    CPU_DECLARED,
    CPU_HEADER,
    CPU_OPERATOR_FUNCTIONS,
    DECLARED,
    HEADER,
    OPERATOR_FUNCTIONS,
    STRUCTS,
    defined,
    name_of,
)
from native.test_library import REBUILD, c_type, compiled, tool
from ovseg_fast import backends, native

SOURCES = emulated.ROOT / "csrc" / "cpu"
TESTS = Path(__file__).resolve().parent.parent
SECONDS = 100  # after which a process of a test hangs


def call(dtype: torch.dtype = torch.float32, **sizes: int) -> samples.Call:
    sizes = {"classes": 3, "height": 5, "width": 6, "window": 5, "shift": 2, **samples.WIDE, **sizes}
    return samples.draw(samples.spatial_aggregation(**sizes), dtype)


def run(inputs: samples.Call) -> torch.Tensor:
    return ovs.ops.spatial_aggregation(*inputs[0], **inputs[1])


def refused(words: str) -> None:
    """The forced backend raises one sentence with these words; `auto` takes PyTorch."""
    inputs = call()
    with ovs.backend("cpu"), pytest.raises(RuntimeError) as caught:
        run(inputs)
    sentence = str(caught.value)
    assert sentence.startswith("spatial_aggregation: the cpu backend was asked for but cannot run: ")
    assert words in sentence and sentence.endswith(".") and "\n" not in sentence
    run(inputs)
    assert ovs.last_backend("spatial_aggregation") == "torch"


SETUP = """
import os, threading, time
import torch
import ovseg_fast as ovs
from native.test_cpu_library import call, run

def right(inputs, expected):
    with ovs.backend("cpu"), torch.inference_mode():
        return torch.equal(run(inputs), expected)

# Of the kernels alone: PyTorch's own threads do not survive a fork.
torch.set_num_threads(1)
torch.get_num_threads = lambda: 3
inputs = call()
with ovs.backend("cpu"):
    expected = run(inputs)
"""


def process(code: str, **environment: str) -> str:
    """What a fresh process prints that has called the kernels on several threads."""
    code = textwrap.dedent(SETUP) + textwrap.dedent(code)
    path = os.pathsep.join([str(TESTS), str(Path(ovs.__file__).parent.parent)])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# --- one interface, said twice ---


def test_functions_are_declared_to_python_as_in_the_headers(cpu_library: Path) -> None:
    declared = {**OPERATOR_FUNCTIONS, **CPU_OPERATOR_FUNCTIONS}
    assert set(CPU_OPERATOR_FUNCTIONS) <= set(native.CPU_FUNCTIONS) <= set(declared)
    for name in native.CPU_FUNCTIONS:
        types = list(getattr(native.library("cpu"), name).argtypes)
        struct = re.match(r"const (\w+_params) \*params", {**DECLARED, **CPU_DECLARED}[name][0])
        if struct:
            fields = types[0]._type_._fields_
            assert fields == [(name_of(field), c_type(field)) for field in STRUCTS[struct[1]]], name
            types[:1] = [kind for _, kind in fields]
        assert types == [c_type(parameter) for parameter in declared[name]], name
        assert declared[name][-3] == "int dtype" and declared[name][-1] == "void *stream", name
        assert declared[name][-2] in ("int device", "int threads"), name


def test_functions_are_named_after_operators() -> None:
    for name in native.CPU_FUNCTIONS:
        operators = [operator for operator in backends.operators_with_kernels("cpu") if operator in name]
        assert operators and re.fullmatch(r"ovseg_[a-z_]+_fwd", name), name


def test_every_error_has_a_sentence_of_its_own(cpu_library: Path) -> None:
    text = "".join(path.read_text() for path in SOURCES.glob("*.[ch]*"))
    named = {name: defined(name) for name in re.findall(r"\b(OVSEG_[A-Z_]+) = -\d+", HEADER + CPU_HEADER)}
    codes = {code for name, code in named.items() if re.search(rf"\b{name}\b", text)}
    say = native.library("cpu").ovseg_error_string
    sentences = {say(code) for code in (0, *codes)}
    assert len(codes) >= 4 and len(sentences) == len(codes) + 1 and say(-99) not in sentences
    assert defined("OVSEG_UNSUPPORTED_CPU") == native.UNSUPPORTED_CPU


def test_library_exports_what_the_headers_declare_and_no_more(cpu_library: Path) -> None:
    symbols = tool("nm", "--dynamic", "--defined-only", cpu_library)
    assert {line.split()[-1] for line in symbols.splitlines()} == {*CPU_ABOUT_ITSELF, *native.CPU_FUNCTIONS}


def test_library_needs_only_what_every_linux_has(cpu_library: Path) -> None:
    content = tool("readelf", "--dynamic", cpu_library)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", content)
    assert needed and all(re.match(r"(ld-linux.*|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+))\.so", name) for name in needed)
    assert "RUNPATH" not in content
    assert "NODELETE" in content  # its threads sleep in it


def test_no_code_is_shared_between_instruction_sets(cpu_library: Path) -> None:
    if not apart(emulated.ROOT / "build" / "cpu"):
        pytest.skip("the objects of the CPU kernels are not here; `make venv` leaves them in build/cpu")


def apart(build: Path) -> bool:
    """Whether a folder has objects of the operators, each of which then keeps to its instruction set.

    The linker keeps one copy of a weak symbol, perhaps that of a set which the machine lacks.
    """
    operators = {path.name for path in SOURCES.glob("*.cpp")} - {"library.cpp", "pool.cpp"}
    objects = [
        (isa, path)
        for isa in native.ISAS
        for path in build.glob(f"CMakeFiles/ovseg_cpu_{isa}.dir/*.o")
        if path.stem in operators
    ]
    for isa, path in objects:
        for line in tool("nm", "--defined-only", "--extern-only", path).splitlines():
            _, kind, name = line.split()
            assert kind not in "WwVvu", f"{path}: {name} is weak"
            assert f"{len(isa)}{isa}" in name, f"{path}: {name} lies outside the namespace {isa}"
    return bool(objects)


# --- libraries and instruction sets that cannot be used ---


@pytest.fixture
def use(use_library: Callable[..., None]) -> Callable[[Path], None]:
    return lambda path: use_library(path, "cpu")


def tiny(folder: Path, isa: str = '"avx2"', version: int = native.ABI_VERSION, without: str = "") -> Path:
    """A library that has what the real one has, as functions that do nothing."""
    functions = {
        "ovseg_abi_version": f"int ovseg_abi_version(void) {{ return {version}; }}",
        "ovseg_error_string": 'const char *ovseg_error_string(int error) { return "this CPU is too old"; }',
        "ovseg_cpu_isa": f"const char *ovseg_cpu_isa(void) {{ return {isa}; }}",
        **{name: f"int {name}(void) {{ return 0; }}" for name in ("ovseg_cpu_choose", *native.CPU_FUNCTIONS)},
    }
    return compiled(folder, "\n".join(code for name, code in functions.items() if name != without))


def test_missing_library(use: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(tmp_path / "none.so")
    refused("OVSEG_CPU_LIBRARY names " + str(tmp_path / "none.so") + ", which does not exist; unset or correct it")
    monkeypatch.delenv("OVSEG_CPU_LIBRARY")
    monkeypatch.setattr(native, "path", lambda kind: tmp_path / "libovseg_cpu.so")
    native.library.cache_clear()
    native.problem.cache_clear()
    refused("libovseg_cpu.so is not built; `pip install -e .` builds it if a C++17 compiler is on PATH")


def test_whole_stand_in_is_taken(use: Callable, tmp_path: Path) -> None:
    """What follows is refused for its fault alone."""
    use(tiny(tmp_path))
    assert native.problem("cpu") is None and native.isa() == "avx2"


@pytest.mark.parametrize("content", [b"", b"not a library\n" * 100, b"\x7fELF\x02\x01" + bytes(200)])
def test_file_that_is_no_library(use: Callable, tmp_path: Path, content: bytes) -> None:
    library = tmp_path / "text.so"
    library.write_bytes(content)
    use(library)
    refused(f"text.so cannot be loaded ({library}: ")
    refused(REBUILD)


def test_truncated_library(use: Callable, cpu_library: Path, tmp_path: Path) -> None:
    whole = cpu_library.read_bytes()
    for size in (64, 4096, len(whole) // 2, len(whole) - 1):
        part = tmp_path / f"{size}.so"
        part.write_bytes(whole[:size])
        use(part)
        refused(f"the native library {size}.so cannot be loaded (it has {size} bytes of {len(whole)}); {REBUILD}")


def test_library_of_another_version(use: Callable, tmp_path: Path) -> None:
    use(tiny(tmp_path, version=999))
    refused(f"libtiny.so has interface version 999, not {native.ABI_VERSION}; {REBUILD}")


@pytest.mark.parametrize("function", [*sorted(CPU_ABOUT_ITSELF), *native.CPU_FUNCTIONS])
def test_library_without_a_function(use: Callable, tmp_path: Path, function: str) -> None:
    use(tiny(tmp_path, without=function))
    refused(f"undefined symbol: {function}")
    refused(REBUILD)


def test_cpu_without_any_of_the_instruction_sets(use: Callable, tmp_path: Path) -> None:
    use(tiny(tmp_path, isa="0"))
    refused("this CPU is too old")


@pytest.fixture
def choose(use: Callable, cpu_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Loads the library with this OVSEG_CPU_ISA."""
    before = native.isa()

    def choose(name: str) -> None:
        monkeypatch.setenv("OVSEG_CPU_ISA", name)
        use(cpu_library)

    yield choose
    choose("")
    native.library("cpu").ovseg_cpu_choose(before.encode())


def test_every_instruction_set_is_chosen_or_refused_with_those_that_are_there(choose: Callable) -> None:
    choose("avx9")
    said = str(native.problem("cpu")).partition("this machine runs ")[2].split(", ")
    for name in said:
        choose(name)
        assert native.isa() == name
    for name in ({*native.ISAS, "AVX2", "avx512_bf16 ", "avx9"}) - {*said}:
        choose(name)
        refused(f"OVSEG_CPU_ISA is {name!r}; this machine runs {', '.join(said)}.")


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="only Linux tells whose the processor is")
def test_bfloat16_products_are_left_out_where_they_are_slow(choose: Callable) -> None:
    processor = Path("/proc/cpuinfo").read_text()
    choose("")
    if "GenuineIntel" in processor:
        assert native.isa() != "avx512_bf16"
    elif "avx512_bf16" in processor:
        assert native.isa() == "avx512_bf16"


def test_tiles_are_shared_with_pytorch(choose: Callable, rng: torch.Generator) -> None:
    choose("amx")
    if native.problem("cpu"):
        choose("")
        pytest.skip("this machine has no AMX")
    row = next(row for row in samples.select("sixteens") if row.operator == "spatial_aggregation")
    call = row.build(rng, torch.bfloat16)
    a, b = (torch.randn(size, generator=rng).bfloat16() for size in ((33, 70), (70, 50)))

    def ours() -> torch.Tensor:
        with ovs.backend("cpu"), torch.inference_mode():
            return row.run(call)

    expected, product = ours(), a @ b

    def by_turns(_: int) -> bool:
        return torch.equal(ours(), expected) and torch.equal(a @ b, product)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(by_turns, range(200)))


# --- sizes ---


def test_what_a_function_refuses_is_raised_as_a_sentence(cpu_library: Path) -> None:
    library, name = native.library("cpu"), "ovseg_spatial_aggregation_fwd"
    params = ctypes.byref(native.FUNCTIONS[name][0]())
    assert library.ovseg_error_string(library.ovseg_spatial_aggregation_fwd(params, 0, 1, None)) == (
        b"there is no CPU kernel for these sizes"
    )
    for dtype in (native.DTYPE_CODES[torch.float16], -1, 99):
        error = library.ovseg_spatial_aggregation_fwd(params, dtype, 1, None)
        assert library.ovseg_error_string(error) == b"the CPU kernels take float32 and bfloat16"
    numbers = torch.zeros(64)
    with pytest.raises(RuntimeError, match=r"^spatial_aggregation: there is no CPU kernel for these sizes\.$"):
        native.call(name, *[numbers] * 16, None, *[0] * 9, kind="cpu")


@pytest.mark.slow
def test_more_than_2_to_the_31_numbers(cpu_library: Path) -> None:
    needed = 4 * 2**31 + 2**31
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < needed:
        pytest.skip(f"this needs {needed >> 30} GB of free memory")
    (x, *others), keywords = call(torch.bfloat16, classes=1, height=24, width=24, window=12, shift=6, hidden=16)
    classes = 2**31 // x.numel() + 2
    many = x.expand(1, classes, *x.shape[2:]).contiguous()
    assert many.numel() > 2**31
    with ovs.backend("cpu"):
        expected = run(((x, *others), keywords))
        result = run(((many, *others), keywords))
    for place in (0, classes // 2, classes - 1):
        assert torch.equal(result[:, place], expected[:, 0])


def test_too_little_memory_is_an_error_and_the_next_call_runs(cpu_library: Path) -> None:
    """The packed weights are much larger than what is left."""
    process("""
        import resource
        def used():
            return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        large = call(hidden=2**18, channels=64)
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used() + 2**25, limits[1]))
        try:
            with ovs.backend("cpu"):
                run(large)
        except RuntimeError as error:
            assert str(error) == "spatial_aggregation: there is too little memory.", error
        else:
            raise AssertionError("it found the memory")
        resource.setrlimit(resource.RLIMIT_AS, limits)
        assert right(inputs, expected)
        with ovs.backend("cpu"):
            assert run(large).isfinite().all()
    """)


def test_a_system_without_more_threads_runs_on_those_that_there_are(cpu_library: Path) -> None:
    """There is no memory for their stacks."""
    process("""
        import resource
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**22, limits[1]))
        before = len(os.listdir("/proc/self/task"))
        torch.get_num_threads = lambda: 64
        assert right(inputs, expected)
        assert len(os.listdir("/proc/self/task")) == before
        resource.setrlimit(resource.RLIMIT_AS, limits)
        large = call(classes=100)
        torch.get_num_threads = lambda: 1
        with ovs.backend("cpu"):
            once = run(large)
        torch.get_num_threads = lambda: 64
        assert right(large, once)
        assert len(os.listdir("/proc/self/task")) > before
    """)


# --- threads ---


def test_threads_of_python_may_call_at_once(cpu_library: Path) -> None:
    calls = [call(classes=number + 1, height=5 + number) for number in range(6)]
    with ovs.backend("cpu"):
        expected = [run(inputs) for inputs in calls]
    wrong: list[int] = []

    def work(number: int) -> None:
        torch.set_num_threads(1 + number % 4)
        with ovs.backend("cpu"):
            for _ in range(20):
                if not torch.equal(run(calls[number]), expected[number]):
                    wrong.append(number)

    before = torch.get_num_threads()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
            assert not thread.is_alive()
    finally:
        torch.set_num_threads(before)
    assert wrong == []


def test_other_threads_of_python_go_on_during_a_call(cpu_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = call(classes=60, height=24, width=24, window=12, shift=6, hidden=512)
    during: list[tuple[float, float]] = []
    original = native.call

    def timed(*arguments: object, **keywords: object) -> None:
        start = time.perf_counter()
        original(*arguments, **keywords)
        during.append((start, time.perf_counter()))

    monkeypatch.setattr(native, "call", timed)
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        with ovs.backend("cpu"):
            for _ in range(3):
                run(inputs)
    finally:
        done.set()
        thread.join()
    counts = [sum(start < when < end for when in ticks) for start, end in during]
    assert max(counts) > 3, counts


def test_process_ends_while_the_threads_sleep(cpu_library: Path) -> None:
    assert process('print("end", flush=True)').split() == ["end"]


# --- forks ---


FORKED = """
        def child():
            right_there = right(inputs, expected) and right(inputs, expected)
            threads = len(os.listdir("/proc/self/task"))
            os._exit(0 if right_there and threads == 3 else 1)

        def end_of(pid):
            deadline = time.monotonic() + 50
            while time.monotonic() < deadline:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.01)
            os.kill(pid, 9)
            return "it hangs"
"""


def test_a_fork_after_use_runs_and_so_does_its_parent(cpu_library: Path) -> None:
    process(f"""{FORKED}
        for _ in range(3):
            pid = os.fork() or child()
            assert right(inputs, expected)
            assert end_of(pid) == 0, end_of
            assert right(inputs, expected)
    """)


def test_a_fork_during_the_calls_of_other_threads(cpu_library: Path) -> None:
    """At any moment, so also while another one holds the pool's lock, which in the child nobody would release."""
    process(f"""{FORKED}
        stop = threading.Event()
        def work():
            while not stop.is_set():
                assert right(inputs, expected)
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            ends = []
            for _ in range(20):
                ends.append(end_of(os.fork() or child()))
        finally:
            stop.set()
        assert ends == [0] * 20, ends
    """)


def test_workers_of_a_data_loader_run_the_kernels(cpu_library: Path) -> None:
    code = """
        class Calls(torch.utils.data.Dataset):
            def __len__(self):
                return 4
            def __getitem__(self, index):
                return torch.tensor(right(inputs, expected))
        loader = torch.utils.data.DataLoader(Calls(), num_workers=2, multiprocessing_context="fork")
        for _ in range(2):
            assert all(bool(item.all()) for item in loader)
            assert right(inputs, expected)
        print("end")
    """
    assert process(code).split() == ["end"]


# --- sanitizers ---

EVERY_CASE = """
import sys, threading
import torch
import ovseg_fast as ovs
from ovseg_fast import backends, native
from test_kernels import CPU_FUNCTIONS, cpu_rows

torch.set_num_threads(3)
called, call = set(), native.call
def noted(name, *arguments, **keywords):
    called.add(name)
    call(name, *arguments, **keywords)
native.call = noted

def work(seed):
    torch.set_num_threads(3)
    for row in [row for function in CPU_FUNCTIONS for row in cpu_rows(function)]:
        for dtype in backends.CPU_DTYPES:
            inputs = row.build(torch.Generator().manual_seed(seed), dtype, "cpu")
            with ovs.backend("cpu"):
                row.run(inputs)

for isa in native.ISAS:
    if not native.library("cpu").ovseg_cpu_choose(isa.encode()):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(int(sys.argv[1]))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
print(*sorted(called))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "threads"), [("address", 1), ("undefined", 1), ("thread", 2)])
def test_every_case_is_clean_under_sanitizers(cpu_library: Path, sanitizer: str, threads: int) -> None:
    """On every instruction set of this machine."""
    environment = {
        **os.environ,
        "LD_PRELOAD": emulated.sanitizer(sanitizer),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",  # those of torch and Python
        "CUDA_VISIBLE_DEVICES": "",
        "OVSEG_CPU_LIBRARY": str(emulated.build_cpu(sanitizer)),
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(Path(ovs.__file__).parent.parent)]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", EVERY_CASE, str(threads)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    assert result.stdout.split() == sorted(native.CPU_FUNCTIONS), "some function has no sample"
    assert not re.search("runtime error|ERROR|WARNING: ThreadSanitizer", result.stderr), result.stderr[-5000:]
