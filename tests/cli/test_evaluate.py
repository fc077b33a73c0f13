"""`ovseg-fast evaluate`, with a dataset of the tests beside those of `data/datasets.py`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import ovseg_fast as ovs
from evaluation.photo_folder import CLASSES, PhotoFolder, make_photos
from ovseg_fast import backends, checkpoints
from ovseg_fast.cli.evaluate import evaluate_command
from ovseg_fast.data.datasets import open_dataset
from ovseg_fast.evaluation.results import Evaluation
from ovseg_fast.files import held


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with photos and weights; `--dataset photos --root photos` opens it."""

    def open_photos(name, root=None, split="val", **options):
        return PhotoFolder(root) if name == "photos" else open_dataset(name, root, split, **options)

    monkeypatch.setattr("ovseg_fast.data.datasets.open_dataset", open_photos)
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos", 3, np.random.randint(2**31))
    torch.manual_seed(np.random.randint(2**31))
    checkpoints.save(ovs.build("catseg-tiny"), tmp_path / "tiny.safetensors")
    return tmp_path


ARGUMENTS = ("--dataset", "photos", "--root", "photos", "--device", "cpu", "--mode", "whole")
WEIGHTS = ("--weights", "tiny.safetensors")


def run(*arguments):
    return CliRunner().invoke(evaluate_command, ["catseg-tiny", *arguments], catch_exceptions=False)


def refused(result, *words, code=2):
    """The run ended with that code and one sentence that says these words."""
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("ovseg-fast: ") and all(word in line for word in words), line


def test_table_and_json(folder):
    result = run(*ARGUMENTS, *WEIGHTS)
    assert result.exit_code == 0, result.output
    stored = json.loads((folder / "out" / "catseg-tiny_photos_val_whole.json").read_text())
    assert stored["images"] == {"evaluated": 3, "skipped": []}
    miou = f"{100 * stored['metrics']['miou']:.2f}"
    assert ["mIoU", miou] in [line.split() for line in result.stdout.splitlines()]
    assert "unicorn" in result.stdout and "catseg-tiny_photos_val_whole.json" in result.stdout


@pytest.mark.usefixtures("cpu_library")
def test_the_kernels_for_cpus_run_it_where_they_are_forced(folder, monkeypatch):
    metrics = {}
    for asked in ("cpu", "torch"):
        monkeypatch.setattr(backends, "_default", asked)
        assert run(*ARGUMENTS, *WEIGHTS, "-q", "-o", f"{asked}.json").exit_code == 0
        assert ovs.last_backend("spatial_aggregation") == ovs.last_backend("label_map") == asked
        metrics[asked] = json.loads((folder / f"{asked}.json").read_text())["metrics"]
    assert metrics["cpu"]["miou"] == pytest.approx(metrics["torch"]["miou"], abs=0.02)


def test_quiet(folder):
    result = run(*ARGUMENTS, *WEIGHTS, "--quiet", "--limit", "1", "--out", "result.json")
    assert result.exit_code == 0 and result.stdout == ""
    assert json.loads((folder / "result.json").read_text())["images"]["evaluated"] == 1


def test_what_cannot_be_used_is_named_and_the_exit_code_is_1(folder, caplog):
    (folder / "photos" / "001.png").write_bytes(b"broken")
    result = run(*ARGUMENTS, *WEIGHTS)
    assert result.exit_code == 1
    assert "1 of 3 images were left out" in result.stderr and "001" in caplog.text and "skipped: 001" in result.stdout
    stored = json.loads((folder / "out" / "catseg-tiny_photos_val_whole.json").read_text())
    assert stored["images"]["evaluated"] == 2


def test_when_nothing_can_be_used_the_exit_code_is_1(folder):
    for image in (folder / "photos").glob("00?.png"):
        image.write_bytes(b"broken")
    refused(run(*ARGUMENTS, *WEIGHTS), "none of the 3 images", "000", code=1)


def test_a_checkpoint_says_what_it_was_trained_on(folder):
    model = ovs.build("catseg-tiny")
    checkpoints.save(model, folder / "trained.safetensors", classes=["Grass", "sky", "dog"])
    assert run(*ARGUMENTS, "--weights", "trained.safetensors", "-o", "result.json").exit_code == 0
    assert json.loads((folder / "result.json").read_text())["settings"]["seen"] == ["grass", "sky"]
    assert CLASSES[1:3] == ("grass", "sky")


def test_resume_and_restart(folder, monkeypatch):
    class Stopped(BaseException):
        pass

    read = PhotoFolder.read

    def stop(self, index):
        if index == 2:
            raise Stopped
        return read(self, index)

    monkeypatch.setattr("ovseg_fast.evaluation.evaluate.SAVE_SECONDS", 0)
    monkeypatch.setattr(PhotoFolder, "read", stop)
    arguments = (*ARGUMENTS, *WEIGHTS, "-o", "result.json", "-q")
    with pytest.raises(Stopped):
        run(*arguments)
    monkeypatch.setattr(PhotoFolder, "read", read)
    refused(run(*ARGUMENTS, "-w", "random", "-o", "result.json", "-q"), "other weights", "--restart")
    assert (folder / "result.partial.npz").exists()
    assert run(*ARGUMENTS, "-w", "random", "-o", "result.json", "-q", "--restart").exit_code == 0
    assert run(*arguments).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dataset", "cocoa", "--root", "photos"), ("datasets", "coco-stuff", "'cocoa'")),
        (("--dataset", "coco-stuff", "--root", "missing"), ("'missing'",)),
        (("--dataset", "photos", "--root", "empty"), ("--root 'empty'", "no image", "photos")),
        ((*ARGUMENTS, "--weights", "missing.pth"), ("missing.pth",)),
        ((*ARGUMENTS, *WEIGHTS, "--out", "result.txt"), (".json", "result.txt")),
        ((*ARGUMENTS, *WEIGHTS, "--device", "warp"), ("warp",)),
        ((*ARGUMENTS, *WEIGHTS, "--seen-offset", "0"), ("--seen-offset is for", "catseg-tiny")),
        (("--dataset", "coco-stuff"), ("root must be the folder that coco-stuff lies in",)),
    ],
)
def test_unfit_arguments_are_refused(folder, arguments, words):
    (folder / "empty").mkdir()
    refused(run(*arguments), *words)
    assert not (folder / "out").exists()


def test_a_result_that_cannot_be_written_is_told_before_the_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("ovseg_fast.cli.options.load_model", None)
    (folder / "file").write_text("")
    refused(run(*ARGUMENTS, *WEIGHTS, "-o", "file/result.json"), "out must be a folder", "file is a file")
    (folder / "result.json").mkdir()
    refused(run(*ARGUMENTS, *WEIGHTS, "-o", "result.json"), "'result.json' is a folder")
    with held(folder / ".other.lock", "x"):
        refused(run(*ARGUMENTS, *WEIGHTS, "-o", "other.json"), "an evaluation into 'other.json' is under way")


@pytest.mark.parametrize("name", ["word " * 100, "<end_of_text>"])
def test_a_name_that_cannot_be_prompted_is_refused_before_anything_is_begun(folder, monkeypatch, name):
    monkeypatch.setattr("evaluation.photo_folder.CLASSES", ("cat", "grass", "sky", "wall", name))
    refused(run(*ARGUMENTS, *WEIGHTS, "-o", "new/result.json"), "a prompt must", name[:5])
    assert not (folder / "new").exists()


def test_weights_that_give_no_text_are_refused_before_anything_is_begun(folder):
    model = ovs.build("catseg-tiny")
    torch.nn.init.constant_(model.text_encoder.text_projection, 1e38)
    checkpoints.save(model, folder / "large.safetensors")
    refused(run(*ARGUMENTS, "-w", "large.safetensors", "-o", "new/result.json"), "text embeddings are NaN or infinite")
    assert not (folder / "new").exists()


def test_what_fails_once_begun_gives_exit_code_1(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Evaluation, "to_json", full)
    refused(run(*ARGUMENTS, *WEIGHTS, "-q"), "No space left on device", code=1)
    assert (folder / "out" / "catseg-tiny_photos_val_whole.partial.npz").is_file()


def test_a_mask_that_was_corrected_refuses_the_resumption(folder, monkeypatch):
    def fail(*_, **__):
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "save", fail)
        refused(run(*ARGUMENTS, *WEIGHTS, "-q"), "stopped", code=1)
    with Image.open(folder / "photos/001_mask.png") as mask:
        blank = Image.new("L", mask.size)
    blank.save(folder / "photos/001_mask.png")
    refused(run(*ARGUMENTS, *WEIGHTS, "-q"), "image or mask of 001 has changed", "--restart")
    assert run(*ARGUMENTS, *WEIGHTS, "-q", "--restart").exit_code == 0


def test_an_unknown_model_is_refused(folder):
    result = CliRunner().invoke(evaluate_command, ["resnet", *ARGUMENTS])
    refused(result, "resnet", "catseg-tiny")


def test_help():
    result = CliRunner().invoke(evaluate_command, ["--help"])
    assert result.exit_code == 0 and "--restart" in result.output and "exit code is then 1" in result.output


@pytest.mark.parametrize("offset", [0.0, 0.3, None])
def test_the_procedural_world_and_the_offset_of_seen_classes(folder, offset):
    checkpoints.save(ovs.build("cascade-clip-tiny"), folder / "cascade.safetensors")
    arguments = ["cascade-clip-tiny", "--dataset", "world", "--seed", "5", "--limit", "2", "-w", "cascade.safetensors"]
    arguments += [] if offset is None else ["--seen-offset", str(offset)]
    result = CliRunner().invoke(evaluate_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    stored = json.loads((folder / "out" / "cascade-clip-tiny_world_test_slide.json").read_text())
    assert stored["images"]["evaluated"] == 2 and stored["settings"]["seen_offset"] == (
        0.1 if offset is None else offset
    )
    assert stored["settings"]["dataset"] == "world"
