"""The literal forms of CLIP's encoders against the numbers of the published implementations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import literal
from goldens import filled, golden
from literal_images import CLIP, CLIP_PIXELS, IMAGENET_PIXELS, normalised
from tolerances import GOLDEN_OUTPUT

OUTPUT = GOLDEN_OUTPUT / 2  # nothing is rewritten here, so no room is needed for another order of summation


@pytest.mark.parametrize(
    ("case", "keys", "prefix", "raw"),
    [
        ("cascade_clip", "cascade_clip_vitb", "text_encoder.", "text.raw"),
        ("catseg_vitb", "catseg_vitb", CLIP, "text_raw"),
        ("catseg_vitl", "catseg_vitl", CLIP, "text_raw"),
    ],
    ids=["joint", "split", "split-large"],
)
def test_text_encoder(case, keys, prefix, raw):
    case = golden(case)
    names = ("token_embedding", "positional_embedding", "transformer.", "ln_final", "text_projection")
    weights = {}
    for name in names:
        weights.update({name + rest: w for rest, w in filled(keys, prefix + name, case.salt).items()})
    with torch.no_grad():
        features = literal.text_encoder(weights, case.tokens(len(case.store[raw])))
    assert case.error(raw, features) <= OUTPUT
    assert case.error("text", F.normalize(features, dim=-1)) <= OUTPUT


def test_dense_image_encoder():
    case = golden("catseg_vitb")
    weights = filled("catseg_vitb", CLIP + "visual.", "C")
    pixels = normalised(case.images("square.image", 384, 384), CLIP_PIXELS)
    assert case.error("square.clip_input", pixels) <= OUTPUT
    with torch.no_grad():
        dense, (early, late) = literal.dense_image_encoder(weights, pixels)
        positions = literal.resize_positions(weights["positional_embedding"], (24, 24), "bicubic")
    assert case.error("pos_embed_24", positions) <= OUTPUT
    assert case.error("square.block_a", early) <= OUTPUT
    assert case.error("square.block_b", late) <= OUTPUT
    assert case.error("square.dense", dense) <= OUTPUT


def test_layer_gather():
    case = golden("cascade_clip")
    weights = filled("cascade_clip_vitb", "backbone.", "E")
    pixels = normalised(case.images("small.image", 384, 384), IMAGENET_PIXELS)
    with torch.no_grad():
        features, global_embedding = literal.layer_gather(weights, *literal.prompted_image_encoder(weights, pixels))
    assert len(features) == 7
    for i, feature in enumerate(features):
        assert case.error(f"small.feat{i}", feature) <= OUTPUT
    assert case.error("small.global", global_embedding) <= OUTPUT
