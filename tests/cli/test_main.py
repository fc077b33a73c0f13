"""The command line as a user starts it: a process of its own, real files, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ovseg_fast as ovs
from ovseg_fast import checkpoints

MODEL = ("--model", "catseg-tiny", "--weights", "random")


def run(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`ovseg-fast ARGUMENTS` in `cwd`."""
    program = Path(sys.executable).with_name("ovseg-fast")
    command = [str(program)] if program.exists() else [sys.executable, "-m", "ovseg_fast"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def refused(result: subprocess.CompletedProcess[str], *words: str, code: int = 2) -> None:
    """The run ended with that code and one sentence that says these words."""
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("ovseg-fast: ") and "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_one_image(photo, tmp_path):
    result = run("segment", photo, "--classes", "cat, grass, sky", *MODEL, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "photo_overlay.png" in result.stdout and "%" in result.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["photo_labels.png", "photo_overlay.png"]
    labels = np.array(Image.open(tmp_path / "out" / "photo_labels.png"))
    assert labels.shape == (60, 90) and labels.max() < 3
    with Image.open(tmp_path / "out" / "photo_overlay.png") as overlay:
        assert overlay.mode == "RGB"


def test_folder_with_a_broken_image(photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.jpg"):
        Image.open(photo).save(folder / name)
    (folder / "broken.png").write_bytes(photo.read_bytes()[:200])
    (folder / "notes.txt").write_text("no image")
    result = run("segment", folder, "-c", "cat, sky", *MODEL, "--save", "npz", "-o", "labels", cwd=tmp_path)
    assert result.returncode == 1
    assert "broken.png" in result.stderr and "1 of 3 images failed" in result.stderr
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == ["a_labels.npz", "b_labels.npz"]
    with np.load(tmp_path / "labels" / "a_labels.npz", allow_pickle=False) as stored:
        assert stored["labels"].shape == (60, 90) and list(stored["classes"]) == ["cat", "sky"]


def test_images_of_the_same_stem_do_not_overwrite_each_other(photo, tmp_path):
    Image.open(photo).save(tmp_path / "photo.jpg")
    (tmp_path / "other").mkdir()
    Image.open(photo).save(tmp_path / "other" / "photo.png")
    arguments = (photo, "photo.jpg", "other/photo.png", "-c", "cat, sky", *MODEL, "--save", "labels", "-q")
    result = run("segment", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert result.stdout == ""


def test_classes_from_files(photo, tmp_path):
    (tmp_path / "words.txt").write_text("cat\n\n# a comment\ndoor, double door\n")
    (tmp_path / "words.json").write_text(json.dumps(["cat", "door, double door"]))
    for name in ("words.txt", "words.json"):
        result = run("segment", photo, "--classes-file", name, *MODEL, "--save", "npz", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        with np.load(tmp_path / "out" / "photo_labels.npz") as stored:
            assert list(stored["classes"]) == ["cat", "door, double door"]


def test_weights_from_a_file_are_used(photo, tmp_path):
    torch.manual_seed(5)
    model = ovs.build("catseg-tiny").eval()
    checkpoints.save(model, tmp_path / "tiny.safetensors")
    arguments = ("--classes", "cat, grass, sky, wall", "--model", "catseg-tiny", "--save", "npz")
    result = run("segment", photo, *arguments, "--weights", "tiny.safetensors", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = ovs.Segmenter(model).segment(photo, ["cat", "grass", "sky", "wall"])
    with np.load(tmp_path / "out" / "photo_labels.npz") as stored:
        assert (stored["labels"] == expected.labels).mean() > 0.999


def test_info(tmp_path):
    result = run("info", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in ("torch", torch.__version__, "catseg-vitb", "spatial_aggregation", "runs"):
        assert word in result.stdout


def test_check_names_what_is_wrong_with_a_dataset(photo, tmp_path):
    for part in ("images", "masks"):
        (tmp_path / "data" / part).mkdir(parents=True)
    photo.rename(tmp_path / "data/images/photo.png")
    mask = np.zeros((60, 90), np.uint8)
    Image.fromarray(mask).save(tmp_path / "data/masks/photo.png")
    (tmp_path / "data/classes.txt").write_text("cat\ndog\n")
    result = run("check", "folder", "data", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "1 pairs: no problem found.\n")
    mask[3, 4] = 7
    Image.fromarray(mask).save(tmp_path / "data/masks/photo.png")
    result = run("check", "folder", "data", cwd=tmp_path)
    assert result.returncode == 1
    assert "photo" in result.stdout and "7" in result.stdout
    refused(run("check", "folder", "missing", cwd=tmp_path), "missing")
    refused(run("check", "folders", "data", cwd=tmp_path), "folders", "ade20k-150")


def test_help_and_version(tmp_path):
    assert "segment" in run("--help", cwd=tmp_path).stdout
    assert "--classes-file" in run("segment", "--help", cwd=tmp_path).stdout
    assert ovs.__version__ in run("--version", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing.png", "-c", "cat"), ("missing.png",)),
        (("photo.png",), ("--classes", "--classes-file")),
        (("photo.png", "-c", "cat", "--classes-file", "words.txt"), ("--classes", "--classes-file")),
        (("photo.png", "-c", " , "), ("class",)),
        (("photo.png", "-c", ""), ("class",)),
        (("photo.png", "-c", "cat, cat"), ("cat",)),
        (("photo.png", "-c", "cat", "--model", "resnet"), ("catseg-vitb", "resnet")),
        (("photo.png", "-c", "cat", "--weights", "missing.pth"), ("missing.pth",)),
        (("photo.png", "-c", "cat", "--out", "photo.png", *MODEL), ("photo.png",)),
        (("photo.png", "-c", "cat", "--out", "photo.png/results", *MODEL), ("--out must be a folder", "photo.png")),
        (("empty/", "-c", "cat"), ("empty",)),
        (("photo.png", "--classes-file", "missing.txt"), ("missing.txt",)),
        (("photo.png", "-c", "cat", *MODEL, "--device", "warp"), ("warp",)),
    ],
)
def test_bad_arguments(photo, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    refused(run("segment", *arguments, cwd=tmp_path), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "words"), [("cuda", ("cuda backend was asked for", "cannot run")), ("gpu", ("OVSEG_BACKEND", "'gpu'"))]
)
def test_a_backend_that_cannot_run_is_refused_before_any_image(photo, tmp_path, asked, words):
    refused(run("segment", photo, "-c", "cat", *MODEL, cwd=tmp_path, OVSEG_BACKEND=asked), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("model", ["catseg-tiny", "cascade-clip-tiny"])
@pytest.mark.parametrize("command", ["segment", "demo"])
def test_the_kernels_for_cpus_run_every_operator_where_they_are_forced(photo, tmp_path, command, model):
    arguments = {"segment": ("photo.png", "-c", "cat, grass, sky", "--save", "labels"), "demo": ("--size", 96)}[command]
    labels = {"segment": "photo_labels.png", "demo": "demo_labels.png"}[command]
    found = {}
    for asked in ("cpu", "torch"):
        options = ("--model", model, "--device", "cpu", "--out", asked)
        result = run("-v", command, *arguments, *options, cwd=tmp_path, OVSEG_BACKEND=asked)
        assert result.returncode == 0, result.stderr
        ran = re.findall(r"(\w+) runs on (\w+)", result.stderr)
        assert {"encoder_block", "label_map"} < {operator for operator, _ in ran}
        assert {backend for _, backend in ran} == {asked}
        found[asked] = np.array(Image.open(tmp_path / asked / labels))
    assert (found["cpu"] == found["torch"]).mean() > 0.98


@pytest.mark.usefixtures("photo")
def test_kernels_for_cpus_that_are_not_there_are_refused_before_any_image(tmp_path):
    environment = {"OVSEG_BACKEND": "cpu", "OVSEG_CPU_LIBRARY": str(tmp_path / "none.so")}
    arguments = ("photo.png", "-c", "cat", *MODEL, "--device", "cpu")
    refused(run("segment", *arguments, cwd=tmp_path, **environment), "cpu backend was asked for", "none.so")
    assert not (tmp_path / "out").exists()


def big(path: Path) -> None:
    Image.new("RGB", (20_000, 30)).save(path)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("text.png", lambda path: path.write_text("this is no image")),
        ("empty.png", lambda path: path.touch()),
        ("pixel.png", lambda path: Image.new("RGB", (1, 1)).save(path)),
        ("wide.png", big),
    ],
)
def test_bad_images(tmp_path, name, make):
    make(tmp_path / name)
    refused(run("segment", name, "-c", "cat, sky", *MODEL, cwd=tmp_path), name, code=1)
    assert not (tmp_path / "out").exists()


def test_a_wide_image_is_taken_when_asked_for(tmp_path):
    big(tmp_path / "wide.png")
    arguments = ("wide.png", "-c", "cat, sky", *MODEL, "--max-side", 20_000, "--save", "labels")
    result = run("segment", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "out" / "wide_labels.png") as labels:
        assert labels.size == (20_000, 30)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save({"model": checkpoints.to_upstream(ovs.build("catseg-tiny"))}, path)
    return path


def test_bad_checkpoints(photo, tmp_path, upstream):
    state = torch.load(upstream, weights_only=True)
    state["model"]["upsample1.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    (tmp_path / "cut.pth").write_bytes(upstream.read_bytes()[:100_000])
    (tmp_path / "text.pth").write_text("<!doctype html>")
    common = ("photo.png", "-c", "cat, sky", "--weights")
    refused(run("segment", *common, "nan.pth", "--model", "catseg-tiny", cwd=tmp_path), "nan.pth", "upsample1.bias")
    refused(run("segment", *common, "cut.pth", "--model", "catseg-tiny", cwd=tmp_path), "cut.pth")
    refused(run("segment", *common, "text.pth", "--model", "catseg-tiny", cwd=tmp_path), "text.pth")
    refused(run("segment", *common, upstream, "--model", "cascade-clip-tiny", cwd=tmp_path), "cascade-clip-tiny")
    assert not (tmp_path / "out").exists()
    verbose = run("-v", "segment", *common, upstream, "--model", "cascade-clip-tiny", cwd=tmp_path)
    assert "decode_head.q_projs.0.weight" in verbose.stderr  # every key is named when asked for


def test_no_network_is_one_sentence(photo, tmp_path):
    arguments = ("segment", "photo.png", "-c", "cat", "--model", "catseg-vitb")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    refused(run(*arguments, cwd=tmp_path, **offline), "weights")
