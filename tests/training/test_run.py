"""Training runs: what they write, that they resume without a trace, in one process and in several."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ovseg_fast as ovs
from ovseg_fast import checkpoints
from ovseg_fast.data.world.scenes import WORLD
from ovseg_fast.training.config import DataConfig, TrainingConfig
from ovseg_fast.training.run import CHECKPOINT, WEIGHTS, Run, train
from ovseg_fast.training.state import State
from training import colours
from training.colours import (
    CLASSES,
    assert_equal,
    configuration,
    make_data,
    told,
    train_without_dropout,
    weights,
    write,
)


@pytest.fixture
def folder(tmp_path):
    make_data(tmp_path / "data")
    return tmp_path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ovseg_fast", "train", *map(str, arguments)]


@pytest.mark.parametrize("model", ["catseg-tiny", "cascade-clip-tiny"])
def test_a_run_learns_and_writes_its_files(folder, model):
    config = configuration(
        folder, model=model, steps=12, learning_rate=2e-3, warmup=2, policy="full", log_every=3, evaluate_every=6,
        validation=DataConfig("folder", str(folder / "data")), pictures=2,
    )  # fmt: skip
    path = train(config, progress=False)
    assert path == folder / "run" / WEIGHTS
    told = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in told if "loss" in row]
    assert len(losses) >= 4
    assert losses[-1] < losses[0]
    model = ovs.build(model)
    checkpoints.load(model, path)
    assert checkpoints.classes(path) == list(CLASSES)
    scores = [row for row in told if "miou" in row]
    assert [row["step"] for row in scores] == [6, 12]
    assert all(0 <= row["miou"] <= 1 for row in scores)
    assert sorted(file.name for file in (folder / "run/pictures").iterdir()) == ["step_0000006.png", "step_0000012.png"]
    assert list((folder / "run/tensorboard").iterdir())


@pytest.mark.parametrize(("model", "published"), [("catseg-tiny", 0.01), ("cascade-clip-tiny", None)])
@pytest.mark.parametrize("chosen", [None, 0.5])
def test_gradients_are_clipped(folder, model, published, chosen, monkeypatch):
    clip, norms = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: norms.append(args[1]) or clip(*args, **kwargs)
    )
    train(configuration(folder, model=model, steps=2, max_gradient_norm=chosen), progress=False)
    norm = chosen or published
    assert norms == ([] if norm is None else [norm, norm])


def test_a_killed_run_resumes_without_a_trace(folder):
    """Killed at a random moment, twice. With as many threads in each process: sums depend on how they are shared."""
    config = configuration(
        folder, steps=16, batch=2, checkpoint_every=1, log_every=1, policy="full", learning_rate=1e-3
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    undisturbed = write(dataclasses.replace(config, out=str(folder / "whole")), folder / "whole.toml")
    subprocess.run(command(undisturbed, "--quiet"), env=environment, check=True)
    whole = weights(folder / "whole" / WEIGHTS)
    file = write(config, folder / "run.toml")
    checkpoint = folder / "run" / CHECKPOINT
    for wait in (1, 6):
        process = subprocess.Popen(command(file, "--quiet"), env=environment)
        while process.poll() is None and (not checkpoint.is_file() or steps_done(checkpoint) < wait):
            time.sleep(0.05)
        time.sleep(random.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / "run" / WEIGHTS).exists(), "killed too late to tell anything"
    assert 6 <= steps_done(checkpoint) < 16
    subprocess.run(command(file, "--quiet"), env=environment, check=True)
    assert_equal(weights(folder / "run" / WEIGHTS), whole)
    logs = [(folder / name / "log.jsonl").read_text() for name in ("run", "whole")]
    steps = [json.loads(line)["step"] for line in logs[0].splitlines()]
    assert steps == list(range(1, 17)), "each step is told once"
    assert logs[0] == logs[1]


def steps_done(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["step"]


@pytest.mark.parametrize("model", ["catseg-tiny", "cascade-clip-tiny"])
def test_two_processes_train_like_one_with_the_same_global_batch(folder, model):
    """Also where the images of one process show more classes than those of the other."""
    config = configuration(folder, model=model, steps=2, policy="full", warmup=0, log_every=1)
    alone, shared = (dataclasses.replace(config, out=str(folder / name)) for name in ("1", "2"))
    train_without_dropout(alone)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*program, colours.__file__, write(shared, folder / "shared.toml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    processes = [State.load(folder / name / CHECKPOINT).environment["processes"] for name in ("1", "2")]
    assert processes == [1, 2], "two trainings side by side are not one in two processes"
    torch.manual_seed(config.seed)
    began = ovs.build(model).state_dict()
    one, two = (weights(folder / name / WEIGHTS) for name in ("1", "2"))
    moved = torch.cat([(one[name] - began[name]).flatten() for name in one])
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one])
    assert moved.norm() > 0
    assert apart.norm() <= 0.05 * moved.norm()
    assert [row["step"] for row in told(folder / "2")] == [1, 2], "one process writes the log"
    assert [row["loss"] for row in told(folder / "2")] == pytest.approx([row["loss"] for row in told(folder / "1")])


def test_processes_that_do_not_know_of_each_other_are_refused(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 3 but 1 train together; .*torchrun"):
        train(configuration(folder), progress=False)


def test_the_procedural_world_trains_on_seen_classes_alone(tmp_path):
    """Cascade-CLIP's published protocol; then with pseudo-labels of the unseen ones."""
    config = TrainingConfig(
        model="cascade-clip-tiny", out=str(tmp_path / "run"), steps=2, data=DataConfig("world", limit=5), workers=0,
        validation=DataConfig("world", limit=2), pictures=1, transductive=0.5, batch=2, log_every=1,
    )  # fmt: skip
    run = Run(config, progress=False)
    run.prepare(restart=False)
    calls = []
    loss = run.model.loss
    run.model.loss = lambda images, labels, text: calls.append((labels, text)) or loss(images, labels, text)
    path = run.go()
    assert checkpoints.classes(path) == list(WORLD.seen)
    (labels, text), (all_labels, all_text) = calls
    assert len(text) == len(WORLD.seen) and len(all_text) == len(WORLD.classes)
    assert labels.max() < len(WORLD.seen) and all_labels.max() < len(WORLD.classes)
    told = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert 0 <= told[-1]["miou_unseen"] <= 1


def test_bad_runs_are_refused_in_one_sentence(folder):
    config = configuration(folder, steps=1, batch=2)
    train(config, progress=False)
    with pytest.raises(ValueError, match=r"batch 2 is now 4.*--restart"):
        train(dataclasses.replace(config, batch=4), progress=False)
    train(dataclasses.replace(config, batch=4), progress=False, restart=True)
    (folder / "run" / CHECKPOINT).write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"checkpoint\.pt' is not a checkpoint of a run, or damaged; --restart"):
        train(config, progress=False)
    with pytest.raises(ValueError, match="transductive needs unseen classes"):
        train(dataclasses.replace(config, out=str(folder / "other"), transductive=0.5), progress=False)
    for mask in (folder / "data/masks").iterdir():
        mask.unlink()
    for image in (folder / "data/images").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="holds no image"):
        train(dataclasses.replace(config, out=str(folder / "other")), progress=False)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(folder):
    config = configuration(folder, steps=6, batch=2, learning_rate=1e-3, checkpoint_every=1, log_every=1)
    run = Run(config, progress=False)
    run.prepare(restart=False)
    step = run._step

    def broken(number, parts):
        losses = step(number, parts)
        return {name: loss * float("nan") if number == 3 else loss for name, loss in losses.items()}

    run._step = broken
    with pytest.raises(FloatingPointError, match=r"nan.* at step 4: lower learning_rate"):
        run.go()
    assert steps_done(folder / "run" / CHECKPOINT) == 3
