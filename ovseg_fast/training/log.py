"""What a run reports as it goes: a progress bar, TensorBoard, a file of JSON lines, pictures."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..files import write_whole
from ..visualize import overlay, palette

HEIGHT = 240  # of a row of pictures, in pixels
GAP = 6  # between pictures, in pixels
LINES, TENSORBOARD = "log.jsonl", "tensorboard"
VALIDATED = "miou"  # in every line of a validation, and in no other

logger = logging.getLogger(__name__)


class Log:
    """Losses and scores of a run, reported by its main process; `out` is None in all others.

    Losses are summed on their device and read only every `every` steps, since reading one waits for the GPU. The
    accelerator averages them over the processes.

    Attributes: `validated` the steps up to `first` of which the file already holds a validation."""

    def __init__(self, out: Path | None, accelerator: Any, first: int, steps: int, every: int, progress: bool) -> None:
        self.out, self.accelerator, self.every = out, accelerator, every
        self.bar = tqdm(total=steps, initial=first, unit="step", disable=not progress)
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.validated = set() if out is None else _keep_until(out / LINES, first)
        self.writer = None if out is None else self._tensorboard(_open_tensorboard, out / TENSORBOARD, first)

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self._tensorboard(self.writer.close)

    def step(self, step: int, losses: dict[str, Tensor], rate: float) -> None:
        """Add the losses of the step that has just ended, number `step` counted from 1."""
        self.bar.update()
        for name, loss in losses.items():
            self.sums[name] = self.sums[name] + loss if self.count else loss
        self.count += 1
        if step % self.every == 0:
            self.report(step, rate)

    def report(self, step: int, rate: float | None = None) -> None:
        """Write the mean losses since the last time. Raises FloatingPointError if one is not finite."""
        if not self.count:
            return
        values = torch.stack([loss.float() for loss in self.sums.values()]) / self.count
        means = dict(zip(self.sums, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        self.count = 0
        if not all(map(math.isfinite, means.values())):
            cure = "lower learning_rate, or use precision fp32 or bf16."
            raise FloatingPointError(f"the loss is {means} at step {step}: {cure}")
        self.bar.set_postfix({name: f"{mean:.4g}" for name, mean in means.items()})
        self.write(step, means if rate is None else means | {"learning_rate": rate}, "training")

    def write(self, step: int, values: dict[str, float], of: str = "validation") -> None:
        """Write values that were measured after `step`; NaN, a score without a meaning, is null in the file."""
        if self.out is None:
            return
        path = self.out / LINES
        try:
            with open(path, "a", encoding="utf-8") as file:
                numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
                file.write(json.dumps({"step": step, **numbers}) + "\n")
        except OSError as error:
            raise OSError(f"cannot write '{path}': {error.strerror or error}.") from error
        if of == "validation":
            self.bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        for name, value in values.items():
            if self.writer is not None:
                self._tensorboard(self.writer.add_scalar, f"{of}/{name}", value, step)

    def _tensorboard(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """A call of TensorBoard. What it writes is in the JSON lines too, so no failure of it ends a run."""
        try:
            return call(*arguments)
        except Exception as error:  # its thread passes on whatever its file system raises
            self.writer = None
            folder = None if self.out is None else self.out / TENSORBOARD
            logger.warning("TensorBoard's files in '%s' cannot be written, the run goes on without: %s", folder, error)


def comparison(rows: Sequence[tuple[Image.Image, np.ndarray, np.ndarray]], classes: Sequence[str]) -> Image.Image:
    """A row for each RGB image with true labels (H, W), −1 for no class, and predicted ones: the image, the true labels
    (white for no class), the predicted ones laid over the image."""
    colours = np.concatenate([palette(len(classes)), np.full((1, 3), 255, np.uint8)])  # the last one is that of −1
    strips = []
    for image, truth, predicted in rows:
        parts = [image, Image.fromarray(colours[truth]), overlay(image, predicted, classes, legend=False)]
        width = max(1, round(image.width * HEIGHT / image.height))
        strips.append([part.resize((width, HEIGHT), Image.Resampling.NEAREST) for part in parts])
    widths = [3 * strip[0].width + 2 * GAP for strip in strips]
    sheet = Image.new("RGB", (max(widths), len(strips) * (HEIGHT + GAP) - GAP), "white")
    for number, strip in enumerate(strips):
        for place, part in enumerate(strip):
            sheet.paste(part, (place * (part.width + GAP), number * (HEIGHT + GAP)))
    return sheet


def _keep_until(file: Path, step: int) -> set[int]:
    """Drop the lines of steps that are done again, and what a kill or a full disk left half-written; returns the steps
    of the validations that are kept."""
    if not file.is_file():
        return set()
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows = [(line, _row(line)) for line in lines]
    kept = [(line, row) for line, row in rows if row is not None and row["step"] <= step]
    write_whole(file, lambda target: target.write_text("".join(line for line, _ in kept), encoding="utf-8"))
    return {row["step"] for _, row in kept if VALIDATED in row}


def _row(line: str) -> dict[str, Any] | None:
    """The values of a line, None if it is not whole."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _open_tensorboard(folder: Path, first: int) -> Any:
    """A writer, if TensorBoard is installed; it hides what an earlier run logged after step `first`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    _quieten()
    return SummaryWriter(folder, purge_step=first)


def _quieten() -> None:
    """TensorBoard's writing thread hands its error to the next call, and need not print a traceback as well."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__module__.partition(".")[0] != "tensorboard":
            before(arguments)

    if getattr(before, "__qualname__", "") != hook.__qualname__:
        threading.excepthook = hook
