"""Each operator on the CPU, at its published size: the literal form, the PyTorch form, that one compiled, the kernel.

    python benchmarks/cpu_operators.py [-k TEXT] [--dtype float32] [--rounds 5] [--threads 1] [--compiled] [--out FILE]
    python benchmarks/cpu_operators.py -k "many names"     10,000 names against 256
    python benchmarks/cpu_operators.py --smoke     a small call, to try this script

The kernel is checked against the PyTorch form in float32, then all are timed by turns in one process: CPU seconds of
the calling thread, which other processes disturb less than wall time; with more than one thread, wall time. The
GFLOP/s are those of the products that a call needs (`work.py`); beside them stands the rate of PyTorch's own products,
timed in the same process.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import click
import torch
from machine import ROOT, describe
from work import work

import ovseg_fast as ovs
from counterparts import COUNTERPARTS, counterpart
from ovseg_fast import ops
from samples import Call, Sample, map_floating, select, tensors
from tolerances import ARGMAX_AGREEMENT, KERNEL, relative_error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRODUCTS = [(144, 128, 384), (144, 128, 512), (2304, 128, 384), (1024, 1024, 1024)]  # rows, depth, columns


def rows(text: str, smoke: bool) -> list[Sample]:
    if smoke:
        return [row for row in select("odd") if row.operator == "cost_volume"][:2]
    choices = ovs.explain("cpu").choices
    no_kernel = "full attention"  # of class_aggregation
    found = [row for row in select("bench") if choices[row.operator] == "cpu" and no_kernel not in row.name]
    return [row for row in found if text in row.id]


def forms(row: Sample, call: Call, dtype: torch.dtype, compiled: bool) -> dict[str, Callable[[], Any]]:
    def under(backend: str, function: Callable[[Call], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with ovs.backend(backend):
                return function(call)

        return run

    found = {}
    if dtype == torch.float32 and row.function in COUNTERPARTS:
        found["literal"] = counterpart(row.function, call).run
    found["torch"] = under("torch", row.run)
    if compiled:
        found["compiled"] = under("torch", torch.compile(row.run))
    return found | {"kernel": under("cpu", row.run)}


def error_of(row: Sample, result: Any, expected: Any) -> float:
    """The largest relative error, or of label maps the share of other labels."""
    if row.function == "label_map":
        return float((result != expected).float().mean())
    pairs = zip(tensors(result), tensors(expected), strict=True)
    return max(relative_error(ours, theirs) for ours, theirs in pairs if ours.is_floating_point())


def limit(row: Sample, dtype: torch.dtype) -> float:
    return 1 - ARGMAX_AGREEMENT if row.function == "label_map" else KERNEL[dtype]


def timed(runs: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each, by turns."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            samples[name].append(clock() - start)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def product_rate(dtype: torch.dtype, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """GFLOP/s of PyTorch's products by size, one thread or several."""
    found = {}
    for size in PRODUCTS:
        a, b = torch.randn(size[:2]).to(dtype), torch.randn(size[1:]).to(dtype)
        repeats = max(1, int(2e9 / (2 * size[0] * size[1] * size[2])))

        def run(a: torch.Tensor = a, b: torch.Tensor = b, repeats: int = repeats) -> None:
            for _ in range(repeats):
                a @ b

        run()
        operations = 2 * size[0] * size[1] * size[2] * repeats
        found[" x ".join(map(str, size))] = round(operations / timed({"": run}, rounds, clock)[""] / 1e9, 1)
    return found


def measure(row: Sample, dtype: torch.dtype, rounds: int, compiled: bool, clock: Callable[[], float]) -> dict[str, Any]:
    call = row.build(torch.Generator().manual_seed(0), dtype)
    runs = forms(row, call, dtype, compiled)
    results = {name: run() for name, run in runs.items()}
    if "literal" in results:
        results["literal"] = counterpart(row.function, call).to_ours(results["literal"])
    with ovs.backend("torch"):  # in float32, where two forms round alike
        expected = row.run(map_floating(torch.Tensor.float, call))
    errors = {name: error_of(row, result, expected) for name, result in results.items()}
    assert errors["kernel"] <= limit(row, dtype), f"{row.id}: the kernel is wrong by {errors['kernel']:.1e}"
    _, operations = work(row, call, results["kernel"])
    seconds = timed(runs, rounds, clock)
    return {
        "seconds": {name: round(taken, 6) for name, taken in seconds.items()},
        "gain_over_torch": round(seconds["torch"] / seconds["kernel"], 2),
        "kernel_gflops": round(operations / seconds["kernel"] / 1e9, 1),
        "errors": {name: float(f"{error:.1e}") for name, error in errors.items()},
    }


def many_names(rounds: int, clock: Callable[[], float], smoke: bool) -> dict[str, float]:
    """Times of a label map of many names, as multiples of one of as many as CAT-Seg computes, float32: by what share of
    the classes that a window keeps all windows keep, and the others no other window."""
    side, kept, names = (8, 4, 60) if smoke else (96, 256, 10_000)
    window, canvas = 4 * side, 4 * side + (16 * side) // 6
    places = [(top, left) for top in (0, canvas - window) for left in (0, canvas - window)]
    placement = ops.Placement(places, (window, window), (canvas, canvas), (canvas, canvas))
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(5, kept, side, side, generator=random)  # the last: of the whole image
    runs: dict[str, Callable[[], Any]] = {"": lambda: ops.label_map(logits[:4], placement, whole=logits[4:])}
    for share in (1.0, 0.5, 0.0):
        common, others = torch.randperm(names, generator=random).split([int(share * kept), names - int(share * kept)])
        own = others.split(max(1, kept - len(common)))
        classes = torch.stack([torch.cat([common, own[i][: kept - len(common)]]).sort().values for i in range(5)])
        maps = [ops.KeptLogits(logits[part], classes[part], names, -100.0) for part in (slice(4), slice(4, None))]
        runs[f"{share:.0%} shared"] = lambda maps=maps: ops.label_map(maps[0], placement, whole=maps[1])
    with ovs.backend("cpu"):
        seconds = timed(runs, rounds + 1, clock)
    return {name: round(taken / seconds[""], 2) for name, taken in seconds.items() if name}


@click.command(help=__doc__)
@click.option("-k", "text", default="", help="Only rows whose name holds this.")
@click.option("--dtype", "dtypes", default=[*DTYPES], multiple=True, type=click.Choice([*DTYPES]))
@click.option("--rounds", default=5, type=click.IntRange(1))
@click.option("--threads", default=1, type=click.IntRange(1))
@click.option("--compiled", is_flag=True, help="Time the compiled PyTorch form too; compiling takes minutes.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "build" / "cpu-operators.json")
@click.option("--smoke", is_flag=True)
@torch.inference_mode()
def main(text: str, dtypes: tuple[str, ...], rounds: int, threads: int, compiled: bool, out: Path, smoke: bool) -> None:
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    rounds = 1 if smoke else rounds
    found: dict[str, Any] = {"machine": describe(), "rounds": rounds, "seconds_of": "CPU" if threads == 1 else "wall"}
    found["product_gflops"] = {name: product_rate(DTYPES[name], rounds, clock) for name in dtypes}
    for row in rows(text, smoke):
        for name in dtypes:
            found[f"{row.id}, {name}"] = measured = measure(row, DTYPES[name], rounds, compiled, clock)
            times = "  ".join(f"{form} {seconds * 1e3:.1f}" for form, seconds in measured["seconds"].items())
            print(f"{row.id}, {name}: {times} ms, {measured['gain_over_torch']} x, {measured['kernel_gflops']} GFLOP/s")
        _write(found, out)
    if text in "many names":
        found["many names"] = many_names(rounds, clock, smoke)
        print("label map of 10,000 names, times one of 256:", found["many names"])
        _write(found, out)


def _write(found: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
