"""What a run resumes from, and what it does not: other data, damaged states, another run in its folder."""

from __future__ import annotations

import dataclasses
import io
import logging
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ovseg_fast import checkpoints
from ovseg_fast.training import run as training_run
from ovseg_fast.training.config import DataConfig
from ovseg_fast.training.pairs import Contents
from ovseg_fast.training.run import CHECKPOINT, WEIGHTS, Run, train
from ovseg_fast.training.state import State
from training.colours import CLASSES, assert_equal, configuration, make_data, told, weights

DAMAGED = r"checkpoint\.pt' is not a checkpoint of a run, or damaged; --restart starts over\.$"


DATA = DataConfig("folder", "data")
CONFIG = dataclasses.replace(
    configuration(Path()), out="run", data=DATA, steps=1, batch=2, checkpoint_every=1, log_every=1
)
LONGER = dataclasses.replace(CONFIG, steps=2)


class Stopped(BaseException):
    """As a kill: nothing catches it."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data and a run of one step, by relative paths."""
    folder = tmp_path_factory.mktemp("trained")
    make_data(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(CONFIG, progress=False)
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of it, as the working folder."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


# Other data


def reorder(data):
    (data / "classes.txt").write_text("\n".join(reversed(CLASSES)))


def add_class(data):
    (data / "classes.txt").write_text("\n".join((*CLASSES, "grey")))


def remove_image(data):
    (data / "images/3.png").unlink()
    (data / "masks/3.png").unlink()


def rename_image(data):
    for part in ("images", "masks"):
        (data / part / "3.png").rename(data / part / "33.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (reorder, r"class 0, 'red', is now 'blue'"),
        (add_class, "3 classes are now 4"),
        (remove_image, "8 images are now 7"),
        (rename_image, "the images have other names, or another order"),
    ],
)
def test_a_run_does_not_resume_on_other_data(folder, change, words):
    before = (folder / "run" / CHECKPOINT).read_bytes()
    change(folder / "data")
    with pytest.raises(ValueError, match=rf"run in 'run' was trained on other data \({words}\); .*--restart"):
        train(LONGER, progress=False)
    assert (folder / "run" / CHECKPOINT).read_bytes() == before
    train(dataclasses.replace(LONGER, steps=1), progress=False, restart=True)


def test_unseen_classes_are_compared(folder):
    state = State.load(folder / "run" / CHECKPOINT)
    other = dataclasses.replace(state.data, unseen=(2,))
    assert other.changes(state.data) == ["other classes are unseen"]


def test_a_corrected_mask_is_told_and_used(folder, caplog):
    for name in ("2", "5"):
        Image.fromarray(np.zeros((96, 96), np.uint8)).save(folder / f"data/masks/{name}.png")
    with caplog.at_level(logging.WARNING):
        train(LONGER, progress=False)
    (record,) = [each for each in caplog.records if "changed" in each.getMessage()]
    assert record.getMessage().startswith("2 of 8 pairs changed since the run was last saved")
    assert record.getMessage().endswith("the first is 2")


def test_another_machine_is_told(folder, caplog, monkeypatch):
    now = training_run.environment(1, torch.device("cpu"))
    monkeypatch.setattr(training_run, "environment", lambda *_: now | {"processes": 4, "torch": "1.0"})
    with caplog.at_level(logging.WARNING):
        train(LONGER, progress=False)
    (record,) = [each for each in caplog.records if "resuming with" in each.getMessage()]
    assert "processes 1 is now 4" in record.getMessage() and "torch" in record.getMessage()
    assert "threads" not in record.getMessage()


def test_a_checkpoint_of_an_older_version_resumes_with_a_warning(folder, caplog):
    path = folder / "run" / CHECKPOINT
    content = torch.load(path, weights_only=True)
    torch.save({name: content[name] for name in ("config", "step", "model", "optimizer", "scaler")}, path)
    with caplog.at_level(logging.WARNING):
        train(LONGER, progress=False)
    assert len([each for each in caplog.records if "older version" in each.getMessage()]) == 1
    assert told(folder / "run")[-1]["step"] == 2


def test_what_the_run_started_from_is_not_needed_again(folder):
    (folder / "run" / WEIGHTS).rename(folder / "start.safetensors")
    config = dataclasses.replace(CONFIG, weights="start.safetensors")
    train(config, progress=False, restart=True)
    (folder / "start.safetensors").unlink()
    train(dataclasses.replace(config, steps=2), progress=False)


# Damage


def small_state() -> State:
    model = {"a": torch.randn(5, 3), "b": torch.randn(7)}
    optimizer = {"state": {0: {"exp_avg": torch.randn(5, 3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    contents = Contents(("x", "y"), (1,), 2, "ab" * 32, torch.tensor([3, 4]))
    return State(3, model, optimizer, None, {"data": {"dataset": "folder"}}, contents, {"threads": 1})


def flat(value: object) -> str:
    """Everything in a state as text, exactly."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{value.tolist()}"
    if isinstance(value, dict):
        return str({key: flat(part) for key, part in value.items()})
    return repr(value)


def test_a_damaged_state_is_refused_or_unchanged(tmp_path):
    """Cut to any length, or with any byte changed."""
    path = tmp_path / CHECKPOINT
    state = small_state()
    state.save(path)
    whole, expected = path.read_bytes(), flat(vars(state) | {"data": vars(state.data)})
    draw = random.Random(random.getrandbits(32))
    lengths = [0, 1, 100, *(draw.randrange(len(whole)) for _ in range(60))]
    mutants = [whole[:length] for length in lengths]
    for _ in range(250):
        mutant = bytearray(whole)
        for _ in range(draw.choice([1, 1, 1, 8])):
            mutant[draw.randrange(len(whole))] = draw.randrange(256)
        mutants.append(bytes(mutant))
    refused = 0
    for mutant in mutants:
        path.write_bytes(mutant)
        try:
            loaded = State.load(path)
        except ValueError as error:
            assert re.search(DAMAGED, str(error)), error
            refused += 1
        else:
            assert flat(vars(loaded) | {"data": vars(loaded.data)}) == expected
    assert refused > len(lengths)


def broken_optimizer(content):
    for state in content["optimizer"]["state"].values():
        state["exp_avg"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("model"),
        lambda content: content.update(step="1"),
        lambda content: content.update(step=-1),
        lambda content: content.update(config=[1]),
        lambda content: content["config"].update(data=3),
        lambda content: content["model"].popitem(),
        lambda content: content["model"].update(more=torch.zeros(1)),
        lambda content: content.update(optimizer={"state": {}}),
        lambda content: content["optimizer"]["param_groups"].pop(),
        lambda content: content.update(data={"classes": ("a",)}),
        lambda content: content.update(environment=3),
        broken_optimizer,
    ],
)
def test_a_state_that_does_not_fit_is_refused(folder, change):
    path = folder / "run" / CHECKPOINT
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(ValueError, match=DAMAGED) as caught:
        train(LONGER, progress=False)
    assert "\n" not in str(caught.value)


def test_other_files_in_place_of_a_checkpoint(folder):
    path = folder / "run" / CHECKPOINT
    for content in (b"", b"half a file", (folder / "run" / WEIGHTS).read_bytes(), legacy({"step": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=DAMAGED):
            train(LONGER, progress=False)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"checkpoint\.pt' in it is not a file"):
        train(LONGER, progress=False)


def legacy(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


# From the start, to the end, and beside each other


def test_restart_discards_the_old_run_before_the_first_step(folder):
    (folder / "run/pictures").mkdir()
    (folder / "run/pictures/step_0000001.png").write_bytes(b"old")
    run = Run(LONGER, progress=False)
    run.prepare(restart=True)  # killed right after
    run._lock.close()
    assert [name for name in (CHECKPOINT, WEIGHTS, "log.jsonl") if (folder / "run" / name).exists()] == []
    assert not list((folder / "run/pictures").iterdir())
    train(dataclasses.replace(LONGER, seed=5), progress=False)  # the old run's seed would be refused
    assert [row["step"] for row in told(folder / "run")] == [1, 2]


def test_a_refused_restart_keeps_the_old_run(folder):
    before = {path.name: path.read_bytes() for path in (folder / "run").glob("*.*") if path.is_file()}
    for change in (
        {"weights": "nowhere.pth"},
        {"policy": "lora"},
        {"clip_pretrained": "openai"},
        {"transductive": 0.5},
    ):
        with pytest.raises((ValueError, OSError)):
            train(dataclasses.replace(LONGER, **change), progress=False, restart=True)
    assert {path.name: path.read_bytes() for path in (folder / "run").glob("*.*") if path.is_file()} == before


def test_a_refused_run_leaves_no_folder(folder):
    with pytest.raises(OSError, match=r"weights: there is no checkpoint file 'nowhere\.pth'"):
        train(dataclasses.replace(CONFIG, out="new", weights="nowhere.pth"), progress=False)
    assert not (folder / "new").exists()


def test_a_complete_run_is_not_begun_again(folder):
    log, weights_before = (folder / "run/log.jsonl").read_bytes(), weights(folder / "run" / WEIGHTS)
    (folder / "run" / WEIGHTS).unlink()  # as if it was killed just before these were written
    train(CONFIG, progress=False)
    assert (folder / "run/log.jsonl").read_bytes() == log
    assert_equal(weights(folder / "run" / WEIGHTS), weights_before)
    train(LONGER, progress=False)
    with pytest.raises(
        ValueError, match=r"steps must be at least 2, which the run in 'run' has done, got 1; .*--restart"
    ):
        train(CONFIG, progress=False)


VALIDATED = {
    "validation": dataclasses.replace(DATA, limit=1),
    "steps": 4,
    "batch": 2,
    "checkpoint_every": 2,
    "evaluate_every": 2,
    "pictures": 1,
}


def test_a_validation_that_was_interrupted_is_made_up(folder, monkeypatch):
    """In the middle of a run, and at its end, where the weights are written already."""
    config = dataclasses.replace(CONFIG, out="disturbed", **VALIDATED)
    train(dataclasses.replace(config, out="whole"), progress=False)
    validate = training_run.validate

    def stops_after(count):
        """Validations are made, but after this many, one is stopped."""
        made = []

        def stop(*arguments):
            made.append(1)
            if len(made) > count:
                raise Stopped
            return validate(*arguments)

        monkeypatch.setattr(training_run, "validate", stop)

    for step, count in ((2, 0), (4, 1)):
        stops_after(count)  # that of step 2 is made up first
        with pytest.raises(Stopped):
            train(config, progress=False)
        assert State.load(folder / "disturbed" / CHECKPOINT).step == step
        assert [row["step"] for row in told(folder / "disturbed") if "miou" in row] == [2][:count]
        assert (folder / "disturbed" / WEIGHTS).exists() == (step == 4)
    stops_after(1)
    train(config, progress=False)
    assert told(folder / "disturbed") == told(folder / "whole")
    stops_after(0)
    train(config, progress=False)  # complete: nothing is validated again
    names = sorted(path.name for path in (folder / "whole/pictures").iterdir())
    assert sorted(path.name for path in (folder / "disturbed/pictures").iterdir()) == names


def test_lines_that_a_kill_left_half_written_are_dropped(folder):
    log = folder / "run/log.jsonl"
    before = told(folder / "run")
    with open(log, "ab") as file:
        file.write(b'{"loss": 1}\n[1, 2]\n\xff\xfe\n' + b"[" * 100_000 + b"\n" + b'{"step": 1, "lo')
    train(LONGER, progress=False)
    assert told(folder / "run")[: len(before)] == before and told(folder / "run")[-1]["step"] == 2


def test_two_runs_in_one_folder_are_noticed(folder):
    first = Run(LONGER, progress=False)
    first.prepare(restart=False)
    for restart in (False, True):
        with pytest.raises(ValueError, match=r"a training run is under way in 'run'; wait for it, or choose another"):
            train(LONGER, progress=False, restart=restart)
    first.go()
    train(LONGER, progress=False)
    assert not (folder / "run/.lock").exists()


def test_a_full_disk_names_the_file(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"^cannot write '.*checkpoint\.pt': No space left on device\.$"):
            train(LONGER, progress=False)
    assert State.load(folder / "run" / CHECKPOINT).step == 1
    run = Run(LONGER, progress=False)
    run.prepare(restart=False)
    shutil.rmtree(folder / "run")
    (folder / "run").write_text("a file")
    with pytest.raises(OSError, match=r"run/log\.jsonl"):
        run.go()


def test_tensorboard_that_cannot_write_ends_no_run(folder, caplog, capfd):
    config = dataclasses.replace(LONGER, steps=3, log_every=1)
    run = Run(config, progress=False)
    run.prepare(restart=False)
    step = run._step

    def spoil(number, parts):
        shutil.rmtree(folder / "run/tensorboard")
        (folder / "run/tensorboard").write_text("a file")
        run._step = step
        return step(number, parts)

    run._step = spoil
    with caplog.at_level(logging.WARNING):
        run.go()
    assert "Traceback" not in capfd.readouterr().err
    assert [row["step"] for row in told(folder / "run")] == [1, 2, 3]
    assert len([each for each in caplog.records if "TensorBoard" in each.getMessage()]) == 1
    assert checkpoints.classes(folder / "run" / WEIGHTS) == list(CLASSES)
