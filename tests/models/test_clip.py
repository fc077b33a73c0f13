"""The CLIP adapter against open_clip itself, which it takes its modules and weights from."""

from __future__ import annotations

import copy

import pytest
import torch

from ovseg_fast.compat import ensure_importable
from ovseg_fast.models.clip import CLIP, TEXT_BATCH, resize_positions
from ovseg_fast.models.presets import PRESETS
from tolerances import REWRITE_FLOAT64, relative_error

ensure_importable()
import open_clip  # noqa: E402

TINY = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
}


def build(**changes):
    config = copy.deepcopy(TINY)
    for name, value in changes.items():
        tower, key = name.split("__")
        config[tower][key] = value
    return config, open_clip.CLIP(**config).double().eval()


@pytest.fixture
def pair(tmp_path):
    config, theirs = build()
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    return CLIP(config, tmp_path / "clip.pt").double().eval(), theirs.float().double()


def tokens(rows, length=20):
    ids = torch.randint(1, 98, (rows, length))
    for row in ids:
        end = int(torch.randint(2, length, ()))
        row[end] = 99
        row[end + 1 :] = 0
    return ids


def test_text_encoder_equals_open_clip(pair):
    ours, theirs = pair
    ids = tokens(7)
    with torch.no_grad():
        assert relative_error(ours.text(ids), theirs.encode_text(ids)) <= REWRITE_FLOAT64


def test_text_encoder_equals_open_clip_beyond_one_batch_and_for_any_leading_shape(pair):
    ours, theirs = pair
    ids = tokens(TEXT_BATCH + 4)
    with torch.no_grad():
        expected = theirs.encode_text(ids)
        got = ours.text(ids.view(2, -1, 20))
    assert got.shape == (2, TEXT_BATCH // 2 + 2, 24)
    assert relative_error(got.flatten(0, 1), expected) <= REWRITE_FLOAT64


def test_text_encoder_gradients_equal_open_clip(pair):
    ours, theirs = pair
    ids = tokens(5)
    ours.text(ids).square().sum().backward()
    theirs.encode_text(ids).square().sum().backward()
    assert relative_error(ours.text.token_embedding.weight.grad, theirs.token_embedding.weight.grad) <= REWRITE_FLOAT64
    block, reference = ours.text.transformer.resblocks[0].attn, theirs.transformer.resblocks[0].attn
    joined = torch.cat([block.q_proj_weight.grad, block.k_proj_weight.grad, block.v_proj_weight.grad])
    assert relative_error(joined, reference.in_proj_weight.grad) <= REWRITE_FLOAT64


def test_image_encoder_equals_open_clip(pair):
    ours, theirs = pair
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        x, grid = ours.visual.embed(pixels, "bicubic")
        for block in ours.visual.transformer.resblocks:
            x = block(x)
        assert grid == (4, 4)
        assert relative_error(ours.visual.project(x[:, 0]), theirs.encode_image(pixels)) <= REWRITE_FLOAT64


def test_dense_features_return_the_outputs_of_the_given_blocks(pair):
    ours, _ = pair
    pixels = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    with torch.no_grad():
        x, _ = ours.visual.embed(pixels, "bicubic")
        first = ours.visual.transformer.resblocks[0](x)
        second = ours.visual.transformer.resblocks[1](first)
        dense, outputs, grid = ours.visual.dense_features(pixels, (0, 1))
    assert grid == (4, 6) and dense.shape == (1, 25, 24)
    assert torch.equal(outputs[0], first) and torch.equal(outputs[1], second)


def test_gelu_follows_the_configuration():
    exact = CLIP({**TINY, "quick_gelu": False}).visual.transformer.resblocks[0].mlp
    quick = CLIP(TINY).visual.transformer.resblocks[0].mlp
    quick.load_state_dict(exact.state_dict())
    x = torch.randn(3, 32)
    assert relative_error(quick(x), exact(x)) > 1e-3


def test_layer_scale_is_kept(tmp_path):
    config, theirs = build(vision_cfg__ls_init_value=0.3)
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    ours = CLIP(config, tmp_path / "clip.pt").double().eval()
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        x, _ = ours.visual.embed(pixels, "bicubic")
        for block in ours.visual.transformer.resblocks:
            x = block(x)
        assert relative_error(ours.visual.project(x[:, 0]), theirs.encode_image(pixels)) <= 1e-6


def test_separate_text_towers_work():
    joint, separate = CLIP(TINY), CLIP({**TINY, "custom_text": True})
    separate.load_state_dict(joint.state_dict())
    ids = tokens(3)
    assert torch.equal(separate.text(ids), joint.text(ids))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("no-such-model", "must be a model name of open_clip's or a configuration dict"),
        ("RN50", "is a ModifiedResNet, not a vision transformer"),
        ({**TINY, "vision_cfg": {**TINY["vision_cfg"], "attentional_pool": True}}, "does not pool by the class token"),
        ({**TINY, "vision_cfg": {**TINY["vision_cfg"], "pool_type": "avg"}}, "does not pool by the class token"),
        ({**TINY, "text_cfg": {**TINY["text_cfg"], "no_causal_mask": True}}, "not causal"),
        ({**TINY, "text_cfg": {**TINY["text_cfg"], "pool_type": "last"}}, "does not read the end token"),
        ({**TINY, "vision_cfg": {**TINY["vision_cfg"], "qk_norm": True}}, "not the plain pre-norm kind"),
    ],
)
def test_models_that_do_not_fit_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        CLIP(config)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_positions_keep_the_class_and_resize_the_grid(mode):
    positions = torch.randn(1 + 12, 5)
    assert resize_positions(positions, (3, 4), (3, 4), mode) is positions
    resized = resize_positions(positions, (3, 4), (6, 2), mode)
    assert resized.shape == (13, 5) and torch.equal(resized[0], positions[0])
    grid = positions[1:].view(3, 4, 5).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(grid, (6, 2), mode=mode)[0].permute(1, 2, 0).reshape(12, 5)
    assert torch.equal(resized[1:], expected)


def test_text_encoder_refuses_anything_but_token_ids():
    clip = CLIP(TINY)
    with pytest.raises(TypeError, match="integer token ids"):
        clip.text(torch.rand(2, 20))
    with pytest.raises(ValueError, match="at most 20 positions"):
        clip.text(torch.ones(2, 21, dtype=torch.long))


def test_presets_name_models_that_open_clip_knows():
    names = {preset.config.clip for preset in PRESETS.values() if isinstance(preset.config.clip, str)}
    assert names <= set(open_clip.list_models())
