"""Pairs that cannot be used: known before the first step, or replaced by others when it is their turn."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from ovseg_fast.data import SegmentationDataset
from ovseg_fast.training import images as training_images
from ovseg_fast.training import pairs, validation
from ovseg_fast.training.config import DataConfig
from ovseg_fast.training.run import WEIGHTS, Run, train
from ovseg_fast.training.validation import EvaluationError
from training.colours import assert_equal, configuration, make_data, told, weights


@pytest.fixture
def folder(tmp_path):
    make_data(tmp_path / "data")
    return tmp_path


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("ovseg_fast.training")]


def test_pairs_without_a_file_are_left_out_with_one_warning(folder, caplog):
    (folder / "data/masks/2.png").unlink()
    (folder / "data/images/4.png").unlink()
    with caplog.at_level(logging.WARNING):
        run = Run(configuration(folder, steps=1), progress=False)
    (warning,) = messages(caplog)
    assert "data: 2 of 8 pairs lack image or mask and are left out; the first, 2: there is no mask '" in warning
    assert [pair.name for pair in run.dataset.pairs] == ["0", "1", "3", "5", "6", "7"]


def test_no_pair_left_is_refused(folder):
    for mask in (folder / "data/masks").iterdir():
        mask.unlink()
    with pytest.raises(ValueError, match=r"^in \[data\]: .* holds no pair of image and mask; for 0, there is no mask"):
        Run(configuration(folder), progress=False)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"root": "nowhere"}, "root must be the folder of a dataset, there is no 'nowhere'"),
        ({"dataset": "foldre"}, "dataset must be one of"),
        ({"split": "../x"}, "split"),
        ({"root": "empty"}, "holds no image"),
        ({"dataset": "ade20k-847"}, "holds no ade20k-847"),
    ],
)
@pytest.mark.parametrize("table", ["data", "validation"])
def test_data_that_does_not_fit_is_refused_before_the_model_is_built(folder, table, values, words, monkeypatch):
    monkeypatch.chdir(folder)
    for part in ("images", "masks"):
        (folder / "empty" / part).mkdir(parents=True)
    (folder / "empty/classes.txt").write_text("a\nb")
    data = dataclasses.replace(DataConfig("folder", "data"), **values)
    monkeypatch.setattr("ovseg_fast.training.run.build", None)
    with pytest.raises((ValueError, OSError), match=rf"^in \[{table}\]: .*{words}"):
        train(configuration(folder, **{table: data}), progress=False)
    assert not (folder / "run").exists()


def spoil(data) -> None:
    """A truncated image, a label beyond the list, an empty mask."""
    whole = (data / "images/1.png").read_bytes()
    (data / "images/1.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((96, 96), 9, np.uint8)).save(data / "masks/3.png")
    (data / "masks/6.png").write_bytes(b"")


def test_unusable_pairs_are_replaced_and_named_with_and_without_workers(folder, caplog):
    spoil(folder / "data")
    config = configuration(folder, steps=3)
    trained = []
    for workers in (0, 2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trained.append(weights(train(dataclasses.replace(config, workers=workers, out=str(folder / f"{workers}")))))
        told_now = messages(caplog)
        for name, words in (("1", "images/1.png' is damaged"), ("3", "label 9, beyond"), ("6", "6.png' is empty")):
            (message,) = [each for each in told_now if each.startswith(f"{name} is left out, another image takes")]
            assert words in message, "each once"
        assert "3 of 8 pairs of the training data were left out; the first, " in told_now[-1]
    assert_equal(*trained)


def test_a_run_with_unusable_pairs_resumes_without_a_trace(folder):
    spoil(folder / "data")
    config = configuration(folder, model="cascade-clip-tiny", steps=4, batch=2)
    train(dataclasses.replace(config, out=str(folder / "whole")), progress=False)
    run = Run(config, progress=False)
    run.prepare(restart=False)
    step = run._step
    run._step = lambda number, parts: step(number, parts) if number < 3 else 1 / 0  # after the checkpoint of step 2
    with pytest.raises(ZeroDivisionError):
        run.go()
    assert_equal(weights(train(config, progress=False)), weights(folder / "whole" / WEIGHTS))


@pytest.mark.parametrize("workers", [0, 1])
def test_when_no_pair_can_be_used_one_sentence_names_the_first(folder, workers):
    for mask in (folder / "data/masks").iterdir():
        mask.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"^all 8 pairs of the training data cannot be used; the first, \d: mask '.*"
    ) as caught:
        train(configuration(folder, workers=workers), progress=False)
    assert "\n" not in str(caught.value)


def test_many_unusable_pairs_in_a_row_end_a_run(folder, monkeypatch):
    monkeypatch.setattr(training_images, "TRIES", 3)
    for mask in (folder / "data/masks").iterdir():
        mask.write_bytes(b"")
    with pytest.raises(ValueError, match=r"^3 pairs in a row of the training data cannot be used; the first, "):
        train(configuration(folder), progress=False)


def test_many_unusable_pairs_are_counted(caplog):
    left_out = training_images.LeftOut(1000)
    with caplog.at_level(logging.WARNING):
        for number in range(500):
            left_out.add([training_images.Skipped(str(number % 250), "broken")])
        left_out.summarise()
    assert len(messages(caplog)) == training_images.NAMED + 2
    assert messages(caplog)[-1] == "250 of 1000 pairs of the training data were left out; the first, 0: broken"


MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    torch.OutOfMemoryError("CUDA out of memory."),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_a_pair_that_is_too_large_for_the_memory_is_left_out(folder, error, monkeypatch, caplog):
    read = SegmentationDataset.read

    def fail(self, index):
        if self.pairs[index].name == "5":
            raise error
        return read(self, index)

    monkeypatch.setattr(SegmentationDataset, "read", fail)
    with caplog.at_level(logging.WARNING):
        train(configuration(folder, steps=2), progress=False)
    (message,) = [each for each in messages(caplog) if each.startswith("5 is left out")]
    assert "memory" in message


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_a_step_that_is_too_large_says_what_to_lower(folder, error, monkeypatch):
    run = Run(configuration(folder, steps=1), progress=False)
    run.prepare(restart=False)

    def fail(*_):
        raise error

    monkeypatch.setattr(run, "_steps_of", fail)
    with pytest.raises(RuntimeError, match=r"^step 1 needs more memory than there is \(.*\); lower batch or crop"):
        run.go()


def test_a_worker_that_is_killed_is_told_in_one_sentence(folder, monkeypatch):
    main = os.getpid()
    read = SegmentationDataset.read

    def die(self, index):
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    monkeypatch.setattr(SegmentationDataset, "read", die)
    with pytest.raises(RuntimeError, match=r"^a process that reads images died \(.*\); .* lower workers") as caught:
        train(configuration(folder, workers=1), progress=False)
    assert "\n" not in str(caught.value)


def test_other_errors_of_a_worker_show_the_sentence_inside(folder, monkeypatch):
    def fail(self, index):
        raise KeyError("not due to a pair")

    monkeypatch.setattr(SegmentationDataset, "read", fail)
    with pytest.raises(RuntimeError, match=r"^'not due to a pair'$"):
        train(configuration(folder, workers=1), progress=False)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system has no /proc")
def test_workers_let_go_of_the_lock(tmp_path):
    """A run that was killed can be resumed at once, and not only when its workers have noticed."""
    ours, other = (os.open(tmp_path / name, os.O_CREAT | os.O_RDWR) for name in ("lock", "other"))
    training_images.let_go(os.path.realpath(tmp_path / "lock"), 0)
    with pytest.raises(OSError):
        os.fstat(ours)
    os.close(other)


# Masks that hold something else than was meant


@pytest.mark.parametrize(
    ("value", "words"),
    [(255, "data: no pixel of the split shows any class"), (0, "data: 8 of 8 masks hold 0 and 255 alone")],
)
def test_masks_without_classes_are_told_before_training(folder, value, words, caplog):
    for mask in (folder / "data/masks").iterdir():
        pixels = np.full((96, 96), value, np.uint8)
        pixels[:40] = 255
        Image.fromarray(pixels).save(mask)
    run = Run(configuration(folder), progress=False)
    with caplog.at_level(logging.WARNING):
        run.prepare(restart=False)
    assert messages(caplog)[0].startswith(words)


@pytest.mark.parametrize(
    ("value", "words"),
    [(255, "validation: no pixel of the split shows any class"), (0, "validation: 3 of 3 masks hold 0 and 255 alone")],
)
def test_validation_masks_without_classes_are_told_and_their_scores_are_null(folder, value, words, caplog):
    make_data(folder / "val", 3)
    for mask in (folder / "val/masks").iterdir():
        pixels = np.full((96, 96), value, np.uint8)
        pixels[:40] = 255
        Image.fromarray(pixels).save(mask)
    config = configuration(folder, steps=1, validation=DataConfig("folder", str(folder / "val")))
    run = Run(config, progress=False)
    with caplog.at_level(logging.WARNING):
        run.prepare(restart=False)
    assert messages(caplog)[0].startswith(words)
    run.go()
    text = (folder / "run/log.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text and ("null" in text) == (value == 255)
    assert len(told(folder / "run")) == 2
    Run(config, progress=False).prepare(restart=False)  # and reads them


def test_a_validation_with_the_world_ends(folder):
    config = configuration(folder, validation=DataConfig("world"))
    assert len(Run(config, progress=False).validation) == 500
    assert len(Run(dataclasses.replace(config, data=DataConfig("world")), progress=False).dataset) == 100_000


def test_temporary_files_of_a_killed_run_are_removed(folder):
    left = [folder / "run" / name for name in (".ovseg-0123456789abcdef.pt", "pictures/.ovseg-0123456789abcdef.png")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    Run(configuration(folder), progress=False).prepare(restart=False)
    assert not any(path.exists() for path in left)


def test_a_class_that_a_large_dataset_lacks_in_a_sample_is_not_told(folder, caplog, monkeypatch):
    monkeypatch.setattr(pairs, "LOOKED_AT", 1)  # mask: each shows two of three classes
    with caplog.at_level(logging.WARNING):
        Run(configuration(folder), progress=False).prepare(restart=False)
    assert messages(caplog) == []


def test_sound_masks_are_not_told(folder, caplog):
    with caplog.at_level(logging.WARNING):
        Run(configuration(folder), progress=False).prepare(restart=False)
    assert messages(caplog) == []


# Validation


def test_a_broken_validation_pair_ends_no_training(folder, caplog):
    make_data(folder / "val", 3)
    (folder / "val/masks/0.png").write_bytes(b"")
    (folder / "val/images/1.png").unlink()
    config = configuration(folder, steps=1, validation=DataConfig("folder", str(folder / "val")))
    with caplog.at_level(logging.WARNING):
        assert train(config, progress=False).is_file()
    assert "validation: 1 of 3 pairs lack image or mask" in messages(caplog)[0]
    assert "miou" in told(folder / "run")[-1]
    with Image.open(folder / "run/pictures/step_0000001.png") as picture:
        assert picture.height == 240, "one row, of the sound pair"


def test_a_validation_without_a_usable_pair_ends_no_training(folder, caplog):
    make_data(folder / "val", 2)
    for mask in (folder / "val/masks").iterdir():
        mask.write_bytes(b"")
    config = configuration(folder, steps=1, validation=DataConfig("folder", str(folder / "val")))
    with caplog.at_level(logging.WARNING):
        train(config, progress=False)
    assert any("the validation is left out: none of the 2 images" in each for each in messages(caplog))
    assert (folder / "run" / WEIGHTS).is_file() and not any("miou" in row for row in told(folder / "run"))


def test_a_picture_that_is_too_large_for_the_memory_ends_no_training(folder, monkeypatch, caplog):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(validation, "comparison", fail)
    data = DataConfig("folder", str(folder / "data"), limit=1)
    with caplog.at_level(logging.WARNING):
        train(configuration(folder, steps=1, validation=data), progress=False)
    assert "step_0000001.png' is left out: there is not enough memory" in messages(caplog)[-1]
    assert "miou" in told(folder / "run")[-1]


def test_weights_are_written_before_the_last_evaluation(folder, monkeypatch):
    seen = []

    def fail(*_, **__):
        seen.append((folder / "run" / WEIGHTS).is_file())
        raise EvaluationError("none")

    monkeypatch.setattr(validation, "evaluate", fail)
    config = configuration(folder, steps=2, evaluate_every=1, validation=DataConfig("folder", str(folder / "data")))
    train(config, progress=False)
    assert seen == [False, True]
