"""What a busy neighbour costs: the CAT-Seg-B head and the whole model, float32, alone and beside a process of our own
that keeps one core busy.

    python benchmarks/busy_neighbour.py [--classes 171] [--rounds 5] [--form torch] [--out FILE]
    python benchmarks/busy_neighbour.py --smoke     a small model and one round, to try this script

Forms: "torch" (the PyTorch forms) and "cpu" (the kernels for CPUs, and PyTorch where there is none).
All measurements are taken by turns in one process: in every round each form does each work alone, then beside the
neighbour, which is started for that one call and ended after it. The load of the machine before the run is written
down: figures of a machine that has something else to do say little.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import click
import torch
from head_forms import Head
from machine import ROOT, describe
from torch import Tensor

import ovseg_fast as ovs
from tolerances import REWRITE_FLOAT32, relative_error

FORMS = {"torch": "torch", "cpu": "auto"}  # form -> backend asked for
POOLING = 1  # of the class block, as in the published evaluation
# It ends by itself if this process is killed and cannot end it.
NEIGHBOUR = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
print("busy", flush=True)
while os.getppid() == int(sys.argv[2]):
    for _ in range(10**6):
        pass
"""


@contextmanager
def busy_neighbour() -> Iterator[subprocess.Popen[str]]:
    """A process that keeps the first of this process's cores busy while the block runs."""
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-S", "-c", NEIGHBOUR, str(core), str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "busy\n"
            yield process
        finally:
            process.kill()  # leaving the outer block waits for it


def works(classes: int, tiny: bool) -> dict[str, Callable[[str], Tensor]]:
    """Functions of a backend: the head on features of one image, and the whole model on one 384 × 384 image, with text
    embeddings given."""
    head = Head(classes, "cpu", torch.float32, tiny)
    model = head.model if tiny else ovs.build("catseg-vitb").eval()
    side = model.config.image_size
    image = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)

    def whole(backend: str) -> Tensor:
        with ovs.backend(backend):
            return model(image, head.text, POOLING)

    return {"head": lambda backend: head.package(POOLING, backend), "model": whole}


def measure(classes: int, rounds: int, forms: Sequence[str], tiny: bool) -> dict[str, Any]:
    """Work -> form -> seconds alone and disturbed, and how many times slower the second is."""
    samples: dict[tuple[str, str, str], list[float]] = {}
    run = works(classes, tiny)
    for work in run:  # warms up, too
        first, *others = (run[work](FORMS[form]) for form in forms)
        assert all(relative_error(other, first) <= REWRITE_FLOAT32 for other in others)
    for _, work, form in itertools.product(range(rounds), run, forms):
        for how, neighbour in (("alone", nullcontext), ("disturbed", busy_neighbour)):
            with neighbour():
                start = time.perf_counter()
                run[work](FORMS[form])
                seconds = time.perf_counter() - start
            samples.setdefault((work, form, how), []).append(seconds)
    results: dict[str, Any] = {}
    for (work, form, how), taken in samples.items():
        figures = {"median": statistics.median(taken), "min": min(taken), "max": max(taken)}
        rounded = {name: round(figure, 4) for name, figure in figures.items()}
        results.setdefault(work, {}).setdefault(form, {})[how] = rounded
    for rows in results.values():
        for row in rows.values():
            row["times_slower"] = round(row["disturbed"]["median"] / row["alone"]["median"], 2)
    return results


@click.command(help=__doc__)
@click.option("--classes", default=[20, 171], multiple=True, type=click.IntRange(1))
@click.option("--rounds", default=5, type=click.IntRange(1))
@click.option("--form", "forms", default=[*FORMS], multiple=True, type=click.Choice([*FORMS]))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "build" / "busy-neighbour.json")
@click.option("--smoke", is_flag=True)
@torch.inference_mode()
def main(classes: tuple[int, ...], rounds: int, forms: tuple[str, ...], out: Path, smoke: bool) -> None:
    if not hasattr(os, "sched_setaffinity"):
        raise click.ClickException("this system cannot bind a process to a core, which the neighbour needs.")
    found: dict[str, Any] = {"machine": describe(), "rounds": 1 if smoke else rounds, "class_pooling": POOLING}
    for count in (3,) if smoke else classes:
        found[f"{count} classes"] = measured = measure(count, found["rounds"], forms, smoke)
        for work, rows in measured.items():
            for form, row in rows.items():
                alone, disturbed = row["alone"]["median"], row["disturbed"]["median"]
                print(
                    f"{work:<6}{count:>5} classes  {form:<6}{alone:8.3f} s alone {disturbed:8.3f} s disturbed "
                    f"{row['times_slower']:6.2f} times slower",
                    flush=True,
                )
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
