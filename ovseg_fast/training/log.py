"""What a run tells while it goes on: a progress bar, TensorBoard, a file of JSON lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..files import write_whole


class Log:
    """Losses and scores of a run, told by its main process.

    Losses are summed where they are and read only every `every` steps, since reading one waits for the GPU.

    Args:
        out: the run's folder; `None` in all but the main process.
        accelerator: averages losses over the processes.
    """

    def __init__(self, out: Path | None, accelerator: Any, first: int, steps: int, every: int, progress: bool) -> None:
        self.out, self.accelerator, self.every = out, accelerator, every
        self.bar = tqdm(total=steps, initial=first, unit="step", disable=not progress)
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.writer = None if out is None else _tensorboard(out / "tensorboard", first)
        if out is not None:
            _keep_until(out / "log.jsonl", first)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def step(self, step: int, losses: dict[str, Tensor], rate: float) -> None:
        """Note the losses of the step that has just ended, number `step` counted from 1."""
        self.bar.update()
        for name, loss in losses.items():
            self.sums[name] = self.sums[name] + loss if self.count else loss
        self.count += 1
        if step % self.every == 0:
            self.tell(step, rate)

    def tell(self, step: int, rate: float | None = None) -> None:
        """Read the losses since the last time.

        Raises:
            FloatingPointError: one is not finite.
        """
        if not self.count:
            return
        values = torch.stack([loss.float() for loss in self.sums.values()]) / self.count
        means = dict(zip(self.sums, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        self.count = 0
        if not all(map(math.isfinite, means.values())):
            raise FloatingPointError(
                f"the loss is {means} at step {step}: lower learning_rate, or use precision fp32 or bf16."
            )
        self.bar.set_postfix({name: f"{mean:.4g}" for name, mean in means.items()})
        self.write(step, means if rate is None else means | {"learning_rate": rate}, "training")

    def write(self, step: int, values: dict[str, float], of: str = "validation") -> None:
        """Note values that were measured after `step`."""
        if self.out is None:
            return
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if of == "validation":
            self.bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{of}/{name}", value, step)


def _keep_until(file: Path, step: int) -> None:
    """Drop what an earlier run told of steps that are now done again."""
    if not file.is_file():
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_whole(file, lambda target: target.write_text("".join(kept), encoding="utf-8"))


def _tensorboard(folder: Path, first: int) -> Any:
    """A writer, where TensorBoard is installed; what an earlier run logged after step `first` is passed over."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=first)
