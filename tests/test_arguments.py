"""Numbers that are not finite, or of another kind, are refused before any work: by options, keys and arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import ovseg_fast as ovs
from evaluation.photo_folder import make_photos
from ovseg_fast import visualize
from ovseg_fast.arguments import check_number, check_whole
from ovseg_fast.cli.main import main
from ovseg_fast.data import open_dataset
from ovseg_fast.data.augmentation import augmentation
from ovseg_fast.data.world.scenes import World
from ovseg_fast.images import load_image
from ovseg_fast.training import optimizer

NUMBERS = {
    (command, option.opts[-1]): option.type
    for command in main.commands
    for option in main.commands[command].params
    if isinstance(option.type, (click.types.FloatParamType, click.types.IntParamType))
}
IMAGE = np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8)
NOT_FINITE = (math.nan, math.inf, -math.inf)


def test_a_number() -> None:
    assert check_number("x", np.float32(0.5), 0, 1) == check_number("x", torch.tensor(0.5)) == 0.5
    for value in (*NOT_FINITE, 1.5, -0.5, 10**400, np.float64("nan")):
        with pytest.raises(ValueError, match=r"^x must be a share in 0\.\.1, got .*\.$"):
            check_number("x", value, 0, 1, "a share")
    for value in ("0.5", True, None, [1, 2], torch.ones(2), 1j):
        with pytest.raises(TypeError, match=r"^x must be a finite number, got "):
            check_number("x", value)
    with pytest.raises(ValueError, match=r"^x must be a finite number of at least 0, got inf"):
        check_number("x", math.inf, 0)


def test_a_whole_number() -> None:
    check_whole("x", np.int64(3))
    for value in (*NOT_FINITE, True, 1.0, "1", None):
        with pytest.raises(TypeError, match=r"^x must be a whole number of images, got "):
            check_whole("x", value, "images")


@pytest.mark.parametrize(("command", "option"), NUMBERS)
@pytest.mark.parametrize("value", ["nan", "-NaN", "inf", "-inf", "1e400"])
def test_no_option_of_any_command_takes_what_is_not_finite(command: str, option: str, value: str) -> None:
    assert ("segment", "--alpha") in NUMBERS and ("evaluate", "--seen-offset") in NUMBERS
    kind = NUMBERS[command, option]
    with pytest.raises(click.BadParameter):
        kind.convert(value, None, None)
    result = CliRunner().invoke(main, [command, "x", "--dataset", "world", option, value])
    assert result.exit_code == 2


def test_options_are_refused_before_a_model_is_loaded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovseg_fast.cli.options.load_model", None)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(IMAGE).save("a.png")
    for arguments in (
        ("segment", "a.png", "-m", "catseg-tiny", "-c", "a, b", "--alpha", "nan"),
        ("evaluate", "cascade-clip-tiny", "-d", "world", "--seen-offset", "nan", "-o", "e.json"),
        ("evaluate", "cascade-clip-tiny", "-d", "world", "--limit", str(10**18), "-o", "e.json"),
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2 and arguments[-3 if "-o" in arguments[-2:] else -1] in result.stderr, result.output
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]


def result() -> ovs.Segmentation:
    return ovs.Segmentation(Image.fromarray(IMAGE), ["a", "b"], np.zeros((40, 40), np.int32))


def hyperparameters(**changes: Any) -> Any:
    model = ovs.build("catseg-tiny")
    return optimizer.build_optimizer(model, replace(model.hyperparameters, **changes))


PUBLISHED = {"scales": (1.0, 1.0), "longest": math.inf, "largest_share": 1.0, "fill": 0, "flip_first": False}
SETTINGS = ovs.build("cascade-clip-tiny").hyperparameters
CALLS: dict[str, Callable[[Any], Any]] = {
    "alpha": lambda x: result().overlay(alpha=x),
    "alpha of save": lambda x: result().save("never.npz", alpha=x),
    "low": lambda x: visualize.cost_map(np.eye(3), low=x),
    "high": lambda x: visualize.cost_map(np.eye(3), high=x),
    "n": visualize.palette,
    "side": lambda x: visualize.panels([[visualize.Panel(Image.fromarray(IMAGE))]], side=x),
    "max_side": lambda x: load_image(IMAGE, max_side=x),
    "max_side of load": lambda x: ovs.load("catseg-tiny", max_side=x),
    "max_side of open_dataset": lambda x: open_dataset("world", max_side=x),
    "limit": lambda x: open_dataset("world", limit=x),
    "seed": lambda x: open_dataset("world", seed=x),
    "seed of World": World,
    "index": lambda x: World().scene(x),
    "size": lambda x: World().scene(0, x),
    "size of augmentation": lambda x: augmentation(x, **PUBLISHED),
    "scales": lambda x: augmentation(40, **PUBLISHED | {"scales": (x, 1.0)}),
    "largest_share": lambda x: augmentation(40, **PUBLISHED | {"largest_share": x}),
    "learning_rate": lambda x: hyperparameters(learning_rate=x),
    "weight_decay": lambda x: hyperparameters(weight_decay=x),
    "clip_learning_rate": lambda x: optimizer.with_clip_rate(SETTINGS, x),
    "rate": lambda x: optimizer.poly(10, x, SETTINGS),
    "steps": optimizer.cosine,
}


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", CALLS)
def test_no_argument_takes_what_is_not_finite(name: str, value: float) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name.split()[0]} must (be|not be) .*, got .*{value}"):
        CALLS[name](value)


def test_longest_may_be_infinite_but_not_nan() -> None:
    augmentation(40, **PUBLISHED)
    with pytest.raises(ValueError, match=r"^longest must be a number of at least 1, got nan"):
        augmentation(40, **PUBLISHED | {"longest": math.nan})


@pytest.mark.parametrize("value", [*NOT_FINITE, -0.1, 1.1, "0.1"])
def test_the_offset_of_seen_classes_is_a_probability(
    value: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    seg = ovs.load("cascade-clip-tiny", device="cpu")
    seg.model.seen_offset = value
    monkeypatch.setattr(seg, "embed_text", None)
    monkeypatch.setattr(seg.model, "encode_pixels", None)
    words = "^the model's seen_offset must be a probability in 0..1, got "
    with pytest.raises((ValueError, TypeError), match=words):
        seg.segment(IMAGE, ["a", "b"])
    photos = make_photos(tmp_path / "photos", 1, 3)
    with pytest.raises((ValueError, TypeError), match=words):
        ovs.evaluate(seg, photos, tmp_path / "new" / "result.json", progress=False)
    assert not (tmp_path / "new").exists()


def test_seconds_between_states_are_a_number(tmp_path: Any) -> None:
    seg, photos = ovs.load("catseg-tiny", device="cpu"), make_photos(tmp_path / "photos", 1, 3)
    for value in (math.nan, -1.0, "3"):
        with pytest.raises(
            (ValueError, TypeError), match=r"^save_seconds must be a number of seconds of at least 0, got"
        ):
            ovs.evaluate(seg, photos, tmp_path / "new" / "result.json", progress=False, save_seconds=value)
    assert not (tmp_path / "new").exists()
