"""Random numbers of the tests: a fresh seed each run, printed, and replayable with ``OVSEG_SEED=<seed>``."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

import ovseg_fast as ovs
from native import emulated
from ovseg_fast import backends, native

if torch.cuda.is_available():
    torch.backends.cudnn.allow_tf32 = False  # PyTorch lowers convolutions, unlike products, by default
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is imported: they run on the CPU

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT") or 0):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))  # together as many as there are cores

SEED = int(os.environ.get("OVSEG_SEED") or random.SystemRandom().randrange(2**31))
os.environ["OVSEG_SEED"] = str(SEED)  # worker processes take the same


def derive_seed(name: str) -> int:
    """A seed of its own for each name, so that a test draws the same numbers alone and among all others."""
    return zlib.crc32(f"{SEED}:{name}".encode())


class TorchRandom:
    """Lets hypothesis reset torch before each example, so that it can repeat and shrink one with tensors.

    It always asks for the same seed; mixing in the run's own keeps the data fresh from run to run.
    """

    seed = staticmethod(lambda value: torch.manual_seed(derive_seed(f"hypothesis {value}")))
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis itself holds only a weak reference
hypothesis.register_random(TORCH_RANDOM)

# Time per example says nothing on a shared machine; the blob replays a failing example by itself.
hypothesis.settings.register_profile("ovseg", deadline=None, print_blob=True)
hypothesis.settings.load_profile("ovseg")


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads the option
def pytest_configure(config: pytest.Config) -> None:
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(SEED)


@pytest.hookimpl(tryfirst=True)  # before the slow ones are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        interpreted = parameters.get("every_backend") == "triton" and not torch.cuda.is_available()
        if interpreted and item.get_closest_marker("slow_in_interpreter"):
            item.add_marker("slow")
    items[:] = [item for item in items if not forces_missing_kernels(item)]


def forces_missing_kernels(item: pytest.Item) -> bool:
    """Whether a test of an operator without kernels for CPUs, or of several operators, would run with these forced."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    about = item.path.stem.removeprefix("test_")
    return parameters.get("every_backend") == "cpu" and about not in (
        "operators",
        "cascade_head",
        *backends.operators_with_kernels("cpu"),
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Worker processes send what a test logged as UTF-8, which has no place for file names that are not."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


def pytest_report_header() -> str:
    return f"OVSEG_SEED={SEED}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"replay these random numbers with OVSEG_SEED={SEED}")


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    seed = derive_seed(request.node.nodeid)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of the test's own, untouched by what the code under test draws."""
    return torch.Generator().manual_seed(derive_seed(f"rng {request.node.nodeid}"))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that a launcher allocates holds NaN until a kernel writes it."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch then fills uninitialised memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "triton", "cpu"])
def every_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once with each backend forced; with "cpu" if it is about operators that have kernels there."""
    if request.param == "cpu":
        request.getfixturevalue("cpu_library")
    with ovs.backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def emulated_library() -> Path:
    if emulated.compiler() is None:
        pytest.skip("there is no C++ compiler to build the emulated CUDA kernels with")
    return emulated.build()


@pytest.fixture(scope="session")
def built_library() -> Path:
    library = Path(ovs.__file__).with_name("libovseg.so")
    if not library.exists():
        pytest.skip("the native library is not built here; `make venv` builds it where nvcc is found")
    return library


@pytest.fixture(scope="session")
def cpu_library() -> Path:
    """The library with the kernels for CPUs, where it is built and the CPU runs it."""
    library = native.path("cpu")
    if not library.exists():
        pytest.skip("the CPU kernels are not built here; `make venv` builds them where a C++ compiler is found")
    if (problem := native.problem("cpu")) and "which this CPU lacks" in problem:
        pytest.skip(problem)
    return library


@pytest.fixture
def use_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes a file the native library of a backend, by default "cuda", for the rest of a test."""

    def forget() -> None:
        for function in (native.library, native.problem, native.architectures):
            function.cache_clear()

    def use(path: Path, kind: str = "cuda") -> None:
        monkeypatch.setenv(native.VARIABLES[kind], str(path))
        forget()

    yield use
    forget()


@pytest.fixture
def emulation(use_library: Callable[[Path], None], emulated_library: Path) -> None:
    """The CUDA C++ kernels run on the CPU, where there is no GPU to run them."""
    if not torch.cuda.is_available():
        use_library(emulated_library)


@pytest.fixture
def on_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("the state of a machine without a GPU")
