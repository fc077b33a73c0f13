"""The packaged models: they load, they are what their files say, and the command that trained them runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import ovseg_fast as ovs
from ovseg_fast import checkpoints
from ovseg_fast.data.vocabularies import WORLD
from ovseg_fast.data.world.scenes import WorldScenes
from ovseg_fast.evaluation.evaluate import evaluate
from ovseg_fast.models.clip import CLIP, PACKAGED
from ovseg_fast.models.presets import TINY_WORLD
from ovseg_fast.tiny import reproduce as module
from ovseg_fast.tiny.clip import PretrainingConfig
from ovseg_fast.tiny.reproduce import BASELINE, MEASURED, MODELS, baseline, measure, reproduce, table
from ovseg_fast.training.config import read_config, read_toml

LIMIT = 8_000_000  # bytes of all packaged weights


def test_packaged_weights_are_small_and_say_what_they_were_trained_on() -> None:
    files = sorted(PACKAGED.glob("*.safetensors"))
    assert [file.stem for file in files] == sorted(("clip-tiny", *MODELS))
    assert sum(file.stat().st_size for file in files) < LIMIT
    for name in MODELS:
        assert checkpoints.classes(PACKAGED / f"{name}.safetensors") == list(WORLD.seen)
        config = read_config(PACKAGED / f"{name}.toml")
        assert config.model == name and config.data.dataset == "world"
    assert read_toml(PACKAGED / "clip-tiny.toml", PretrainingConfig).steps > 1000


@pytest.mark.parametrize(("name", "least", "scenes"), [("catseg-tiny", 0.55, 12), ("cascade-clip-tiny", 0.4, 40)])
def test_packaged_models_segment_unseen_combinations(name: str, least: float, scenes: int) -> None:
    """Far better than the CLIP that they grew from, on a few scenes of a world that no training has seen."""
    dataset = WorldScenes.first(scenes, "test", seed=12_345)
    found = evaluate(ovs.load(name, device="cpu"), dataset, progress=False).metrics
    alone = baseline(CLIP(TINY_WORLD, "world").eval(), dataset)
    assert found["miou_unseen"] > least
    assert found["miou_unseen"] > alone["miou_unseen"] + 0.1


def test_training_starts_from_the_packaged_clip() -> None:
    whole = CLIP(TINY_WORLD, "world").state_dict()
    model = ovs.build("catseg-tiny", clip_pretrained="world")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.clip.state_dict().items())


def test_table_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [dict.fromkeys(MEASURED, value) for value in (0.5, 0.7)]
    results = {"scenes": 3, "seeds": [1, 2], "scores": {BASELINE: runs[:1], "catseg-tiny": runs}}
    assert table(results).splitlines()[2:] == [
        "| zero-shot | 50.0 | 50.0 | 50.0 | 50.0 |",
        f"| catseg-tiny |{' 60.0 ± 14.1 |' * 4}",
    ]
    asked: list[Any] = []
    monkeypatch.setattr(module, "measure", lambda **options: asked.append(options) or results)
    arguments = ["--packaged", "--out", str(tmp_path), "--scenes", "3", "--seed", "1", "--seed", "2"]
    result = CliRunner().invoke(module.main, arguments)
    assert result.exit_code == 0, result.output
    assert asked == [{"seeds": (1, 2), "scenes": 3}] and "60.0 ± 14.1" in result.output
    assert json.loads((tmp_path / "results.json").read_text()) == results


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_share_is_checked(tmp_path: Path, share: float) -> None:
    with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
        reproduce(tmp_path, share=share)


@pytest.mark.slow
def test_shortened_run_learns(tmp_path: Path) -> None:
    """A thirtieth of the steps: every part runs, the files load, and both models beat chance by far."""
    weights = reproduce(tmp_path, share=1 / 30)
    results = measure(weights, tmp_path / "clip" / "clip.safetensors", seeds=(1,), scenes=20)
    assert results["scores"].keys() == {BASELINE, *MODELS}
    for (scores,) in results["scores"].values():
        assert all(math.isfinite(scores[key]) for key in MEASURED)
    # Of 140 classes. Each floor is about half of what such a run reached, 0.19 and 0.08.
    assert results["scores"]["catseg-tiny"][0]["pixel_accuracy"] > 0.1
    assert results["scores"]["cascade-clip-tiny"][0]["pixel_accuracy"] > 0.05
    # It goes on where it was: nothing is left to train.
    before, _ = checkpoints.read(weights / "catseg-tiny.safetensors")
    assert reproduce(tmp_path, share=1 / 30) == weights
    after, _ = checkpoints.read(weights / "catseg-tiny.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
