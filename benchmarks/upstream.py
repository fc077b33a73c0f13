"""The published code of both methods beside this package's: the same weights, the same inputs, one process, by turns.

    python benchmarks/upstream.py --catseg PATH --cascade PATH [--classes 171] [--work head] [--rounds 3] [--busy]
    python benchmarks/upstream.py --catseg PATH --smoke     a small head and one round, to try this script

PATH: checkouts of github.com/KU-CVLAB/CAT-Seg and github.com/HVision-NKU/Cascade-CLIP, whose files are imported and
not changed. What they need beside this package's own needs (einops for CAT-Seg) may lie in another folder, --libs.

Works, on one image, with text embeddings given and random weights:
- "head": the CAT-Seg-B head at 384 × 384, class pooling 1 as in the published evaluation;
- "model": CAT-Seg-B from the image to probabilities at the head's size, class pooling 1;
- "cascade": Cascade-CLIP-B (COCO-Stuff) at 512 × 512, from the normalised image to mask logits of its size.

Forms: "published" in float32; "torch", the PyTorch forms in float32; "kernels", those for CPUs (and PyTorch where there
is none), in float32 and bfloat16. Before anything is timed, every form's result is compared with the published one, on
the tensors that are timed. With --busy every form also runs beside a process of our own that keeps one core busy.
Seconds are those on the clock and those of all processors in this process, which other processes disturb less.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import click
import published
import torch
import torch.nn.functional as F
from busy_neighbour import POOLING, busy_neighbour
from head_forms import Head
from machine import ROOT, describe
from published import CASCADE_CLIP, CATSEG, Repository
from torch import Tensor

import ovseg_fast as ovs
from tolerances import REWRITE_FLOAT32, relative_error

FORMS = {  # name -> backend asked for, and dtype
    "torch float32": ("torch", torch.float32),
    "kernels float32": ("auto", torch.float32),
    "kernels bfloat16": ("auto", torch.bfloat16),
}
DTYPES = (torch.float32, torch.bfloat16)
AGGREGATOR = ("cost_embedding", "spatial_aggregation", "class_aggregation", "upsampling_decoder")


class Work(NamedTuple):
    """`theirs` is the published form, `ours` a function of the dtype, run by the operators named."""

    theirs: Callable[[], Tensor]
    ours: Callable[[torch.dtype], Tensor]
    operators: tuple[str, ...]


def head(checkout: Path, classes: int, tiny: bool) -> Work:
    heads = {dtype: Head(classes, "cpu", dtype, tiny) for dtype in DTYPES}  # seeded: the same but for rounding
    first = heads[torch.float32]
    image, *maps = first.upstream
    theirs = published.catseg_head(checkout, first.model, POOLING)

    def ours(dtype: torch.dtype) -> Tensor:
        mine = heads[dtype]
        return mine.model.aggregator(mine.image, mine.text, mine.appearance, POOLING)

    return Work(lambda: theirs(image, first.text[None], [image, *maps]), ours, AGGREGATOR)


def model(checkout: Path, classes: int, tiny: bool) -> Work:
    models, image, text = _inputs("catseg-vitb", classes)
    theirs = published.catseg(checkout, models[torch.float32], text.unsqueeze(1), POOLING)

    def ours(dtype: torch.dtype) -> Tensor:
        logits = models[dtype](image, text.unsqueeze(1).to(dtype), POOLING)
        logits.sigmoid()  # the published model ends with probabilities
        return logits

    return Work(lambda: theirs(image[0]), ours, ("encoder_block", *AGGREGATOR))


def cascade(checkout: Path, classes: int, tiny: bool) -> Work:
    models, image, text = _inputs("cascade-clip-vitb", classes)
    first = models[torch.float32]
    theirs = published.cascade_clip(checkout, first)
    normalised = first.normalise(image.float())
    return Work(
        lambda: theirs(normalised, text),
        lambda dtype: models[dtype](image, text.to(dtype)),
        ("encoder_block", "layer_gather", "mask_attention"),
    )


WORKS = {"head": (CATSEG, head), "model": (CATSEG, model), "cascade": (CASCADE_CLIP, cascade)}


def _inputs(name: str, classes: int) -> tuple[dict[torch.dtype, Any], Tensor, Tensor]:
    """The model in each dtype, an image (1, 3, s, s) and unit-length text embeddings (T, E)."""
    torch.manual_seed(classes)
    first = ovs.build(name).eval()
    for parameter in first.parameters():
        if parameter.dim() == 1:  # biases and norms start at zero or one; give every term a share
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    side = first.config.image_size
    image = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    text = F.normalize(torch.randn(classes, first.text_encoder.embed_dim), dim=-1)
    return {dtype: copy.deepcopy(first).to(dtype) for dtype in DTYPES}, image, text


def check(work: Work) -> dict[str, dict[str, Any]]:
    """Form -> its error against the published result, and which backends ran. Warms up, too."""
    truth = work.theirs()
    rows: dict[str, dict[str, Any]] = {"published": {}}
    for form, (backend, dtype) in FORMS.items():
        with ovs.backend(backend):
            error = relative_error(work.ours(dtype).float(), truth)
        if dtype == torch.float32 and not error <= REWRITE_FLOAT32:
            raise click.ClickException(
                f"'{form}' is off from the published result by {error:.1e}, more than {REWRITE_FLOAT32:.0e}: not timed."
            )
        ran = {operator: ovs.last_backend(operator) for operator in work.operators}
        rows[form] = {"error": float(f"{error:.2g}"), "backends": ran}
    return rows


def measure(work: Work, rounds: int, busy: bool) -> dict[str, dict[str, Any]]:
    """Form -> error, and alone and beside the neighbour: median, least and most seconds, and the gain over the
    published form in the same surroundings."""
    rows = check(work)
    surroundings = {"alone": nullcontext} | ({"busy": busy_neighbour} if busy else {})
    samples: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _, form, (how, neighbour) in itertools.product(range(rounds), rows, surroundings.items()):
        backend, dtype = FORMS.get(form, ("torch", torch.float32))
        with neighbour(), ovs.backend(backend):
            wall, cpu = time.perf_counter(), time.process_time()
            work.theirs() if form == "published" else work.ours(dtype)
            taken = time.perf_counter() - wall, time.process_time() - cpu
        samples.setdefault((form, how), []).append(taken)
    for (form, how), taken_by_round in samples.items():
        rows[form][how] = row = {}
        for clock, taken in zip(("wall", "cpu"), zip(*taken_by_round, strict=True), strict=True):
            figures = {"median": statistics.median(taken), "min": min(taken), "max": max(taken)}
            row[clock] = {name: round(figure, 4) for name, figure in figures.items()}
            theirs = rows["published"][how][clock]["median"]
            row[clock]["gain"] = round(theirs / figures["median"], 2)
    return rows


def checked(repository: Repository, path: Path | None, option: str) -> Path | None:
    """The path, which must be a checkout of the repository if it was given."""
    if path is not None and not (path / repository.mark).is_file():
        what = f"'{path}' is no checkout of {repository.name}: it has no {repository.mark}."
        raise click.BadParameter(what, param_hint=option)
    return path


def commit(path: Path) -> str:
    command = ["git", "-C", str(path), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


@click.command(help=__doc__)
@click.option("--catseg", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--cascade", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--libs", type=click.Path(exists=True, file_okay=False), help="Folder of packages that they need.")
@click.option("--classes", default=171, type=click.IntRange(1))
@click.option("--work", "names", multiple=True, type=click.Choice([*WORKS]), help="By default all whose PATH is given.")
@click.option("--rounds", default=3, type=click.IntRange(1))
@click.option("--busy", is_flag=True, help="Also beside a busy process.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "build" / "upstream.json")
@click.option("--smoke", is_flag=True)
@torch.inference_mode()
def main(
    catseg: Path | None,
    cascade: Path | None,
    libs: str | None,
    classes: int,
    names: tuple[str, ...],
    rounds: int,
    busy: bool,
    out: Path,
    smoke: bool,
) -> None:
    given = {CATSEG: checked(CATSEG, catseg, "--catseg"), CASCADE_CLIP: checked(CASCADE_CLIP, cascade, "--cascade")}
    paths = {repository: path for repository, path in given.items() if path is not None}
    names = names or (("head",) if smoke else tuple(name for name in WORKS if WORKS[name][0] in paths))
    missing = {WORKS[name][0].name for name in names if WORKS[name][0] not in paths}
    if missing or not names:
        which = " and ".join(sorted(missing)) or f"{CATSEG.name} or {CASCADE_CLIP.name}"
        raise click.UsageError(f"give a checkout of {which}, with --catseg or --cascade.")
    if busy and not hasattr(os, "sched_setaffinity"):
        raise click.UsageError("this system cannot bind a process to a core, which --busy needs.")
    if libs is not None:
        sys.path.append(libs)
    found: dict[str, Any] = {
        "machine": describe(),
        "published": {repository.name: commit(path) for repository, path in paths.items()},
        "rounds": 1 if smoke else rounds,
        "classes": 3 if smoke else classes,
        "class_pooling": POOLING,
    }
    for name in names:
        repository, build = WORKS[name]
        try:
            work = build(paths[repository], found["classes"], smoke)
        except ImportError as error:
            raise click.UsageError(lacking(repository, error)) from error
        found[name] = rows = measure(work, found["rounds"], busy)
        found["load_after"] = [round(load, 2) for load in os.getloadavg()]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        report(name, rows)


def lacking(repository: Repository, error: ImportError) -> str:
    """One sentence: what the published code needs."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return (
            f"the code of {repository.name} needs {package}: run 'pip install --no-deps --target FOLDER {package}' and "
            "give --libs FOLDER."
        )
    return f"the code of {repository.name} cannot be imported: {' '.join(str(error).split())}."


def report(name: str, rows: dict[str, dict[str, Any]]) -> None:
    for (form, row), how in itertools.product(rows.items(), ("alone", "busy")):
        if how not in row:
            continue
        wall, cpu = row[how]["wall"], row[how]["cpu"]
        print(
            f"{name:<8} {form:<16} {how:<5} {wall['median']:8.3f} s {wall['gain']:6.2f} x   "
            f"{cpu['median']:8.3f} CPU s {cpu['gain']:6.2f} x   error {row.get('error', 0):.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
