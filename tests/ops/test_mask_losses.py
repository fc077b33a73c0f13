"""Mask losses: golden numbers, the literal form, labels of no class, extreme logits, and what is held in memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import literal
import ovseg_fast as ovs
import samples
from counterparts import assert_rewrite
from goldens import DEVICE, cascade_inputs, filled, golden
from ovseg_fast import backends, ops
from ovseg_fast.ops import mask_losses as function
from parity import fill
from tolerances import GOLDEN_CASCADE_CLIP_GRADIENT, GOLDEN_LOSS, REWRITE_FLOAT32, REWRITE_FLOAT64, relative_error

FORMS = ["torch", "triton"] if "mask_losses" in backends.operators_with_kernels() else ["torch"]
CASCADE = ("focal", "dice")


NO_LABELS = {"loss_one_ignored": [1], "loss_all_ignored": [0, 1]}  # images without any


def golden_labels(case: str) -> Tensor:
    labels = np.stack([fill.labels(f"loss.label{i}", 96, 128, 15, "E") for i in range(2)])
    labels[NO_LABELS.get(case, [])] = 255
    return torch.from_numpy(labels).to(DEVICE)


@pytest.mark.slow_in_interpreter
@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("case", ["loss_plain", "loss_one_ignored", "loss_small_logits", "loss_all_ignored"])
def test_golden(case: str) -> None:
    stored = golden("cascade_clip")
    logits = stored.randn("loss.in.logits", (2, 15, 48, 64)).requires_grad_()
    losses = ops.mask_losses(logits, golden_labels(case), terms=CASCADE)
    facts = stored.facts["loss_cases"][case]
    assert 100 * losses["focal"].item() == pytest.approx(facts["loss_mask"], rel=GOLDEN_LOSS)
    assert losses["dice"].item() == pytest.approx(facts["loss_dice"], rel=GOLDEN_LOSS)
    if f"{case}.grad.logits" in stored:
        (100 * losses["focal"] + losses["dice"]).backward()
        assert logits.grad is not None
        assert stored.error(f"{case}.grad.logits", logits.grad) <= GOLDEN_CASCADE_CLIP_GRADIENT


def test_golden_of_the_whole_head() -> None:
    """Losses of the masks that the published head gives in training."""
    stored, weights = golden("cascade_clip"), filled("cascade_clip_vitb", "decode_head.", "E")
    features, image, text = cascade_inputs()
    maps = [layer.transpose(1, 2).unflatten(2, (32, 32)) for layer in features]
    seen = stored.facts["seen"]
    with torch.no_grad():
        masks = literal.cascade_masks(weights, maps, image, text[seen])
    renumbered = np.full(256, 255, dtype=np.uint8)
    renumbered[seen] = np.arange(len(seen))
    labels = renumbered[np.stack([fill.labels(f"label{i}", 512, 512, 20, "E") for i in range(2)])]
    losses = ops.mask_losses(masks, torch.from_numpy(labels).to(DEVICE), terms=CASCADE)
    facts = stored.facts["head_train"]
    assert 100 * losses["focal"].item() == pytest.approx(facts["decode.loss_mask"], rel=GOLDEN_LOSS)
    assert losses["dice"].item() == pytest.approx(facts["decode.loss_dice"], rel=GOLDEN_LOSS)


@settings(max_examples=50)
@given(
    sizes=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 3),
            "classes": st.integers(1, 9),
            "map_size": st.tuples(st.integers(1, 7), st.integers(1, 7)),
            "size": st.tuples(st.integers(1, 20), st.integers(1, 20)),
            "terms": st.sampled_from([("bce",), ("focal",), ("dice",), ("dice", "bce"), ("bce", "focal", "dice")]),
            "no_class": st.sampled_from([255, 9, -1]),
            "dtype": st.sampled_from([torch.int32, torch.int64]),
        }
    )
)
def test_rewrite(sizes: dict[str, Any]) -> None:
    assert_rewrite("mask_losses", samples.draw(samples.mask_losses(**sizes)))


def losses_and_gradient(form: str, logits: Tensor, labels: Tensor, **keywords: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Losses and the gradient of their sum."""
    logits = logits.detach().clone().requires_grad_()
    with ovs.backend(form):
        losses = ops.mask_losses(logits, labels, **keywords)
    (gradient,) = torch.autograd.grad(sum(losses.values()), logits)
    return losses, gradient


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("map_size", "size"),
    [((1, 1), (5, 3)), ((2, 1), (4, 7)), ((5, 4), (5, 4)), ((6, 5), (3, 2)), ((2, 40), (3, 50)), ((3, 2), (4, 33))],
)
def test_every_pixel_counts_once(form: str, map_size: tuple[int, int], size: tuple[int, int]) -> None:
    """Equal logits 0 have slope ½ at every pixel, so the gradient sums up to half the mean of 1."""
    logits, labels = torch.zeros(2, 3, *map_size), torch.full((2, *size), 255)
    losses, gradient = losses_and_gradient(form, logits, labels)
    assert losses["bce"].item() == pytest.approx(math.log(2), rel=1e-6)
    assert gradient.sum().item() == pytest.approx(0.5, rel=1e-5)
    weights = torch.ones(1, 1, *size, dtype=torch.float64)
    share = torch.zeros(1, 1, *map_size, dtype=torch.float64, requires_grad=True)
    (F.interpolate(share, size, mode="bilinear") * weights).sum().backward()
    assert share.grad is not None
    assert relative_error(gradient, (share.grad / (2 * 6 * math.prod(size))).expand(2, 3, -1, -1)) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_labels_of_no_class_are_negative_for_all(form: str, rng: torch.Generator) -> None:
    """255, and any other number that is no class, however large."""
    logits = torch.randn(1, 3, 2, 2, generator=rng)
    labels = torch.randint(3, (1, 4, 4), generator=rng)
    hole = labels.clone()
    hole[0, 1:3] = 255
    expected, expected_gradient = losses_and_gradient(form, logits, hole, terms=("bce", "focal", "dice"))
    for nothing in (3, -1, 2**32, -(2**40) + 1):
        other = labels.clone()
        other[0, 1:3] = nothing
        losses, gradient = losses_and_gradient(form, logits, other, terms=("bce", "focal", "dice"))
        assert torch.equal(gradient, expected_gradient)
        assert all(torch.equal(losses[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_labels_as_any_integers(form: str, rng: torch.Generator) -> None:
    logits = torch.randn(1, 3, 2, 2, generator=rng)
    labels = torch.tensor([0, 1, 2, 255])[torch.randint(4, (1, 4, 4), generator=rng)]
    expected, expected_gradient = losses_and_gradient(form, logits, labels, terms=("bce", "dice"))
    for dtype in (torch.int32, torch.uint8):
        losses, gradient = losses_and_gradient(form, logits, labels.to(dtype), terms=("bce", "dice"))
        assert torch.equal(gradient, expected_gradient)
        assert all(torch.equal(losses[name], expected[name]) for name in expected)


def test_labels_made_under_inference_mode_are_refused_if_a_gradient_is_needed() -> None:
    logits = torch.zeros(1, 3, 2, 2)
    with torch.inference_mode():
        labels = torch.zeros(1, 4, 4).long()
    assert ops.mask_losses(logits, labels)["bce"].isfinite()
    with pytest.raises(ValueError, match=r"mask_losses: labels was made under .* pass labels\.clone\(\)"):
        ops.mask_losses(logits.requires_grad_(), labels)


def test_the_pytorch_form_compiles_as_one_graph(rng: torch.Generator) -> None:
    logits, labels = torch.randn(2, 3, 4, 5, generator=rng), torch.randint(3, (2, 7, 9), generator=rng)
    compiled = torch.compile(ops.mask_losses, fullgraph=True, backend="aot_eager")
    leaf = logits.clone().requires_grad_()
    losses = compiled(leaf, labels, terms=("bce", "dice"))
    (gradient,) = torch.autograd.grad(sum(losses.values()), leaf)
    expected, expected_gradient = losses_and_gradient("torch", logits, labels, terms=("bce", "dice"))
    assert relative_error(gradient, expected_gradient) <= REWRITE_FLOAT32
    assert all(relative_error(losses[name], expected[name]) <= REWRITE_FLOAT32 for name in expected)


@pytest.mark.parametrize("form", FORMS)
def test_no_mask_at_all_leaves_focal_and_no_dice(form: str) -> None:
    losses, gradient = losses_and_gradient(
        form, torch.zeros(2, 3, 2, 2), torch.full((2, 4, 4), 255), terms=("dice", "focal")
    )
    assert list(losses) == ["dice", "focal"]
    assert losses["dice"] == 0
    assert losses["focal"].item() == pytest.approx(2 * 3 * 0.75 * 0.25 * math.log(2), rel=1e-6)
    assert (gradient > 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_confident_logits_keep_their_digits(form: str, dtype: torch.dtype) -> None:
    """Also where 1 + exp(x) is 1 in float32, and where exp(x) overflows."""
    for size in (3.0, 20.0, 60.0, 300.0):
        for own, x in ((False, -size), (False, size), (True, size), (True, -size)):
            logits, labels = torch.full((1, 1, 1, 1), x, dtype=dtype), torch.full((1, 2, 2), 0 if own else 255)
            losses, gradient = losses_and_gradient(form, logits, labels, terms=("bce", "focal"))
            z = -x if own else x
            softplus = math.log1p(math.exp(-abs(z))) + max(z, 0.0)
            q, rest = (1 / (1 + math.exp(-v)) for v in (z, -z))
            alpha = 0.25 if own else 0.75
            assert losses["bce"].dtype == torch.float32
            assert losses["bce"].item() == pytest.approx(softplus, rel=1e-5, abs=1e-38)
            assert losses["focal"].item() == pytest.approx(alpha * q**2 * softplus, rel=1e-5, abs=1e-38)
            slope = q + alpha * q**2 * (2 * rest * softplus + q)
            limit = 1e-5 if dtype == torch.float32 else 1e-2
            assert gradient.item() == pytest.approx(-slope if own else slope, rel=limit, abs=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_losses_and_sums_stay_in_float32_under_autocast(form: str, rng: torch.Generator) -> None:
    logits = torch.randn(1, 3, 4, 4, generator=rng)
    labels = torch.randint(3, (1, 9, 7), generator=rng)
    expected, _ = losses_and_gradient(form, logits, labels, terms=("bce", "dice"))
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = losses_and_gradient(form, logits, labels, terms=("bce", "dice"))
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


def test_float64_runs_in_pytorch_under_autocast_too(rng: torch.Generator) -> None:
    logits, labels = torch.randn(1, 3, 2, 2, generator=rng).double(), torch.randint(3, (1, 4, 4), generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.mask_losses(logits, labels)["bce"].dtype == torch.float64
        with ovs.backend("triton"), pytest.raises(RuntimeError, match="not float64"):
            ops.mask_losses(logits, labels)


def test_maps_too_large_for_the_kernels_are_refused() -> None:
    logits = torch.zeros(1).expand(1, 1, 40000, 1)
    labels = torch.zeros(1, dtype=torch.uint8).expand(1, 40000, 1)
    with ovs.backend("triton"), pytest.raises(RuntimeError, match="more than 31 bits"):
        ops.mask_losses(logits, labels)


class Largest(TorchDispatchMode):
    """The most elements that any result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, called: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = called(*arguments, **(keywords or {}))
        self.elements = max([self.elements, *(tensor.numel() for tensor in samples.tensors(result))])
        return result


def test_nothing_of_all_classes_at_full_size_is_held(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(function.__globals__, "CHUNK_ELEMENTS", 5000)
    logits, labels = torch.randn(2, 30, 10, 10, generator=rng), torch.randint(30, (2, 40, 50), generator=rng)
    with Largest() as seen:
        losses_and_gradient("torch", logits, labels, terms=("bce", "focal", "dice"))
    assert logits.numel() <= seen.elements <= 6000  # the logits themselves, 3 maps at most besides


def test_other_terms_do_not_change_a_loss(rng: torch.Generator) -> None:
    logits, labels = torch.randn(2, 4, 3, 3, generator=rng).double(), torch.randint(4, (2, 8, 9), generator=rng)
    together = ops.mask_losses(logits, labels, terms=("dice", "bce", "focal"))
    for name, loss in together.items():
        assert relative_error(ops.mask_losses(logits, labels, terms=(name,))[name], loss) <= REWRITE_FLOAT64
