"""What can be known before the first step is: files, weights, crops, precisions; and `ovs.train` says the same."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

import ovseg_fast as ovs
from ovseg_fast import checkpoints
from ovseg_fast.training import run as training_run
from ovseg_fast.training.run import Run, train
from training.colours import configuration, make_data


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_data(tmp_path / "data", 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "nowhere.pth"}, r"weights: there is no checkpoint file 'nowhere\.pth'"),
        ({"weights": "data"}, "weights: 'data' is a folder, expected a checkpoint file"),
        ({"weights": "data/classes.txt"}, r"weights: 'data/classes\.txt' is a text file"),
        ({"clip_pretrained": "opena"}, "clip_pretrained must be a file or 'world' for catseg-tiny, got 'opena'"),
        ({"model": "catseg-vitb", "clip_pretrained": "opena"}, r"or open_clip's name of weights for .*openai.*'opena'"),
        ({"model": "catseg-vitb", "clip_pretrained": "world"}, r"clip_pretrained must be a file, or open_clip's name"),
    ],
)
def test_weights_are_looked_for_before_a_model_is_built(folder, changes, words, monkeypatch):
    monkeypatch.setattr(training_run, "build", None)
    with pytest.raises((ValueError, OSError), match=words):
        train(configuration(folder, **changes), progress=False)
    assert not (folder / "run").exists()


def test_weights_of_another_model_name_the_key(folder):
    checkpoints.save(ovs.build("cascade-clip-tiny"), folder / "other.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match=r"^weights: .*other\.safetensors"):
        train(configuration(folder, weights="other.safetensors"), progress=False)


def test_a_crop_that_the_model_does_not_take_is_refused(folder):
    with pytest.raises(ValueError, match=r"^crop 100 does not fit cascade-clip-tiny: .*multiples of the 8-pixel patch"):
        train(configuration(folder, model="cascade-clip-tiny", crop=100), progress=False)
    train(configuration(folder, model="cascade-clip-tiny", crop=64, steps=1), progress=False)
    train(configuration(folder, crop=100, steps=1, out="other"), progress=False)


@pytest.mark.parametrize("scales", [(1.0, 200.0), (1e-9, 1.0), (1.0, 1e308)])
def test_scales_that_make_images_too_small_or_too_large_are_refused(folder, scales):
    with pytest.raises(
        ValueError, match=r"^scales must make images of 2 to 16384 pixels a side, got .* times a crop of 96"
    ):
        train(configuration(folder, scales=scales), progress=False)
    assert not (folder / "run").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_fp16_without_a_gpu_is_refused(folder):
    with pytest.raises(ValueError, match="precision fp16 needs a GPU, and PyTorch finds none here; use bf16 or fp32"):
        train(configuration(folder, precision="fp16"), progress=False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda out: out.write_text("a file"), "out must be a folder, .*run is a file"),
        (lambda out: (out / "model.safetensors").mkdir(parents=True), r"model\.safetensors' in it is not a file"),
        (lambda out: (out / "log.jsonl").mkdir(parents=True), r"log\.jsonl' in it is not a file"),
        (lambda out: out.mkdir() or (out / "pictures").write_text("a file"), "pictures' in it is not a folder"),
        (lambda out: out.mkdir() or (out / "tensorboard").write_text("a file"), "tensorboard' in it is not a folder"),
    ],
)
def test_a_folder_that_cannot_hold_a_run_is_refused(folder, make, words):
    make(folder / "run")
    with pytest.raises(ValueError, match=words):
        train(configuration(folder), progress=False)


def test_a_warm_up_longer_than_the_run_is_told(folder, caplog):
    with caplog.at_level(logging.WARNING):
        Run(configuration(folder, model="cascade-clip-tiny", warmup=5), progress=False).prepare(restart=False)
    assert "the warm-up of 5 steps is longer than the run of 4" in caplog.text


def test_runs_of_several_precisions_in_one_process(folder):
    for precision in ("fp32", "bf16", "fp32"):
        config = configuration(folder, steps=1, precision=precision, out=precision)
        assert Run(config, progress=False).accelerator.mixed_precision == {"fp32": "no"}.get(precision, precision)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (lambda: torch.autocast("cpu", torch.bfloat16), r"outside of torch\.autocast"),
        (torch.no_grad, "training needs gradients"),
        (torch.inference_mode, "training needs gradients"),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_a_block_that_would_change_the_training_is_refused(folder, block, words):
    with block(), pytest.raises(ValueError, match=words):
        train(configuration(folder), progress=False)
    assert not (folder / "run").exists()


def test_train_in_python(folder):
    values = dataclasses.asdict(configuration(folder, steps=1))
    assert ovs.train({**values, "data": {"dataset": "folder", "root": "data"}}, progress=False).is_file()
    with pytest.raises(FileNotFoundError, match=r"no configuration file 'nowhere\.toml'"):
        ovs.train("nowhere.toml")
