"""A method defined here, which the package has never heard of, goes through everything that the package does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

import ovseg_fast as ovs
from ovseg_fast import checkpoints
from ovseg_fast.cli.evaluate import evaluate_command
from ovseg_fast.cli.info import report
from ovseg_fast.data import open_dataset
from ovseg_fast.demo.page import cost_maps
from ovseg_fast.evaluation.evaluate import evaluate
from ovseg_fast.models import AugmentationSettings, Hyperparameters, Preset, SegmentationModel, presets, register
from ovseg_fast.training.config import DataConfig, TrainingConfig
from ovseg_fast.training.finetuning import set_trainable
from ovseg_fast.training.run import train

CLASSES = ("red", "green", "blue")


@dataclass(frozen=True)
class ToyConfig:
    image_size: int = 32
    width: int = 8


class WordEncoder(nn.Module):
    """Embeds the last word of a prompt, the token before the end token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(49408, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens.gather(-1, tokens.argmax(-1, keepdim=True) - 1)).squeeze(-2)


class Toy(SegmentationModel):
    """Cosines of pixel features, from two convolutions, with the mean of a class's prompts."""

    method = "toy"
    statistics = ((128.0, 128.0, 128.0), (64.0, 64.0, 64.0))
    templates = ("a {}", "the {}")
    hyperparameters = Hyperparameters(learning_rate=1e-2, no_decay=("norm", "embedding"))
    augmentation = AugmentationSettings(scales=(1.0, 1.5))
    clip_prefixes = ("text_encoder.",)
    loss_weights: ClassVar = {"bce": 1.0, "dice": 0.5}
    mark = "encoder.0.weight"

    def __init__(self, config: ToyConfig, clip_pretrained: str | Path | None = None) -> None:
        super().__init__(config)
        self.text_encoder = WordEncoder(config.width)
        self.encoder = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.ReLU(), nn.Conv2d(16, config.width, 1))

    def text_from_prompts(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings.mean(1), dim=-1)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.encoder(self.normalise(pixels)), dim=1)

    def decode(self, features: Tensor, text: Tensor) -> Tensor:
        return 5 * torch.einsum("bchw,tc->bthw", features, text)

    def dense_embeddings(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        features = self.encode_pixels(self.windows(image, "whole").pixels)
        return features.permute(0, 2, 3, 1), (image.shape[1], image.shape[2])


@pytest.fixture
def toy() -> Iterator[str]:
    """The name of the method's preset."""
    register(Preset("toy-small", Toy, ToyConfig(), note="a toy"))
    yield "toy-small"
    del presets.PRESETS["toy-small"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures, each half of one of three colours and half of another, as a plain dataset."""
    rng = np.random.default_rng(0)
    colours = np.array([(220, 40, 40), (40, 200, 60), (50, 60, 220)])
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    (tmp_path / "data/classes.txt").write_text("\n".join(CLASSES))
    for number in range(6):
        labels = np.repeat(rng.permutation(3)[:2].astype(np.uint8), 20)[None].repeat(36, 0)
        noise = rng.integers(-20, 20, (36, 40, 3))
        Image.fromarray((colours[labels] + noise).astype(np.uint8)).save(tmp_path / f"data/images/{number}.png")
        Image.fromarray(labels).save(tmp_path / f"data/masks/{number}.png")
    return tmp_path


def test_it_is_built_saved_and_loaded(toy: str, tmp_path: Path) -> None:
    model = ovs.build(toy)
    assert type(model) is Toy and model.preset == toy and presets.get_preset(toy).model is Toy
    checkpoints.save(model, tmp_path / "toy.safetensors", CLASSES)
    loaded = ovs.load(toy, weights=tmp_path / "toy.safetensors", device="cpu").model
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    torch.save(model.state_dict(), tmp_path / "toy.pt")
    checkpoints.load(loaded, tmp_path / "toy.pt")
    with pytest.raises(checkpoints.CheckpointError, match="looks like a checkpoint of toy in ovseg-fast's own format"):
        checkpoints.load(ovs.build("catseg-tiny"), tmp_path / "toy.pt")


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_it_segments(toy: str, mode: str) -> None:
    segmenter = ovs.load(toy, weights=None, device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (40, 75, 3), dtype=np.uint8)
    out = segmenter.segment(image, CLASSES, mode=mode)
    assert out.labels.shape == (40, 75) and out.scores.shape == (3, 40, 75)
    assert (out.labels == out.scores.argmax(0)).mean() > 0.99
    costs = cost_maps(segmenter, Image.fromarray(image), CLASSES)
    assert costs.shape == (3, 40, 75) and np.abs(costs).max() <= 1 + 1e-5


def test_it_is_trained_and_evaluated(toy: str, folder: Path) -> None:
    data = DataConfig("folder", str(folder / "data"))
    path = train(
        TrainingConfig(
            model=toy, out=str(folder / "run"), steps=40, batch=2, data=data, workers=0, log_every=5, distortion=False
        ),
        progress=False,
    )
    told = [json.loads(line)["loss"] for line in (folder / "run/log.jsonl").read_text().splitlines()]
    assert told[-1] < told[0]
    result = evaluate(
        ovs.load(toy, weights=path, device="cpu"), open_dataset("folder", folder / "data"), progress=False
    )
    assert result.images == 6 and result.scores.miou > 0.9
    assert "seen_offset" not in result.settings and result.settings["model"] == toy


def test_the_command_line_knows_it(toy: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert "toy-small" in report() and "a toy" in report()
    arguments = [toy, "--dataset", "folder", "--root", "data", "--weights", "random", "--device", "cpu"]
    done = CliRunner().invoke(evaluate_command, arguments)
    assert done.exit_code == 0 and "toy-small on folder" in done.output
    done = CliRunner().invoke(evaluate_command, [*arguments, "--seen-offset", "0.1"])
    assert done.exit_code == 2 and "toy-small does not" in done.output


def test_its_encoders_follow_the_policies_that_every_method_has(toy: str) -> None:
    model = ovs.build(toy)
    everything = [name for name, _ in model.named_parameters()]
    assert set_trainable(model) == everything
    assert set_trainable(model, "none") == [name for name in everything if not name.startswith("text_encoder.")]


def test_what_it_lacks_is_refused_in_one_sentence(toy: str, folder: Path) -> None:
    model = ovs.build(toy)
    for call in (checkpoints.to_upstream, lambda model: checkpoints.load_upstream(model, {})):
        with pytest.raises(ValueError, match=r"^Toy has no upstream format; .*\.$"):
            call(model)
    with pytest.raises(ValueError, match="the hub holds no weights of toy-small; "):
        ovs.load(toy)
    with pytest.raises(ValueError, match="seen must be None, as Toy treats all classes alike"):
        ovs.Segmenter(model).segment(np.zeros((8, 8, 3), np.uint8), CLASSES, seen=["red"])
    with pytest.raises(ValueError, match="policy of Toy must be one of full, none, got 'prompt'"):
        set_trainable(model, "prompt")
    config = TrainingConfig(
        model=toy, out=str(folder / "run"), steps=1, data=DataConfig("folder", str(folder / "data")),
        clip_learning_rate=1e-4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"clip_learning_rate is for methods with a CLIP of their own, got 0\.0001"):
        train(config, progress=False)


def test_a_name_is_registered_once(toy: str) -> None:
    with pytest.raises(ValueError, match="name must be that of a new preset, 'toy-small' is taken"):
        register(Preset("toy-small", Toy, ToyConfig()))
    with pytest.raises(ValueError, match="'catseg-tiny' is taken"):
        register(Preset("catseg-tiny", Toy, ToyConfig()))
