"""A small dataset on which a run takes moments; run as a program, it trains in several processes without dropout."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ovseg_fast as ovs
from ovseg_fast import checkpoints
from ovseg_fast.training.config import DataConfig, TrainingConfig, read_config
from ovseg_fast.training.run import Run

CLASSES = ("red", "green", "blue")


def make_data(folder: Path, count: int = 8) -> Path:
    """Pictures, each half of one of three colours and half of another, as a plain dataset."""
    draw = np.random.default_rng(random.getrandbits(32))
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(count):
        labels = np.repeat(draw.permutation(3)[:2], 48).astype(np.uint8)[None].repeat(96, 0)
        pixels = np.eye(3)[labels] * 200 + draw.normal(30, 10, (96, 96, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/{number}.png")
        Image.fromarray(labels).save(folder / f"masks/{number}.png")
    (folder / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    return folder


def configuration(folder: Path, **changes: object) -> TrainingConfig:
    """Of a run in `folder`, on the data in it."""
    data = DataConfig("folder", str(folder / "data"))
    config = TrainingConfig(
        model="catseg-tiny", out=str(folder / "run"), steps=4, data=data, workers=0, log_every=2, checkpoint_every=2
    )
    return dataclasses.replace(config, **changes)


def write(config: TrainingConfig, path: Path) -> Path:
    """The configuration as the file that `ovseg-fast train` takes."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if name not in tables]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoints.read(path)[0]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def told(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def train_without_dropout(config: TrainingConfig) -> None:
    """Each process draws its own dropout, so with it several do not train as one does."""
    torch.manual_seed(config.seed)
    model = ovs.build(config.model)
    for module in model.modules():
        for name in ("p", "dropout"):  # of modules that are one, or hold one
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    run = Run(config, progress=False, model=model)
    run.prepare(restart=False)
    run.go()


if __name__ == "__main__":
    train_without_dropout(read_config(sys.argv[1]))
