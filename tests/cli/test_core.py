"""What everyone uses, once each and in one process: the first thing that `make test-oldest` runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovseg_fast.cli import main


def run(*arguments: object) -> None:
    """`ovseg-fast ARGUMENTS`, in this process; by click's own call, which all its versions have."""
    with pytest.raises(SystemExit) as ended:
        main.main([*map(str, arguments)], prog_name="ovseg-fast")
    assert not ended.value.code


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder of two images, with a greyscale and a palette mask."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "classes.txt").write_text("grass\nsky\n")
    for number, mode in enumerate("LP"):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        mask = Image.fromarray((pixels[..., 0] > 128).astype(np.uint8))
        if mode == "P":
            mask.putpalette([0, 255, 0, 0, 0, 255])
        mask.save(tmp_path / "masks" / f"{number}.png")
    return tmp_path


def test_info_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    run("info")
    assert "catseg-tiny" in capsys.readouterr().out
    run("segment", "--help")
    assert "--classes" in capsys.readouterr().out


def test_segment(dataset: Path, tmp_path: Path) -> None:
    run(
        "segment",
        dataset / "images" / "0.png",
        "--classes",
        "grass, sky",
        "--model",
        "catseg-tiny",
        "-o",
        tmp_path / "out",
    )
    with Image.open(tmp_path / "out" / "0_labels.png") as labels:
        assert labels.size == (64, 48)


def test_check_and_evaluate(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("check", "folder", dataset)
    run("evaluate", "catseg-tiny", "-d", "folder", "--root", dataset, "-o", tmp_path / "evaluation.json")
    assert json.loads((tmp_path / "evaluation.json").read_text())["images"]["evaluated"] == 2


def test_train(dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="training needs accelerate, which is not installed")
    (tmp_path / "run.toml").write_text(
        f"model = 'catseg-tiny'\nout = '{tmp_path / 'run'}'\nsteps = 1\nbatch = 2\nworkers = 0\n"
        f"[data]\nlayout = 'folder'\nroot = '{dataset}'\n"
    )
    run("train", tmp_path / "run.toml")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_demo(tmp_path: Path) -> None:
    run("demo", "--out", tmp_path / "demo")
    assert any((tmp_path / "demo").iterdir())
