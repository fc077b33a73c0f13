"""The benchmark beside the published code, with a made-up checkout whose head is the literal form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from published import CATSEG, importable
from upstream import main

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "upstream.py"
HEAD = """
from torch import nn

from literal import catseg_head


class Aggregator(nn.Module):
    def __init__(self, *, pooling_size, pad_len, window_size, nheads, **_):
        super().__init__()
        self.sizes = {"pooling": pooling_size, "pad_len": pad_len, "window": window_size, "heads": nheads}

    def load_state_dict(self, weights):
        self.weights = weights

    def forward(self, image, text, maps):
        return %s * catseg_head(self.weights, image, text, *maps[1:], **self.sizes)
"""


def checkout(folder: Path, head: str) -> Path:
    file = folder / "checkout" / CATSEG.mark
    file.parent.mkdir(parents=True)
    file.write_text(head)
    return folder / "checkout"


def smoke(folder: Path, head: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--smoke", "--out", folder / "out.json", *options]
    command += ["--catseg", checkout(folder, head)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refused(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    return result


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no process can be bound to a core here")
def test_it_measures_every_form(tmp_path: Path) -> None:
    run = smoke(tmp_path, HEAD % "1", "--busy")
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 8
    found = json.loads((tmp_path / "out.json").read_text())
    assert {"cpu", "threads", "load_before", "torch", "commit"} <= found["machine"].keys()
    assert list(found["head"]) == ["published", "torch float32", "kernels float32", "kernels bfloat16"]
    for form, row in found["head"].items():
        for how in ("alone", "busy"):
            for clock in ("wall", "cpu"):
                assert row[how][clock]["median"] > 0
                assert row[how][clock]["gain"] == 1 if form == "published" else row[how][clock]["gain"] > 0
        if form != "published":
            assert 0 < row["error"] < (0.1 if "bfloat16" in form else 1e-5)
    assert set(found["head"]["torch float32"]["backends"].values()) == {"torch"}


def test_another_result_is_not_timed(tmp_path: Path) -> None:
    run = smoke(tmp_path, HEAD % "1.0001")
    assert run.returncode == 1 and "off from the published result by 1.0e-04" in run.stderr
    assert not (tmp_path / "out.json").exists()


def test_it_says_what_is_missing(tmp_path: Path) -> None:
    assert "give a checkout of KU-CVLAB/CAT-Seg or HVision-NKU/Cascade-CLIP" in refused().output
    path = checkout(tmp_path, "import missing_package.part")
    assert "give a checkout of HVision-NKU/Cascade-CLIP" in refused("--catseg", path, "--work", "cascade").output
    assert "does not exist" in refused("--catseg", tmp_path / "nothing").output
    wrong = refused("--cascade", path).output
    assert "is no checkout of HVision-NKU/Cascade-CLIP: it has no models/decode_heads" in " ".join(wrong.split())
    assert "needs missing_package: run 'pip install" in refused("--catseg", path, "--smoke").output


def test_stand_ins_last_as_long_as_the_import(tmp_path: Path) -> None:
    path = checkout(
        tmp_path, "from detectron2.modeling import META_ARCH_REGISTRY as registry\nfrom tkinter import OUTSIDE"
    )
    (path / "cat_seg" / "__init__.py").write_text("raise RuntimeError('of datasets and training')")
    before = sys.modules.get("tkinter")
    with importable(CATSEG, path) as module:
        found = module("cat_seg.modeling.transformer.model")
    assert found.registry.register()(dict) is dict
    assert not {"cat_seg", "detectron2.modeling"} & sys.modules.keys()
    assert sys.modules.get("tkinter") is before
