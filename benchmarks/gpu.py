"""Test every operator on a GPU, then time it. Run by `make gpu`.

    python benchmarks/gpu.py [--out FILE] [--minutes 20] [--only WORD] [--skip-tests]
    python benchmarks/gpu.py --smoke     a few small rows in Triton's interpreter, to try this script without a GPU

Forms: "cuda" and "triton" (the kernels), "eager" (the PyTorch form, whose plain attention is SDPA), "compile"
(torch.compile of it) and, for mask attention if it is installed, "xformers"; each forward, and forward with backward.
A form is timed only after its result was compared with the float64 PyTorch form. The results are written after every
row, so that an interrupted run keeps what it measured.

The CUDA C++ kernels are also run under compute-sanitizer on small sizes, and the largest under Nsight Compute, if these
tools are on PATH.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import click
import torch
from gpu_checks import profile_kernels, sanitize_kernels
from gpu_timing import Timer, ceilings
from head_forms import head_forms, training_forms
from work import PREDICTIONS, floor_us, prediction, work

import ovseg_fast as ovs
from ovseg_fast import backends, native, ops
from samples import Sample, map_tensors, select, tensors
from tolerances import KERNEL, relative_error

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TESTS = (
    "tests/test_kernels.py",
    "tests/native/test_library.py",
    "tests/native/test_functions.py",
    "tests/test_mlp.py",
    "tests/ops",
    "tests/layers",
    "tests/models",
)


class Run:
    """One run: its results so far, and when it ends."""

    def __init__(self, out: Path | None, minutes: float, smoke: bool) -> None:
        self.smoke, self.end = smoke, time.monotonic() + 60 * minutes
        self.device = "cpu" if smoke else "cuda"
        self.results: dict[str, Any] = {"machine": describe(smoke)}
        name = re.sub(r"[^a-z0-9]+", "-", self.results["machine"]["gpu"].lower()).strip("-")
        self.out = out or RESULTS / f"{name}.json"
        self.timer = Timer(self.device)

    def record(self, *path: str, value: Any) -> None:
        """Put a value at a place in the results and write the whole file."""
        node = self.results
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        partial.replace(self.out)

    def late(self) -> bool:
        return time.monotonic() > self.end


def describe(smoke: bool) -> dict[str, Any]:
    """The machine, versions and commit."""
    import triton

    commit = _output("git", "rev-parse", "HEAD")
    described = {
        "gpu": "interpreter" if smoke else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or "unknown",
        "uncommitted_changes": bool(_output("git", "status", "--porcelain")),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
    }
    if not smoke:
        major, minor = torch.cuda.get_device_capability()
        described |= {
            "capability": f"{major}.{minor}",
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    return described


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def run_tests(run: Run) -> None:
    """Test every operator, layer and model on the device, in another process."""
    selected = ["tests/test_kernels.py", "-k", "cost_volume-small"] if run.smoke else ["-m", "slow or not slow", *TESTS]
    command = [sys.executable, "-m", "pytest", "-q", *selected]
    start = time.monotonic()
    tested = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = tested.stdout.splitlines()
    summary = {
        "command": " ".join(["python", *command[1:]]),
        "result": lines[-1] if lines else tested.stderr[-300:],
        "seconds": round(time.monotonic() - start),
        "failed": [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))],
    }
    run.record("tests", value=summary)
    click.echo("\n  ".join([f"tests: {summary['result']}", *summary["failed"]]))


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, or why it failed: one form that fails must not cost the run the others."""
    try:
        return measure()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}


def forms(row: Sample, smoke: bool) -> dict[str, Callable[..., Any]]:
    """Name -> function of a call's arguments."""
    function = getattr(ops, row.function)

    def on(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def forced(*arguments: Any, **keywords: Any) -> Any:
            with ovs.backend(backend):
                return function(*arguments, **keywords)

        return forced

    torch.compiler.reset()
    found = {"triton": on("triton", function), "eager": on("torch", function)}
    if row.operator in backends.operators_with_kernels("cuda") and not native.problem():
        found = {"cuda": on("cuda", function), **found}
    if not smoke:
        found["compile"] = on("torch", torch.compile(function))
    if row.function == "mask_attention" and not smoke and util.find_spec("xformers"):
        found["xformers"] = on("torch", functools.partial(function, attention="xformers"))
    return found


def time_row(run: Run, row: Sample, dtype: torch.dtype, ceiling: dict[str, float]) -> None:
    """Check, then time each form of one row, forward and with backward."""
    call = row.build(torch.Generator().manual_seed(0), dtype, run.device)
    with torch.no_grad(), ovs.backend("torch"):
        wide = map_tensors(lambda t: t.double() if t.is_floating_point() else t, call)
        truth = tensors(row.run(wide))
    del wide
    expected = prediction(row) if dtype == torch.bfloat16 else None
    entry: dict[str, Any] = {"predicted": expected} if expected else {}
    leaves = map_tensors(lambda t: t.detach().requires_grad_(t.is_floating_point()), call)
    wanted = [leaf for leaf in tensors(leaves) if leaf.requires_grad]

    def timed(name: str, function: Callable[..., Any]) -> dict[str, Any]:
        def forward() -> Any:
            with torch.no_grad():
                return function(*call[0], **call[1])

        def step() -> Any:
            results = [r for r in tensors(function(*leaves[0], **leaves[1])) if r.requires_grad]
            return torch.autograd.grad(results, wanted, [torch.ones_like(r) for r in results], allow_unused=True)

        results = tensors(forward())
        error = max((_error(result, t) for result, t in zip(results, truth, strict=True)), default=0.0)
        if name in ("cuda", "triton") and not error <= KERNEL[dtype]:
            return {"wrong": error}
        form = {"error": error, "backend": backends.last_backend(row.operator), "forward": run.timer(forward)}
        if row.operator != "label_map":
            form["with_backward"] = run.timer(step) | {"peak_mb": run.timer.peak_memory(step)}
        for kind in ("forward", "with_backward"):
            if kind not in form:
                continue
            moved, operations = work(row, call, results, kind == "with_backward")
            floor = floor_us(moved, operations, ceiling)
            form[kind] |= {
                "bytes": moved,
                "flops": operations,
                "floor_us": round(floor, 2),
                "percent_of_floor": round(100 * floor / form[kind]["us"], 1),
            }
        return form

    for name, function in forms(row, run.smoke).items():
        entry[name] = attempt(functools.partial(timed, name, function))
    label = f"{row.id} {str(dtype).removeprefix('torch.')}"
    run.record("operators", label, value=entry)
    times = (f"{name} {_short(entry.get(name))}" for name in ("cuda", "triton", "compile", "eager"))
    click.echo(f"{label:<64}" + "  ".join(times))


def _error(result: torch.Tensor, truth: torch.Tensor) -> float:
    if not result.is_floating_point():  # labels: the share that differs; equal scores may fall either way
        return float((result != truth).double().mean())
    return relative_error(result, truth)


def _short(form: dict[str, Any] | None) -> str:
    if not form:
        return "-"
    if "forward" not in form:
        return "wrong" if "wrong" in form else "failed"
    backward = form.get("with_backward")
    return f"{form['forward']['us']:.1f}" + (f" / {backward['us']:.1f} µs" if backward else " µs")


def time_head(run: Run, classes: int) -> None:
    """The whole CAT-Seg-B head, bfloat16, batch 1, and a training step of it, in all forms."""
    dtype = torch.float32 if run.smoke else torch.bfloat16
    for pooling in (2, 1):
        found = head_forms(classes, pooling, run.device, dtype, run.smoke, not run.smoke)
        entry = {name: attempt(functools.partial(run.timer, function)) for name, function in found.items()}
        _record_head(run, "head", f"{classes} classes, pooling {pooling}", entry)

    def step(function: Callable[[], Any]) -> dict[str, Any]:
        return run.timer(function) | {"peak_mb": run.timer.peak_memory(function)}

    found = training_forms(classes, run.device, dtype, run.smoke)
    entry = {name: attempt(functools.partial(step, function)) for name, function in found.items()}
    _record_head(run, "training step of the head", f"{classes} classes, pooling 2", entry)


def _record_head(run: Run, kind: str, label: str, entry: dict[str, Any]) -> None:
    expected = PREDICTIONS["head"]
    predicted = {"predicted": expected} if (kind, label) == ("head", expected["row"]) else {}
    run.record(kind, label, value=predicted | entry)
    click.echo(f"{kind}, {label}: " + str({name: form.get("us", form) for name, form in entry.items()}))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Results file.  [default: benchmarks/results/<gpu>.json]")
@click.option("--minutes", default=20.0, show_default=True, help="No row starts after this time.")
@click.option("--only", default="", help="Only rows whose name contains this.")
@click.option("--skip-tests", is_flag=True, help="Only time.")
@click.option("--smoke", is_flag=True, help="A few small rows in the interpreter, without a GPU.")
def main(out: Path | None, minutes: float, only: str, skip_tests: bool, smoke: bool) -> None:
    """Test every operator on the GPU, then time it."""
    if smoke and os.environ.get("TRITON_INTERPRET") != "1":  # read when triton is first imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "1"})
    if not smoke and not torch.cuda.is_available():
        raise click.ClickException("PyTorch finds no GPU here; --smoke tries the script without one.")
    refused = backends.refusal("cost_volume", "triton", "cpu" if smoke else "cuda", None, None, True)
    if refused:
        raise click.ClickException(f"Triton's kernels cannot run here: {refused}.")
    run = Run(out, minutes, smoke)
    run.record("machine", value=run.results["machine"])
    click.echo(json.dumps(run.results["machine"], indent=1))
    if not skip_tests:
        run_tests(run)
        if not smoke:
            run.record("sanitizer", value=sanitize_kernels())
    ceiling = ceilings(run.timer)
    run.record("ceilings", value=ceiling)
    rows = select("small" if smoke else "bench")
    with_kernels = [row for row in rows if row.operator in backends.operators_with_kernels() and only in row.id]
    for dtype in (torch.bfloat16,) if smoke else (torch.bfloat16, torch.float32):
        for row in with_kernels:
            if row.function not in ("embed_volume", "guidance_term") and not run.late():
                time_row(run, row, dtype, ceiling)
    for classes in (2,) if smoke else (171, 20):
        if not run.late() and not only:
            time_head(run, classes)
    if not smoke and not run.late() and not only:
        run.record("profiles", value=profile_kernels())
    if run.late():
        run.record("stopped", value=f"after {minutes} minutes, before everything was measured")
    click.echo(f"written: {run.out}")
    if util.find_spec("matplotlib"):
        subprocess.run([sys.executable, ROOT / "benchmarks" / "plot.py", run.out], check=True)
    else:
        click.echo(f"no plots, matplotlib is not installed; later: python benchmarks/plot.py {run.out}")


if __name__ == "__main__":
    main()
