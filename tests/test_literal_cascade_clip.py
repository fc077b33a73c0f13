"""The literal forms of Cascade-CLIP's head and losses against the numbers of the published implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import literal
from goldens import DEVICE, filled, golden
from parity import fill
from tolerances import GOLDEN_CASCADE_CLIP_GRADIENT, GOLDEN_LOSS, GOLDEN_OUTPUT

CASE = golden("cascade_clip")
OUTPUT = GOLDEN_OUTPUT / 2  # nothing is rewritten here, so no room is needed for another order of summation


def cascade_inputs():
    shape = {**{f"feat{i}": (2, 512, 32, 32) for i in range(7)}, "global": (2, 512), "text": (20, 512)}
    return {n: torch.from_numpy(fill.unit(fill.randn(f"head.in.{n}", s, "E"), 1)).to(DEVICE) for n, s in shape.items()}


def cascade_arguments(weights, inputs):
    return weights, [inputs[f"feat{i}"] for i in range(7)], inputs["global"]


def test_cascade_head():
    inputs = cascade_inputs()
    arguments = cascade_arguments(filled("cascade_clip_vitb", "decode_head.", "E"), inputs)
    with torch.no_grad():
        scores = literal.stage_scores(*arguments, inputs["text"])
        masks = literal.cascade_head(*arguments, inputs["text"])
    assert [len(layers) for layers in scores] == [3, 3, 3]
    for k, layers in enumerate(scores):
        for j, layer in enumerate(layers):
            assert CASE.error(f"head_eval.stage{k}.layer{j}.scores", layer) <= OUTPUT
    assert CASE.error("head_eval.pred_masks", masks) <= OUTPUT
    assert CASE.error("head_eval.pred", literal.cascade_scores(masks, CASE.facts["seen"])) <= OUTPUT
    transductive = literal.cascade_scores(masks, CASE.facts["seen"], penalty=0)
    assert CASE.error("head_eval_selftrain.pred", transductive) <= OUTPUT


def test_cascade_head_with_gradients():
    inputs, weights = cascade_inputs(), filled("cascade_clip_vitb", "decode_head.", "E")
    for leaf in [*weights.values(), *inputs.values()]:
        leaf.requires_grad_()
    masks = literal.cascade_head(*cascade_arguments(weights, inputs), inputs["text"][CASE.facts["seen"]])
    assert CASE.error("head_train.pred_masks", masks) <= OUTPUT

    labels = np.stack([fill.labels(f"label{i}", 512, 512, 20, "E") for i in range(2)])
    renumbered = np.full(256, 255)
    renumbered[CASE.facts["seen"]] = np.arange(15)
    labels = torch.from_numpy(renumbered[labels]).to(DEVICE)
    assert CASE.error("label_mapped", labels[:, None]) == 0
    focal, dice = literal.cascade_losses(masks, labels)
    focal = 100 * focal
    assert focal.item() == pytest.approx(CASE.facts["head_train"]["decode.loss_mask"], rel=GOLDEN_LOSS)
    assert dice.item() == pytest.approx(CASE.facts["head_train"]["decode.loss_dice"], rel=GOLDEN_LOSS)

    (focal + dice).backward()
    for name in ("feat0", "feat3", "feat6", "global", "text"):
        assert CASE.error(f"head_train.grad.{name}", inputs[name].grad) <= GOLDEN_CASCADE_CLIP_GRADIENT, name
    for name in ("weights_s1", "weights_s2"):
        assert CASE.error(f"head_train.grad.{name}", weights[name].grad) <= GOLDEN_CASCADE_CLIP_GRADIENT, name
    gradients = {name: weight.grad for name, weight in weights.items()}
    CASE.assert_summaries("head_train.grads", gradients, GOLDEN_CASCADE_CLIP_GRADIENT)


def test_mask_attention_is_pytorchs_multi_head_attention():
    generator = torch.Generator().manual_seed(0)
    attention = torch.nn.MultiheadAttention(64, 8, batch_first=True, dtype=torch.float64)
    query = torch.randn(2, 5, 64, generator=generator, dtype=torch.float64)
    memory = torch.randn(2, 9, 64, generator=generator, dtype=torch.float64)
    weights = {"proj.weight": attention.out_proj.weight, "proj.bias": attention.out_proj.bias}
    for i, name in enumerate("qkv"):
        weights[name + ".weight"] = attention.in_proj_weight[64 * i : 64 * (i + 1)]
        weights[name + ".bias"] = attention.in_proj_bias[64 * i : 64 * (i + 1)]
    out, scores = literal.mask_attention(weights, "", query, memory)
    torch.testing.assert_close(out, attention(query, memory, memory)[0])
    q, k = (F.linear(x, weights[n + ".weight"], weights[n + ".bias"]) for n, x in (("q", query), ("k", memory)))
    torch.testing.assert_close(scores, q @ k.transpose(1, 2) / (8 * 8**0.5))


def test_gaussian_weights_are_those_that_the_goldens_start_from():
    expected = torch.tensor([np.exp(-2.0), np.exp(-0.5), 1.0], dtype=torch.float32)
    torch.testing.assert_close(literal.gaussian_weights(3), expected)


@pytest.mark.parametrize("case", ["loss_plain", "loss_one_ignored"])
def test_cascade_losses_with_gradient(case):
    logits = CASE.randn("loss.in.logits", (2, 15, 48, 64)).requires_grad_()
    labels = np.stack([fill.labels(f"loss.label{i}", 96, 128, 15, "E") for i in range(2)])
    if case == "loss_one_ignored":
        labels[1] = 255
    focal, dice = literal.cascade_losses(logits, torch.from_numpy(labels).to(DEVICE))
    assert 100 * focal.item() == pytest.approx(CASE.facts["loss_cases"][case]["loss_mask"], rel=GOLDEN_LOSS)
    assert dice.item() == pytest.approx(CASE.facts["loss_cases"][case]["loss_dice"], rel=GOLDEN_LOSS)
    (100 * focal + dice).backward()
    assert CASE.error(f"{case}.grad.logits", logits.grad) <= GOLDEN_CASCADE_CLIP_GRADIENT
