"""Which backend runs an operator: the choice, its reasons, how it is forced, and what the user is told."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import ovseg_fast as ovs
from ovseg_fast import backends, native
from ovseg_fast.cli import info


def volume(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return ovs.ops.cost_volume(torch.randn(1, 2, 3, 16, dtype=dtype), torch.randn(2, 1, 16, dtype=dtype))


def run(code: str, **environment: str | None) -> str:
    """What a fresh process prints; an environment variable that is None is taken away."""
    variables = {**os.environ, **environment}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={name: value for name, value in variables.items() if value is not None},
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def on_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("the choice on a machine without a GPU")


def free() -> str:
    """What runs `volume` where nothing is forced and there is no GPU."""
    return (
        "cpu" if native.problem("cpu") is None and "cost_volume" in backends.operators_with_kernels("cpu") else "torch"
    )


@pytest.mark.usefixtures("on_cpu")
def test_on_the_cpu_its_kernels_run_where_they_can_and_the_pytorch_form_elsewhere() -> None:
    volume()
    assert ovs.last_backend("cost_volume") == free()
    for dtype in (torch.float64, torch.float16):
        volume(dtype)
        assert ovs.last_backend("cost_volume") == "torch"


def test_without_the_library_the_pytorch_form_runs(use_library: Callable, tmp_path: Path) -> None:
    use_library(tmp_path / "none.so", "cpu")
    volume()
    assert ovs.last_backend("cost_volume") == "torch"
    assert set(ovs.explain("cpu").choices.values()) == {"torch"}


@pytest.mark.usefixtures("on_cpu")
def test_forced_backends_nest_and_end() -> None:
    with ovs.backend("triton"):
        volume()
        assert ovs.last_backend("cost_volume") == "triton"
        with ovs.backend("torch"):
            volume()
            assert ovs.last_backend("cost_volume") == "torch"
        volume()
        assert ovs.last_backend("cost_volume") == "triton"
    volume()
    assert ovs.last_backend("cost_volume") == free()


def test_a_backend_ends_with_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError), ovs.backend("torch"):
        raise ZeroDivisionError
    assert backends.requested() == "auto"


@pytest.mark.usefixtures("on_cpu")
def test_a_forced_backend_is_the_threads_own() -> None:
    seen = []

    def other() -> None:
        volume()
        seen.append(backends.requested())

    with ovs.backend("triton"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == ["auto"]


def compiled_volume(seen: list[str]) -> Callable[..., torch.Tensor]:
    """cost_volume compiled as one graph; `seen` gets "torch" or "kernel" for each call that a graph holds, as it is
    compiled."""

    def note(graph: torch.fx.GraphModule, inputs: object) -> Callable:
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        seen.extend(
            "kernel" if "cost_volume" in name else "torch" for name in names if re.search("volume|matmul", name)
        )
        return graph.forward

    torch.compiler.reset()
    return torch.compile(ovs.ops.cost_volume, fullgraph=True, backend=note)


def nested(*names: str) -> Callable[..., torch.Tensor]:
    """cost_volume under these backends, the first one outermost, all within one compiled function."""

    def function(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        if not names:
            return ovs.ops.cost_volume(image, text)
        with ovs.backend(names[0]):
            if len(names) == 1:
                return ovs.ops.cost_volume(image, text)
            with ovs.backend(names[1]):
                return ovs.ops.cost_volume(image, text)

    return torch.compile(function, fullgraph=True, backend="eager")


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("inside", [(), ("torch",), ("triton",), ("torch", "triton"), ("triton", "torch")])
@pytest.mark.parametrize("outside", [None, "torch", "triton"])
def test_a_forced_backend_holds_in_compiled_functions(outside: str | None, inside: tuple[str, ...]) -> None:
    torch.compiler.reset()
    function, inputs = nested(*inside), (torch.randn(1, 2, 3, 16), torch.randn(2, 1, 16))
    with ovs.backend(outside or "auto"):
        function(*inputs)
        assert ovs.last_backend("cost_volume") == [outside or free(), *inside][-1]
        assert backends.requested() == (outside or "auto")
        volume()  # what a compiled function forces ends with it
        assert ovs.last_backend("cost_volume") == (outside or free())


@pytest.mark.usefixtures("on_cpu")
def test_a_compiled_function_is_compiled_again_where_another_backend_is_forced() -> None:
    seen: list[str] = []
    function, inputs = compiled_volume(seen), (torch.randn(1, 2, 3, 16), torch.randn(2, 1, 16))
    for name in ("torch", "triton", "torch", "triton"):
        with ovs.backend(name):
            function(*inputs)
        assert ovs.last_backend("cost_volume") == name
    function(*inputs)
    assert ovs.last_backend("cost_volume") == free()
    assert seen[:2] == ["torch", "kernel"]
    assert len(seen) <= 3  # once for each, "auto" may be told apart


@pytest.mark.usefixtures("on_cpu")
def test_threads_that_share_a_compiled_function_keep_their_backends() -> None:
    function, inputs = compiled_volume([]), (torch.randn(1, 2, 3, 16), torch.randn(2, 1, 16))
    ran = []

    def call() -> None:
        function(*inputs)
        ran.append(ovs.last_backend("cost_volume"))

    def other() -> None:
        call()
        with ovs.backend("torch"):
            call()

    with ovs.backend("triton"):
        call()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        call()
    assert ran == ["triton", free(), "torch", "triton"]


def test_nothing_hides_what_a_thread_has_forced_from_the_compiler() -> None:
    """Before 2.12 Dynamo reads an attribute of the class, if there is one, instead of the thread's own."""
    assert not hasattr(type(backends._forced), "name")


def test_backward_runs_where_the_forward_ran() -> None:
    image = torch.randn(1, 2, 3, 16, requires_grad=True)
    with ovs.backend("triton"):
        result = ovs.ops.cost_volume(image, torch.randn(2, 1, 16))
    with ovs.backend("torch"):
        result.sum().backward()
    assert ovs.last_backend("cost_volume") == "triton"
    assert image.grad is not None and image.grad.isfinite().all()


@pytest.mark.parametrize("name", ["Triton", "", "gpu"])
def test_an_unknown_backend_is_refused(name: str) -> None:
    with (
        pytest.raises(ValueError, match=f"^backend must be one of auto, cuda, triton, cpu, torch, got '{name}'.$"),
        ovs.backend(name),
    ):
        pass


def test_an_unknown_operator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^there is no operator 'costs'; there are class_aggregation, .*\.$"):
        ovs.last_backend("costs")


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    for name in ("cuda", "triton", "cpu"):
        reason = backends.refusal("cost_volume", name, "cpu", None, torch.float64, True)
        assert reason
        with ovs.backend(name), pytest.raises(RuntimeError) as caught:
            volume(torch.float64)
        assert str(caught.value) == f"cost_volume: the {name} backend was asked for but cannot run: {reason}."


@pytest.mark.usefixtures("cpu_library")
def test_a_forced_backend_is_checked_for_inference_or_training() -> None:
    """The kernels for CPUs lack an operator that only training calls."""
    device = torch.device("cpu")
    with ovs.backend("cpu"):
        assert ovs.explain(device).choices["mask_losses"] is None
        backends.check(device)
        with pytest.raises(RuntimeError, match=r"^training: the cpu backend .* for inference, without gradients\.$"):
            backends.check(device, training=True)
    for name in ("auto", "torch"):
        with ovs.backend(name):
            backends.check(device)
            backends.check(device, training=True)
    with ovs.backend("cuda"):
        for training in (False, True):
            with pytest.raises(RuntimeError, match=r"^\w+: the cuda backend was asked for but cannot run: [^.]*\.$"):
                backends.check(device, training=training)


def test_only_training_calls_the_operators_of_training() -> None:
    folder = Path(ovs.__file__).parent
    for operator in backends.OF_TRAINING:
        assert operator in ovs.ops.__all__
        callers = {path.name for path in folder.rglob("*.py") if f"ops.{operator}(" in path.read_text("utf-8")}
        assert callers == {"losses.py"}


def test_bad_input_is_refused_before_the_choice() -> None:
    for name in ("cuda", "triton", "cpu", "torch"):
        with ovs.backend(name), pytest.raises(ValueError, match="cost_volume: T must be at least 1"):
            ovs.ops.cost_volume(torch.randn(1, 2, 3, 16), torch.randn(0, 1, 16))


def test_each_choice_is_logged_once_with_its_reasons(caplog: pytest.LogCaptureFixture) -> None:
    backends._say.cache_clear()
    with caplog.at_level(logging.INFO, "ovseg_fast"), ovs.backend("auto"):
        for dtype in (torch.float32, torch.float32, torch.float64):
            volume(dtype)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines)) == 2
    for line, name in zip(lines, (free(), "torch"), strict=True):
        assert line.startswith(f"cost_volume runs on {name}; cuda: ") and "; triton: " in line
    assert "float64" in lines[1] and "float64" not in lines[0]


def test_explain_names_every_operator_its_choice_and_the_reasons() -> None:
    explanation = ovs.explain("cpu")
    on_cpu = set(backends.operators_with_kernels("cpu")) if native.problem("cpu") is None else set()
    assert explanation.choices == {name: "cpu" if name in on_cpu else "torch" for name in explanation.choices}
    assert {"cost_volume", "label_map"} <= set(explanation.choices) <= set(ovs.ops.__all__)
    table = str(explanation)
    for operator, reasons in explanation.reasons.items():
        assert operator in table
        assert reasons["torch"] is None
        assert all(reasons[name] in table for name in ("cuda", "triton"))
        assert reasons["cpu"] is None or reasons["cpu"] in table


def test_explain_of_a_forced_backend_that_cannot_run(use_library: Callable, tmp_path: Path) -> None:
    use_library(tmp_path / "none.so")
    with ovs.backend("cuda"):
        explanation = ovs.explain("cpu")
    assert set(explanation.choices.values()) == {None}
    assert "An operator that nothing runs raises an error while cuda is asked for." in str(explanation)


def test_the_environment_chooses_and_the_context_overrides_it() -> None:
    code = """
        import torch, ovseg_fast as ovs
        image, text = torch.randn(1, 2, 3, 16), torch.randn(2, 1, 16)
        ovs.ops.cost_volume(image, text)
        print(ovs.last_backend("cost_volume"))
        with ovs.backend("torch"):
            ovs.ops.cost_volume(image, text)
        print(ovs.last_backend("cost_volume"))
    """
    assert run(code, OVSEG_BACKEND="triton", TRITON_INTERPRET="1").split() == ["triton", "torch"]


def test_a_bad_environment_is_told_at_the_first_use_and_not_at_import() -> None:
    code = """
        import torch, ovseg_fast as ovs
        try:
            ovs.ops.cost_volume(torch.randn(1, 2, 3, 16), torch.randn(2, 1, 16))
        except ValueError as error:
            print(error)
    """
    expected = "OVSEG_BACKEND must be one of auto, cuda, triton, cpu, torch, got 'gpu'."
    assert run(code, OVSEG_BACKEND="gpu").strip() == expected


INFO = "from ovseg_fast.cli.info import report; print(report())"


@pytest.mark.usefixtures("on_cpu")
def test_info_without_triton() -> None:
    # A finder that finds no triton stands for a machine without it.
    hide = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)
from importlib import util
find = util.find_spec
util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
"""
    report = run(hide + INFO)
    assert "triton is not installed" in report
    assert report.count("runs") == len(ovs.explain("cpu").choices)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Other versions of triton and numpy than those that are installed."""
    checks = (backends._triton_refusal, backends.interpreter_refusal)

    def versions(**installed: str) -> None:
        find = backends.metadata.version
        monkeypatch.setattr(backends.metadata, "version", lambda name: installed.get(name) or find(name))
        if "triton" in installed:
            monkeypatch.setattr("triton.__version__", installed["triton"])
        for check in checks:
            check.cache_clear()

    yield versions
    monkeypatch.undo()
    for check in checks:
        check.cache_clear()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("version", "runs"),
    [("2.3.1", False), ("3.2.0", False), ("3.3.1+git123", False), ("3.4.0", True), ("3.10.0", True), ("4.0", True)],
)
def test_a_triton_that_does_not_compile_the_kernels_is_refused(versions: Callable, version: str, runs: bool) -> None:
    versions(triton=version, numpy="2.3.5")
    reason = None if runs else f"its kernels need triton 3.4 or newer, this is {version}"
    assert backends.refusal("cost_volume", "triton", "cpu", None, torch.float32, True) == reason
    if not runs:
        with (
            ovs.backend("triton"),
            pytest.raises(RuntimeError, match=r"cost_volume: the triton backend .* 3\.4 or newer"),
        ):
            volume()
        volume()
        assert ovs.last_backend("cost_volume") == free()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [("3.6.0", "2.4.6", False), ("3.6.0", "2.10.0", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.4.6", True)],
)
def test_an_interpreter_that_cannot_work_with_this_numpy_is_refused(
    versions: Callable, triton: str, numpy: str, runs: bool
) -> None:
    versions(triton=triton, numpy=numpy)
    reason = backends.refusal("cost_volume", "triton", "cpu", None, torch.float32, True)
    expected = f"the interpreter of triton {triton} needs a numpy older than 2.4, this is {numpy}"
    assert reason == (None if runs else expected)


@pytest.mark.usefixtures("on_cpu")
def test_info_with_triton_and_no_gpu() -> None:
    report = run(INFO, TRITON_INTERPRET=None)
    assert "operators on cpu tensors (backend: auto)" in report
    assert "the tensors are on the CPU" in report
    assert "not available: " in report  # the GPU


@pytest.mark.usefixtures("on_cpu")
def test_info_with_a_forced_library_that_is_not_there(tmp_path: Path) -> None:
    report = run(INFO, OVSEG_BACKEND="cuda", OVSEG_NATIVE_LIBRARY=str(tmp_path / "none.so"))
    assert "operators on cpu tensors (backend: cuda)" in report
    assert "An operator that nothing runs raises an error while cuda is asked for." in report
    assert re.search(
        r"libovseg +OVSEG_NATIVE_LIBRARY names .*none.so, which does not exist; unset or correct it", report
    )


def test_info_with_an_emulated_library(emulated_library: Path) -> None:
    report = run(INFO, OVSEG_NATIVE_LIBRARY=str(emulated_library))
    assert re.search(r"libovseg +libovseg-emulated.so: emulates a GPU on the CPU, for tests", report)


def test_info_says_what_the_library_was_built_for(
    use_library: Callable, emulated_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_library(emulated_library)
    monkeypatch.setattr(native, "architectures", cache(lambda: (80, 90, 120)))
    monkeypatch.setattr(native, "VERIFIED", frozenset())
    kernels = ", ".join(backends.operators_with_kernels("cuda"))
    assert info.native_library() == f"built for compute capability 8.0, 9.0, 12.0; no GPU has verified {kernels} yet"
    monkeypatch.setattr(native, "VERIFIED", frozenset(backends.operators_with_kernels("cuda")))
    assert info.native_library() == "built for compute capability 8.0, 9.0, 12.0"


def test_info_says_what_the_cpu_kernels_run_on(cpu_library: Path) -> None:
    code = "import torch; torch.set_num_threads({}); " + INFO
    assert re.search(rf"libovseg_cpu +{native.isa()}, 2 threads\n", run(code.format(2)))
    report = run(code.format(1), OVSEG_CPU_ISA="avx9")
    assert re.search(r"libovseg_cpu +OVSEG_CPU_ISA is 'avx9'; this machine runs ", report)


def test_info_with_a_cpu_library_that_is_not_there(tmp_path: Path) -> None:
    report = run(INFO, OVSEG_CPU_LIBRARY=str(tmp_path / "none.so"))
    said = r"OVSEG_CPU_LIBRARY names .*none.so, which does not exist; unset or correct it"
    assert re.search(rf"libovseg_cpu +{said}", report)
    assert re.search(rf"\[\d+\] {said}", report)


def test_info_with_a_bad_environment() -> None:
    assert "OVSEG_BACKEND must be one of auto, cuda, triton, cpu, torch, got 'gpu'." in run(INFO, OVSEG_BACKEND="gpu")


def test_tensors_made_under_inference_mode_cannot_take_part_in_gradients() -> None:
    with torch.inference_mode():
        image = torch.randn(1, 2, 3, 16)
    text = torch.randn(2, 1, 16, requires_grad=True)
    for name in ("triton", "torch"):
        with ovs.backend(name):
            with pytest.raises(
                ValueError, match=r"^cost_volume: image was made under torch.inference_mode\(\) .* text; [^.]*"
            ):
                ovs.ops.cost_volume(image, text)
            with torch.inference_mode():  # weights that could have gradients are welcome where none are taken
                assert not ovs.ops.cost_volume(image, text).requires_grad
