"""Kills training, evaluation and segmentation at random moments, starts them again, and compares with undisturbed runs.

After each kill, what lies on disk is whole, and no progress that was saved is lost. In the end weights, log, pictures,
scores and labels are those of an undisturbed run, each validation was made once, and nothing else was left behind.
Processes are forked from one that has imported everything, so that most kills hit the work and not the imports.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ovseg_fast import checkpoints
from ovseg_fast.cli import main as command
from ovseg_fast.evaluation import evaluate as evaluation
from ovseg_fast.training import run as training_run
from ovseg_fast.training.state import State

FORK = multiprocessing.get_context("fork")
CLASSES = ("red", "green", "blue")
MODEL = "catseg-tiny"
TEMPORARY = ".ovseg-"  # start of the names of files that are not whole yet
TRAINING = """model = "{model}"\nout = "{out}"\nsteps = 9\nbatch = 2\nworkers = {workers}\nlog_every = 1
checkpoint_every = 2\nevaluate_every = 3\npictures = 1\nlearning_rate = 1e-3\npolicy = "full"
[data]\ndataset = "folder"\nroot = "data"\n[validation]\ndataset = "folder"\nroot = "data"\nlimit = 2\n"""


@dataclass
class Kind:
    """A command that is killed: how it is called with an output folder; what its results are, as text by name; and how
    much it has done, as it is on disk, with every file checked to be whole."""

    arguments: Callable[[Path], list[str]]
    results: Callable[[Path], dict[str, str]]
    done: Callable[[Path], int]
    seconds: float = 0.0  # that an undisturbed run takes
    expected: dict[str, str] = field(default_factory=dict)
    kills: int = 0
    finished: int = 0
    failures: list[str] = field(default_factory=list)


def make_data(folder: Path, count: int = 10) -> None:
    draw = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        labels = np.repeat(draw.permutation(3)[:2], 48).astype(np.uint8)[None].repeat(96, 0)
        pixels = np.eye(3)[labels] * 200 + draw.normal(30, 10, (96, 96, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/{number}.png")
        Image.fromarray(labels).save(folder / f"masks/{number}.png")
    (folder / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def training(out: Path) -> list[str]:
    file = Path(f"{out.name}.toml")
    file.write_text(TRAINING.format(model=MODEL, out=out, workers=random.choice([0, 1])), encoding="utf-8")
    return ["train", "--quiet", str(file)]


def trained(out: Path) -> dict[str, str]:
    tensors, _ = checkpoints.read(out / training_run.WEIGHTS)
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    pictures = {path.name: digest(path) for path in sorted((out / "pictures").iterdir())}
    return {"weights": content.hexdigest(), "log": (out / "log.jsonl").read_text(encoding="utf-8"), **pictures}


def steps_saved(out: Path) -> int:
    if (out / training_run.WEIGHTS).exists():
        checkpoints.read(out / training_run.WEIGHTS)
    for picture in (out / "pictures").glob("step_*.png"):
        Image.open(picture).load()
    path = out / training_run.CHECKPOINT
    return State.load(path).step if path.exists() else 0


def evaluating(out: Path) -> list[str]:
    options = ["--dataset", "folder", "--root", "data", "--mode", "whole", "--out", str(out / "result.json")]
    return ["evaluate", MODEL, "--quiet", "--device", "cpu", *options]


def evaluated(out: Path) -> dict[str, str]:
    stored = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return {name: json.dumps(stored[name]) for name in ("metrics", "classes", "images", "absent_classes", "settings")}


def images_saved(out: Path) -> int:
    if (out / "result.json").exists():
        json.loads((out / "result.json").read_text(encoding="utf-8"))
    path = out / "result.partial.npz"
    if not path.exists():
        return 0
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with np.load(path) as file:
        return int(file["done"].sum())


def segmenting(out: Path) -> list[str]:
    options = ["--classes", ", ".join(CLASSES), "--model", MODEL, "--mode", "whole", "--device", "cpu"]
    return ["segment", "--quiet", str(Path("data", "images")), *options, "--out", str(out)]


def segmented(out: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in sorted(out.iterdir()) if not path.name.startswith(".")}


def files_written(expected: dict[str, str], out: Path) -> int:
    """Each is whole: as an undisturbed run writes it."""
    written = segmented(out) if out.exists() else {}
    broken = [name for name, content in written.items() if expected and expected.get(name) != content]
    assert not broken, f"{broken} are not as an undisturbed run writes them"
    return len(written)


def start(arguments: list[str]) -> multiprocessing.process.BaseProcess:
    """The command in a process of its own; what it prints goes to a file."""

    def run() -> None:
        with open("output.txt", "w", encoding="utf-8") as output:
            for number in (1, 2):
                os.dup2(output.fileno(), number)
            random.seed()
            try:
                command(arguments)
            except SystemExit as error:
                os._exit(error.code if isinstance(error.code, int) else int(bool(error.code)))
            except BaseException:
                traceback.print_exc()
                os._exit(70)

    process = FORK.Process(target=run)
    process.start()
    return process


def printed() -> str:
    lines = Path("output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " | ".join(lines[-3:])


def left_over(out: Path, expected: set[str]) -> list[str]:
    """Temporary files anywhere, and names that an undisturbed run does not leave."""
    names = [path.name for path in out.iterdir() if path.name not in expected]
    return names + [str(path) for path in out.rglob(f"{TEMPORARY}*")]


def torture(name: str, kind: Kind, kills: int) -> None:
    whole = Path(f"{name}-whole")
    began = time.monotonic()
    process = start(kind.arguments(whole))
    process.join()
    kind.seconds = time.monotonic() - began
    if process.exitcode:
        kind.failures.append(f"the undisturbed run ended with {process.exitcode}: {printed()}")
        return
    kind.expected = kind.results(whole)
    if name == "segment":
        kind.done = functools.partial(files_written, kind.expected)
    names = {path.name for path in whole.iterdir()}
    out = Path(f"{name}-killed")
    while kind.kills < kills and len(kind.failures) < 5:
        saved = 0
        deaths = random.choice([1, 2, 3, 4])  # of this run, before it is let to end
        while True:
            process = start(kind.arguments(out))
            if deaths > 0 and kind.kills < kills:
                process.join(random.uniform(0, kind.seconds))
                if process.exitcode is None:
                    os.kill(process.pid or 0, signal.SIGKILL)
                    kind.kills += 1
                    deaths -= 1
            process.join()
            if process.exitcode != -signal.SIGKILL:
                break
            try:
                before, saved = saved, kind.done(out)
                assert saved >= before, f"{before} were saved, now {saved}"
            except Exception as error:
                kind.failures.append(f"after kill {kind.kills}: {type(error).__name__}: {error}")
                break
        if process.exitcode:
            kind.failures.append(f"after kill {kind.kills}, it ended with {process.exitcode}: {printed()}")
        else:
            kind.finished += 1
            found = kind.results(out)
            wrong = [key for key in kind.expected.keys() | found.keys() if kind.expected.get(key) != found.get(key)]
            if wrong:
                kind.failures.append(f"after kill {kind.kills}, other {', '.join(sorted(wrong))} than undisturbed")
            if rest := left_over(out, names):
                kind.failures.append(f"after kill {kind.kills}, left behind: {', '.join(rest)}")
        shutil.rmtree(out)


def main(count: int = 60) -> int:
    """Kill `count` times, a third each; prints a table, returns 1 if anything was lost, half-written or different."""
    torch.set_num_threads(1)
    evaluation.SAVE_SECONDS = 0.0  # or a run is over before it has saved anything
    kinds = {
        "train": Kind(training, trained, steps_saved),
        "evaluate": Kind(evaluating, evaluated, images_saved),
        "segment": Kind(segmenting, segmented, lambda out: 0),
    }
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            make_data(Path("data"))
            for number, (name, kind) in enumerate(kinds.items()):
                torture(name, kind, (count + number) // len(kinds))
        finally:
            os.chdir(before)
    print(f"{'command':<10}{'seconds':>9}{'kills':>7}{'finished':>10}{'failures':>10}")
    for name, kind in kinds.items():
        print(f"{name:<10}{kind.seconds:>9.1f}{kind.kills:>7}{kind.finished:>10}{len(kind.failures):>10}")
    failures = [f"{name}: {failure}" for name, kind in kinds.items() for failure in kind.failures]
    print("\n".join(failures) or "nothing was lost, half-written or different.")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2])))
