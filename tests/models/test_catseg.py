"""CAT-Seg as a whole against the golden numbers of the published code, and its behaviour at the edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

import ovseg_fast as ovs
from full_models import full_model
from goldens import Golden, golden
from ovseg_fast import ops
from ovseg_fast.models import CATSeg
from ovseg_fast.models.sliding import resize
from tolerances import ARGMAX_AGREEMENT, BFLOAT16_TINY, GOLDEN_OUTPUT, relative_error


@pytest.fixture(scope="module")
def goldens() -> Golden:
    return golden("catseg_vitb")


@pytest.fixture(scope="module")
def model():
    return full_model("catseg-vitb", "catseg_vitb", "C")


@pytest.fixture(scope="module")
def text(model, goldens):
    with torch.no_grad():
        return model.encode_text(goldens.tokens(7).unsqueeze(1))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return ovs.build("catseg-tiny").eval()


EVALS = {"square": (384, 384, 384, 384), "wide": (480, 640, 240, 320), "padded": (375, 500, 375, 500)}


def test_text_embeddings(model, text, goldens):
    raw = model.clip.text(goldens.tokens(7))
    assert goldens.error("text_raw", raw) <= GOLDEN_OUTPUT
    assert goldens.error("text", text[:, 0]) <= GOLDEN_OUTPUT


@pytest.mark.parametrize(("case", "backend"), [("square", "torch"), *((case, "auto") for case in EVALS)])
def test_one_image(model, text, goldens, case, backend):
    """In PyTorch form, and on what is chosen by itself."""
    height, width, out_height, out_width = EVALS[case]
    images = goldens.images(f"{case}.image", height, width)
    clip_input = model.preprocess(images.float())
    with ovs.backend(backend):
        dense, blocks, grid = model.clip.visual.dense_features(clip_input, (3, 7))
        features = model.encode_image(images)
        logits = model(images, text)

    assert goldens.error(f"{case}.clip_input", clip_input) <= GOLDEN_OUTPUT
    assert goldens.error(f"{case}.dense", dense) <= GOLDEN_OUTPUT
    for name, tokens in zip(("block_a", "block_b"), blocks, strict=True):
        maps = tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
        assert goldens.error(f"{case}.{name}", maps) <= GOLDEN_OUTPUT
    for name, maps in zip(("res4", "res5"), features.appearance, strict=True):
        assert goldens.error(f"{case}.{name}", maps.permute(0, 3, 1, 2)) <= GOLDEN_OUTPUT
    assert goldens.error(f"{case}.logits", logits) <= GOLDEN_OUTPUT
    assert goldens.error(f"{case}.sigmoid", logits.sigmoid()) <= GOLDEN_OUTPUT
    final = ops.score_map(logits, ops.Placement([(0, 0)], (96, 96), (96, 96), (out_height, out_width)))
    assert goldens.error(f"{case}.sem_seg", final) <= GOLDEN_OUTPUT


def test_segmenter_whole_mode_gives_the_published_probabilities(model, text, goldens):
    segmenter = ovs.Segmenter(model)
    out = segmenter.segment(goldens.image("padded.image", 375, 500), mode="whole", text=text)
    assert goldens.error("padded.sem_seg", out.scores) <= GOLDEN_OUTPUT
    assert (out.labels == out.scores.argmax(0)).mean() >= ARGMAX_AGREEMENT


def test_segmenter_slide_mode_gives_the_published_probabilities(model, text, goldens):
    segmenter = ovs.Segmenter(model)
    image = goldens.image("slide.image", 480, 640)
    encoded = segmenter.encode(Image.fromarray(image), mode="slide")
    clip_input = model.preprocess(encoded.windows.pixels)
    assert goldens.error("slide.clip_input", clip_input) <= GOLDEN_OUTPUT
    logits = torch.cat([model.decode(features, text, 1) for features in encoded.features])
    assert goldens.error("slide.logits", logits) <= GOLDEN_OUTPUT
    out = encoded.segment(text=text)
    assert goldens.error("slide.sem_seg", out.scores) <= GOLDEN_OUTPUT
    assert (out.labels.reshape(-1)[goldens.store["slide.argmax.idx"]] == goldens.store["slide.argmax.val"]).mean() >= (
        ARGMAX_AGREEMENT
    )


def test_slide_with_the_training_pooling(model, text, goldens):
    image = torch.from_numpy(goldens.image("slide_pool2.image", 480, 640)).permute(2, 0, 1).float()
    windows = model.windows(image, "slide")
    logits = torch.cat([model.decode(model.encode_pixels(one), text, 2) for one in windows.pixels.split(1)])
    assert goldens.error("slide_pool2.logits", logits) <= GOLDEN_OUTPUT
    placement = ops.Placement(windows.positions, windows.window, windows.canvas, (640, 640))
    final = ops.score_map(logits[:-1], placement, whole=logits[-1:])
    assert goldens.error("slide_pool2.sem_seg", final) <= GOLDEN_OUTPUT


def test_vitl():
    goldens = golden("catseg_vitl")
    model = full_model("catseg-vitl", "catseg_vitl", "D")
    text = model.encode_text(goldens.tokens(5).unsqueeze(1))
    images = goldens.images("padded.image", 427, 640)
    assert goldens.error("text", text[:, 0]) <= GOLDEN_OUTPUT
    assert goldens.error("padded.dense", model.clip.visual.dense_features(model.preprocess(images.float()), ())[0]) <= (
        GOLDEN_OUTPUT
    )
    logits = model(images, text)
    assert goldens.error("padded.logits", logits) <= GOLDEN_OUTPUT
    final = ops.score_map(logits, ops.Placement([(0, 0)], (96, 96), (96, 96), (427, 640)))
    assert goldens.error("padded.sem_seg", final) <= GOLDEN_OUTPUT


def test_uint8_and_float_images_agree(tiny):
    images = torch.randint(0, 256, (2, 3, 50, 70), dtype=torch.uint8)
    text = torch.randn(3, 1, 64)
    assert relative_error(tiny(images.float() / 255, text), tiny(images, text)) <= GOLDEN_OUTPUT


def test_classes_beyond_the_list_length_are_chosen_image_by_image(tiny):
    images, text = torch.rand(2, 3, 96, 96), torch.nn.functional.normalize(torch.randn(37, 1, 64), dim=-1)
    logits = tiny(images, text)
    volume = ops.cost_volume(tiny.encode_image(images).dense, text)
    for image_logits, scores in zip(logits, volume.amax((2, 3, 4)), strict=True):
        kept = scores.topk(32).indices.sort().values
        dropped = torch.tensor([i for i in range(37) if i not in kept.tolist()])
        assert (image_logits[dropped] == -100).all()
        assert (image_logits[kept] != -100).any(-1).any(-1).all()


def test_a_half_precision_model_takes_both_kinds_of_images(tiny):
    images, text = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8), torch.randn(5, 1, 64)
    expected = tiny(images, text)
    half = tiny.to(torch.bfloat16)
    for given in (images, images.float() / 255):
        logits = half(given, text.bfloat16())
        assert logits.dtype == torch.bfloat16
        assert relative_error(logits, expected) <= BFLOAT16_TINY


def test_a_half_precision_model_chooses_the_same_classes(tiny):
    """300 names, of which 32 are computed: from the same features, those that float32 chooses."""
    features = tiny.encode_image(torch.rand(2, 3, 96, 96))
    dense, *appearance = (maps.bfloat16() for maps in (features.dense, *features.appearance))
    alike = dense[0, 0, 0].float() + 0.1 * torch.randn(300, 1, 64)  # cosines that bfloat16 would round to ties
    text = torch.nn.functional.normalize(alike, dim=-1).bfloat16()
    wide = type(features)(dense.float(), tuple(maps.float() for maps in appearance))
    expected = tiny.decode(wide, text.float())
    logits = tiny.to(torch.bfloat16).decode(type(features)(dense, tuple(appearance)), text)
    chosen = (expected != -100).flatten(2).any(2)
    assert (chosen.sum(1) == 32).all()
    assert torch.equal((logits != -100).flatten(2).any(2), chosen)
    assert relative_error(logits[chosen], expected[chosen]) <= BFLOAT16_TINY


def test_batch_equals_single_images(tiny):
    images, text = torch.rand(3, 3, 64, 80), torch.randn(5, 1, 64)
    together = tiny(images, text)
    for one, logits in zip(images, together, strict=True):
        assert relative_error(tiny(one[None], text)[0], logits) <= GOLDEN_OUTPUT


def test_class_attention_is_configured(tiny):
    full = CATSeg(replace(tiny.config, class_attention="full")).eval()
    full.load_state_dict(tiny.state_dict())
    assert [layer.classes.attention for layer in full.aggregator.layers] == ["full", "full"]
    assert [layer.classes.attention for layer in tiny.aggregator.layers] == ["linear", "linear"]
    images, text = torch.rand(1, 3, 64, 64), torch.randn(5, 1, 64)
    assert relative_error(full(images, text), tiny(images, text)) > 1e-4
    with pytest.raises(ValueError, match="class_attention must be 'linear' or 'full', got 'softmax'"):
        replace(tiny.config, class_attention="softmax")


def test_gradients_reach_every_trainable_part_but_the_dead_ones(tiny):
    tiny.train()
    with torch.enable_grad():
        text = tiny.encode_text(torch.randint(1, 49000, (5, 1, 77)))
        tiny(torch.rand(1, 3, 96, 96), text).square().mean().backward()
    without = {name for name, parameter in tiny.named_parameters() if parameter.grad is None}
    # The value-only last block never reads its queries and keys; CLIP's temperature is not used at all.
    assert without == {
        "clip.logit_scale",
        "clip.visual.transformer.resblocks.5.attn.q_proj_weight",
        "clip.visual.transformer.resblocks.5.attn.k_proj_weight",
    }


@pytest.mark.parametrize(
    ("images", "text", "error", "words"),
    [
        (torch.rand(3, 96, 96), torch.rand(2, 1, 64), ValueError, r"images must have shape \(B, 3, h, w\)"),
        (torch.rand(1, 4, 96, 96), torch.rand(2, 1, 64), ValueError, "images must have shape"),
        (torch.zeros(1, 3, 96, 96, dtype=torch.int64), torch.rand(2, 1, 64), TypeError, "images must be uint8"),
        (torch.rand(1, 3, 96, 96), torch.rand(2, 64), ValueError, r"text must have shape \(T, 1, 64\)"),
        (torch.rand(1, 3, 96, 96), torch.rand(2, 2, 64), ValueError, "text must have shape"),
        (torch.rand(1, 3, 96, 96), torch.rand(2, 1, 31), ValueError, "text must have shape"),
        (torch.rand(1, 3, 96, 96), torch.rand(0, 1, 64), ValueError, "T of at least 1"),
    ],
)
def test_bad_input(tiny, images, text, error, words):
    with pytest.raises(error, match=words):
        tiny(images, text)


def test_whole_mode_warns_of_images_smaller_than_the_map(tiny, caplog):
    for _ in range(25):
        tiny.windows(torch.rand(3, 40, 96), "whole")
    lines = [record.message for record in caplog.records]  # the first and the tenth, not all of them
    assert lines == [
        f"mode 'whole' misplaces labels of images under 48 pixels, {n} so far; 'slide' does not." for n in (1, 10)
    ]


def test_resize_is_the_identity_at_the_same_size():
    images = torch.rand(1, 3, 5, 7)
    assert resize(images, 5, 7) is images
