"""Cascade-CLIP as a whole against the golden numbers of the published code, and its behaviour at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ovseg_fast as ovs
from full_models import full_model
from goldens import Golden, golden
from ovseg_fast import ops
from parity import fill
from tolerances import ARGMAX_AGREEMENT, GOLDEN_OUTPUT, REWRITE_FLOAT32, relative_error


@pytest.fixture(scope="module")
def goldens() -> Golden:
    return golden("cascade_clip")


@pytest.fixture(scope="module")
def model():
    return full_model("cascade-clip-vitb", "cascade_clip_vitb", "E")


@pytest.fixture(scope="module")
def text(model, goldens):
    with torch.no_grad():
        return model.text_from_prompts(model.encode_text(goldens.tokens(20).unsqueeze(1)))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def offset(goldens, value=0.1):
    flags = torch.zeros(20)
    flags[goldens.facts["seen"]] = value
    return flags


def test_text_embeddings(model, text, goldens):
    assert goldens.error("text.raw", model.text_encoder(goldens.tokens(20))) <= GOLDEN_OUTPUT
    assert goldens.error("text", text) <= GOLDEN_OUTPUT


@pytest.mark.parametrize(("case", "side"), [("full", 512), ("small", 384)])
def test_image_features(model, goldens, case, side):
    pixels = goldens.images(f"{case}.image", side, side).float()
    features, global_embedding, grid = model.image_encoder((pixels - model.pixel_mean) / model.pixel_std)
    for index, tokens in enumerate(features):
        maps = tokens.transpose(1, 2).unflatten(2, grid)
        assert goldens.error(f"{case}.feat{index}", maps) <= GOLDEN_OUTPUT
    assert goldens.error(f"{case}.global", global_embedding) <= GOLDEN_OUTPUT


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_one_crop(model, text, goldens, backend):
    with ovs.backend(backend):
        logits = model(goldens.images("crop.image", 512, 512), text)
    assert logits.shape == (1, 20, 512, 512)
    scores = logits.sigmoid() - offset(goldens)[:, None, None]
    assert goldens.error("crop.pred", scores) <= GOLDEN_OUTPUT


def test_several_prompts_per_class(model, goldens):
    tokens = goldens.tokens(60, "tokens_multi").view(20, 3, 77)
    text = model.text_from_prompts(model.encode_text(tokens))
    logits = model(goldens.images("crop.image", 512, 512), text)
    scores = logits.sigmoid() - offset(goldens)[:, None, None]
    assert goldens.error("crop_multi.pred", scores) <= GOLDEN_OUTPUT


def test_sliding_windows(model, text, goldens):
    # The golden starts from a picture of 600 × 800 without the resizing that goes before; the same windows by hand.
    pixels = goldens.images("slide.image", 600, 800).float()
    positions = [(top, left) for top in (0, 88) for left in (0, 288)]
    crops = torch.cat([pixels[..., top : top + 512, left : left + 512] for top, left in positions])
    logits = torch.cat([model.decode(model.encode_pixels(crop), text) for crop in crops.split(1)])
    placement = ops.Placement(positions, (512, 512), (600, 800), (600, 800))
    scores = ops.score_map(logits, placement, offset=offset(goldens))
    assert goldens.error("slide.pred", scores[None]) <= GOLDEN_OUTPUT
    placement = placement._replace(size=(450, 600))
    rescaled = ops.score_map(logits, placement, offset=offset(goldens))
    assert goldens.error("slide.pred_rescaled", rescaled[None]) <= GOLDEN_OUTPUT
    softmax = model.scores(rescaled)[None]
    assert goldens.error("slide.softmax", softmax) <= GOLDEN_OUTPUT
    labels = ops.label_map(logits, placement, offset=offset(goldens)).numpy().reshape(-1)
    assert (labels[goldens.store["slide.argmax.idx"]] == goldens.store["slide.argmax.val"]).mean() >= ARGMAX_AGREEMENT


def test_head_on_stored_features(model, goldens):
    def unit(name, shape, axis=1):
        return torch.from_numpy(fill.unit(fill.randn(name, shape, "E"), axis))

    features = torch.stack([unit(f"head.in.feat{i}", (2, 512, 32, 32)).flatten(2).transpose(1, 2) for i in range(7)])
    text = unit("head.in.text", (20, 512))
    masks = model.head(model.head.aggregate(features), unit("head.in.global", (2, 512)), text).unflatten(-1, (32, 32))
    masks = torch.nn.functional.interpolate(masks, (512, 512), mode="bilinear", align_corners=False)
    assert goldens.error("head_eval.pred_masks", masks) <= GOLDEN_OUTPUT
    assert goldens.error("head_eval.pred", masks.sigmoid() - offset(goldens)[:, None, None]) <= GOLDEN_OUTPUT
    assert goldens.error("head_eval_selftrain.pred", masks.sigmoid()) <= GOLDEN_OUTPUT


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return ovs.build("cascade-clip-tiny").eval()


def test_a_grid_that_is_not_square(tiny):
    logits = tiny(torch.rand(1, 3, 48, 96), torch.randn(3, 64))
    assert logits.shape == (1, 3, 48, 96)


def test_gradients_reach_what_the_method_trains(tiny):
    tiny.train()
    with torch.enable_grad():
        tiny(torch.rand(1, 3, 96, 96), torch.randn(5, 64)).square().mean().backward()
    for name, parameter in tiny.named_parameters():
        last_layer = ".layers.2." in name and not (".q." in name or ".k." in name)  # only scores of the last are read
        dead = name.startswith("text_encoder.") or last_layer
        assert (parameter.grad is None) == dead, name


def test_stages_are_aggregated_single_features(tiny):
    pixels = torch.rand(2, 3, 96, 96) * 255
    features, global_embedding, grid = tiny.image_encoder((pixels - tiny.pixel_mean) / tiny.pixel_std)
    encoded = tiny.encode_pixels(pixels)
    for stage, expected in zip(encoded.stages, tiny.head.aggregate(torch.stack(features)), strict=True):
        assert relative_error(stage, expected) <= REWRITE_FLOAT32
    assert torch.equal(encoded.global_embedding, global_embedding)
    assert encoded.grid == grid


def test_dropout_only_in_training(tiny):
    images, text = torch.rand(1, 3, 96, 96), torch.randn(5, 64)
    assert torch.equal(tiny(images, text), tiny(images, text))
    tiny.train()
    assert not torch.equal(tiny(images, text), tiny(images, text))


@pytest.mark.parametrize(
    ("images", "text", "error", "words"),
    [
        (torch.rand(1, 3, 90, 96), torch.rand(2, 64), ValueError, "multiples of the 8-pixel patch"),
        (torch.rand(1, 3, 96, 96), torch.rand(2, 1, 64), ValueError, r"text must have shape \(T, 64\)"),
        (torch.rand(1, 3, 96, 96), torch.rand(0, 64), ValueError, "T of at least 1"),
        (torch.zeros(1, 3, 96, 96, dtype=torch.bool), torch.rand(2, 64), TypeError, "images must be uint8"),
    ],
)
def test_bad_input(tiny, images, text, error, words):
    with pytest.raises(error, match=words):
        tiny(images, text)


def test_very_long_images_are_refused(tiny):
    with pytest.raises(ValueError, match="at most 32:1"):
        tiny.windows(torch.zeros(3, 10, 400), "slide")


@pytest.mark.parametrize("size", [(96, 96), (96, 200), (333, 100), (10, 320)])
def test_windows_cover_every_pixel(tiny, size):
    windows = tiny.windows(torch.rand(3, *size) * 255, "slide")
    covered = np.zeros(windows.canvas, bool)
    for top, left in windows.positions:
        covered[top : top + windows.window[0], left : left + windows.window[1]] = True
    assert covered.all()
    assert windows.pixels.shape == (len(windows.positions), 3, 96, 96)
