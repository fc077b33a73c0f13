"""Training losses: against the literal forms in small, against the golden numbers at full size."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import distributed, multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

import ovseg_fast as ovs
from full_models import (
    full_model,
    literal_cascade_losses,
    literal_catseg_loss,
    upstream_gradients,
    upstream_trainable,
)
from goldens import golden
from loss_of_one import loss_of_one
from ovseg_fast.checkpoints import to_upstream
from ovseg_fast.models import CascadeCLIP, get_preset
from ovseg_fast.training.finetuning import set_trainable
from ovseg_fast.training.labels import seen_classes, seen_labels
from parity import fill
from tolerances import (
    CANCELLED_FLOAT64,
    GOLDEN_CASCADE_CLIP_GRADIENT,
    GOLDEN_CATSEG_GRADIENT,
    GOLDEN_LOSS,
    REWRITE_FLOAT64,
    REWRITE_GRADIENT_FACTOR,
    relative_error,
)

CLASSES = 7


def small_model(preset, policy):
    """A small model without dropout, all its parameters moved from zero and one, in float64."""
    if preset == "cascade-clip-tiny":  # the literal form knows stages of three layers only
        config = get_preset(preset).config
        clip = config.clip | {"vision_cfg": config.clip["vision_cfg"] | {"layers": 7}}
        model = CascadeCLIP(replace(config, clip=clip, stages=((0, 1, 2), (3, 4, 5))))
    else:
        model = ovs.build(preset)
    model = model.double().train()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout"):
            module.dropout = 0.0
    set_trainable(model, policy)
    return model


def some_images(rng, batch=2, side=96):
    return torch.rand(batch, 3, side, side, generator=rng, dtype=torch.float64)


def some_labels(rng, batch=2, height=64, width=80):
    """Classes in blocks, some pixels of no class, under several names for it."""
    blocks = torch.randint(-1, CLASSES + 1, (batch, height // 16, width // 16), generator=rng)
    blocks[blocks == CLASSES] = 255
    blocks[:, 0, :2] = torch.tensor([-1, 255])  # of both names, some for sure
    return blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)


def some_tokens(rng, classes=CLASSES):
    tokens = torch.randint(1, 49000, (classes, 1, 77), generator=rng)
    ends = torch.randint(3, 20, (classes,), generator=rng)
    tokens[torch.arange(classes), 0, ends] = 49407
    return tokens


@pytest.fixture
def small_heads(monkeypatch):
    """The literal CLIP with the small presets' heads."""
    monkeypatch.setattr(sys.modules["literal.encoder_block"], "HEAD_WIDTH", 16)


def leaves(model):
    """The model's weights under upstream's names, requiring gradients where the model's own do."""
    trainable = set(upstream_trainable(model))
    return {name: tensor.requires_grad_(name in trainable) for name, tensor in to_upstream(model).items()}


def assert_same_gradients(model, weights):
    """All gradients are those of the literal form; what cancels exactly there is small beside the largest one."""
    gradients = upstream_gradients(model)
    largest = max(float(weight.grad.norm()) for weight in weights.values() if weight.grad is not None)
    compared = 0
    for name, gradient in gradients.items():
        literal = weights[name].grad
        if gradient is None:
            assert literal is None or not literal.any(), name
            continue
        difference = float((gradient - literal).norm())
        limit = REWRITE_GRADIENT_FACTOR * REWRITE_FLOAT64 * float(literal.norm())
        assert difference <= max(limit, CANCELLED_FLOAT64 * largest), name
        compared += bool(literal.norm() > 1e-6 * largest)
    assert compared >= len(gradients) // 2


@pytest.mark.parametrize("policy", ["attention", "full"])
def test_catseg_loss_and_gradients_are_the_literal_ones(rng, small_heads, policy):
    model = small_model("catseg-tiny", policy)
    images, labels, tokens = some_images(rng), some_labels(rng), some_tokens(rng)
    losses = model.loss(images, labels, model.encode_text(tokens))
    losses["loss"].backward()
    weights = leaves(model)
    literal = literal_catseg_loss(model, weights, images * 255, labels, tokens)
    literal.backward()
    assert list(losses) == ["bce", "loss"]
    assert losses["bce"] == losses["loss"]
    assert relative_error(losses["loss"], literal) <= REWRITE_FLOAT64
    assert_same_gradients(model, weights)


@pytest.mark.parametrize("policy", ["prompt", "attention", "full"])
def test_cascade_losses_and_gradients_are_the_literal_ones(rng, small_heads, policy):
    model = small_model("cascade-clip-tiny", policy)
    images, labels = some_images(rng), some_labels(rng)
    text = torch.nn.functional.normalize(torch.randn(CLASSES, 64, generator=rng, dtype=torch.float64), dim=-1)
    losses = model.loss(images, labels, text)
    losses["loss"].backward()
    weights = leaves(model)
    focal, dice = literal_cascade_losses(model, weights, images * 255, labels, text)
    (100 * focal + dice).backward()
    assert list(losses) == ["focal", "dice", "loss"]
    assert relative_error(losses["focal"], 100 * focal) <= REWRITE_FLOAT64
    assert relative_error(losses["dice"], dice) <= REWRITE_FLOAT64
    assert relative_error(losses["loss"], 100 * focal + dice) <= REWRITE_FLOAT64
    assert_same_gradients(model, weights)


@pytest.mark.parametrize("preset", ["catseg-tiny", "cascade-clip-tiny"])
def test_all_labels_outside_the_classes_count_as_no_class(rng, preset):
    model = small_model(preset, None).eval()
    images, labels = some_images(rng), some_labels(rng)
    text = torch.randn(CLASSES, *[1] * (preset == "catseg-tiny"), 64, generator=rng, dtype=torch.float64)
    expected = model.loss(images, labels, text)["loss"]
    for nothing in (-1, 255, CLASSES, -100):
        other = labels.masked_fill((labels < 0) | (labels == 255), nothing)
        assert torch.equal(model.loss(images, other.int(), text)["loss"], expected)
    outside = labels.masked_fill(labels < 0, 255).to(torch.uint8)
    assert torch.equal(model.loss(images, outside, text)["loss"], expected)
    assert not torch.equal(model.loss(images, labels.clamp(min=0), text)["loss"], expected)


def test_255_is_a_regular_class(rng):
    model, images = small_model("cascade-clip-tiny", None).eval(), some_images(rng)
    text = torch.randn(300, 64, generator=rng, dtype=torch.float64)
    labels = torch.full((2, 16, 16), 255, dtype=torch.uint8)
    assert model.loss(images, labels, text)["dice"] > 0
    assert model.loss(images, torch.full((2, 16, 16), -1), text)["dice"] == 0


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("preset", ["catseg-tiny", "cascade-clip-tiny"])
def test_no_map_of_all_classes_at_the_labels_size(rng, preset):
    model, classes, side = ovs.build(preset), 16, 512
    set_trainable(model)
    text = torch.randn(classes, *[1] * (preset == "catseg-tiny"), 64, generator=rng)
    labels = torch.randint(-1, classes, (1, side, side), generator=rng)
    with Largest() as largest:
        model.loss(torch.rand(1, 3, 96, 96, generator=rng), labels, text)["loss"].backward()
    assert side**2 <= largest.elements <= classes * side**2 / 4


BAD_LABELS = [
    (
        torch.zeros(1, 8, 8),
        TypeError,
        "labels must be a uint8, int32 or int64 tensor .* got torch.float32",
    ),
    ([[0]], TypeError, "labels must be .* got list"),
    (torch.zeros(8, 8, dtype=torch.int64), ValueError, r"labels must have shape \(B, H, W\) with B = 1 .*got \(8, 8\)"),
    (torch.zeros(2, 8, 8, dtype=torch.int64), ValueError, r"B = 1 as in images .*got \(2, 8, 8\)"),
    (torch.zeros(1, 0, 8, dtype=torch.int64), ValueError, r"no size zero, got \(1, 0, 8\)"),
    (torch.zeros(1, 8, 8, dtype=torch.int64, device="meta"), ValueError, "labels are on meta but images are on cpu"),
]


@pytest.mark.parametrize("preset", ["catseg-tiny", "cascade-clip-tiny"])
@pytest.mark.parametrize(("labels", "error", "words"), BAD_LABELS)
def test_bad_labels(preset, labels, error, words):
    text = torch.rand(3, 1, 64) if preset == "catseg-tiny" else torch.rand(3, 64)
    with pytest.raises(error, match=words):
        ovs.build(preset).loss(torch.rand(1, 3, 96, 96), labels, text)


def test_bad_images_and_text():
    model, labels = ovs.build("catseg-tiny"), torch.zeros(1, 8, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, h, w\)"):
        model.loss(torch.rand(1, 4, 96, 96), labels, torch.rand(3, 1, 64))
    with pytest.raises(ValueError, match=r"text must have shape \(T, 1, 64\)"):
        model.loss(torch.rand(1, 3, 96, 96), labels, torch.rand(3, 64))


# --- several processes ---


def uneven_batch(rng):
    """Four images of which two processes get every second one, with few and with many masks."""
    images, labels = some_images(rng, 4), some_labels(rng, 4)
    labels[0], labels[2] = 3, -1
    return images, labels, torch.randn(CLASSES, 64, generator=rng, dtype=torch.float64)


def masks_in(labels):
    return sum(len({*label.unique().tolist()} & set(range(CLASSES))) for label in labels)


def test_losses_are_divided_by_the_mean_number_of_masks(rng, monkeypatch):
    model = small_model("cascade-clip-tiny", None).eval()
    images, labels, text = uneven_batch(rng)
    with torch.no_grad():
        expected = model.loss(images, labels, text)
        total = masks_in(labels)
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(distributed, "all_reduce", lambda count: count.fill_(total))
        halves = [model.loss(images[rank::2], labels[rank::2], text) for rank in range(2)]
        assert masks_in(labels[::2]) == 1  # nothing would show if both had as many
    for name, loss in expected.items():
        assert float(halves[0][name] + halves[1][name]) / 2 == pytest.approx(float(loss), rel=1e-6)  # counts: float32


@pytest.mark.slow
def test_the_mean_over_processes_is_the_loss_of_all_images(rng, tmp_path):
    model = ovs.build("cascade-clip-tiny").double().eval()
    images, labels, text = uneven_batch(rng)
    with torch.no_grad():
        expected = model.loss(images, labels, text)
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        arguments = (tmp_path / "store", model.state_dict(), images, labels, text, results)
        multiprocessing.spawn(loss_of_one, arguments, nprocs=2)
        found = [results[rank] for rank in range(2)]
    for name, loss in expected.items():
        assert (found[0][name] + found[1][name]) / 2 == pytest.approx(float(loss), rel=1e-6)


# --- golden numbers of the published code ---


def golden_batch(goldens, side, classes, label):
    """Images (2, 3, side, side) and labels (2, side, side)."""
    images = torch.cat([goldens.images(f"train.image{i}", side, side) for i in range(2)])
    labels = [torch.from_numpy(fill.labels(f"{label}{i}", side, side, classes, goldens.salt)) for i in range(2)]
    return images, torch.stack(labels).to(images.device)


@pytest.mark.slow
def test_catseg_training_step_is_the_published_one():
    goldens = golden("catseg_vitb")
    model = full_model("catseg-vitb", "catseg_vitb", "C").train()
    set_trainable(model)
    images, labels = golden_batch(goldens, 384, 7, "train.label")
    loss = model.loss(images, labels, model.encode_text(goldens.tokens(7).unsqueeze(1)))["loss"]
    loss.backward()
    assert relative_error(loss, goldens.facts["train"]["loss"]) <= GOLDEN_LOSS
    gradients = upstream_gradients(model)
    goldens.assert_summaries("train.grads", gradients, GOLDEN_CATSEG_GRADIENT)
    goldens.assert_sampled("train.grad.", gradients, GOLDEN_CATSEG_GRADIENT)


@pytest.mark.slow
def test_cascade_training_step_is_the_published_one():
    goldens = golden("cascade_clip")
    model = full_model("cascade-clip-vitb", "cascade_clip_vitb", "E")  # no dropout, as there
    set_trainable(model)
    images, labels = golden_batch(goldens, 512, 20, "label")
    labels = seen_labels(labels, 20, goldens.facts["novel"])
    with torch.no_grad():
        text = model.text_from_prompts(model.encode_text(goldens.tokens(20).unsqueeze(1)))
    losses = model.loss(images, labels, text[seen_classes(20, goldens.facts["novel"])])
    losses["loss"].backward()
    facts = goldens.facts["full_train"]
    assert relative_error(losses["focal"], facts["decode.loss_mask"]) <= GOLDEN_LOSS
    assert relative_error(losses["dice"], facts["decode.loss_dice"]) <= GOLDEN_LOSS
    gradients = upstream_gradients(model)
    goldens.assert_summaries("full_train.grads", gradients, GOLDEN_CASCADE_CLIP_GRADIENT)
    goldens.assert_sampled("full_train.grad.", gradients, GOLDEN_CASCADE_CLIP_GRADIENT)
