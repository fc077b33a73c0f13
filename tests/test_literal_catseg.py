"""The literal forms of CAT-Seg's operators and head against the numbers of the published implementation."""

from __future__ import annotations

import pytest
import torch

import literal
from goldens import DEVICE, aggregator_weights, assert_gradients, golden
from tolerances import GOLDEN_CATSEG_GRADIENT, GOLDEN_OUTPUT

OPERATORS_CASE, CASE = golden("catseg_ops"), golden("catseg_aggregator")
OUTPUT = GOLDEN_OUTPUT / 2  # nothing is rewritten here, so no room is needed for another order of summation

# --- operators ---

SWIN = "layers.0.swin_block."
CLASS = "layers.0.attention."


def shared(x, batch):
    """One text or text guidance for every image of the batch."""
    return x[None].expand(batch, *x.shape)


def class_operator(pooling):
    return lambda w, x, guidance: literal.class_aggregation(w, CLASS, x, shared(guidance, len(x)), pooling)


def swin_operator(block, resolution, shift):
    return lambda w, x, guidance: literal.swin_block(w, SWIN + block, x, guidance, resolution, 12, shift, 4)


def correlation(w, img, text):
    return literal.cost_volume(img, shared(text, len(img)))


def embedding(w, x):
    return literal.cost_embedding(x, w["conv1.weight"], w["conv1.bias"])


def aggregator_layer(w, x, guidance, text_guidance):
    return literal.aggregator_layer(w, "layers.1.", x, guidance, shared(text_guidance, len(x)))


OPERATORS = {
    "correlation_p1": correlation,
    "correlation_p3": correlation,
    "corr_embed_p1": embedding,
    "corr_embed_p3": embedding,
    "swin_plain": swin_operator("block_1.", (24, 24), 0),
    "swin_shift": swin_operator("block_2.", (24, 24), 6),
    "swin_small": swin_operator("block_2.", (12, 12), 6),
    "swin_pair": lambda w, x, guidance: literal.swin_pair(w, SWIN, x, guidance),
    "class_pool2_t7": class_operator(2),
    "class_pool1_t7": class_operator((1, 1)),
    "class_pool2_odd": class_operator(2),
    "class_pool2_t256": class_operator(2),
    "class_pool2_t300": class_operator(2),
    "class_pool1_t300": class_operator(1),
    "layer": aggregator_layer,
    "decoder": lambda w, x, g1, g2: literal.decoder(w, x, [g1, g2]),
}


@pytest.mark.parametrize("op", OPERATORS)
def test_operator_in_float64(op):
    leaves = {name: leaf.detach().double() for name, leaf in OPERATORS_CASE.leaves(op).items()}
    out = run_operator(op, leaves)
    assert out.dtype == torch.float64
    assert OPERATORS_CASE.error(f"{op}.out", out) <= OUTPUT


@pytest.mark.parametrize("op", OPERATORS)
def test_operator_with_gradients(op):
    assert_gradients(op, lambda leaves: run_operator(op, leaves), OUTPUT)


def run_operator(op, leaves):
    return OPERATORS[op](leaves, **{n.removeprefix("in."): leaf for n, leaf in leaves.items() if n.startswith("in.")})


def test_shift_mask():
    mask = literal.shift_mask((24, 24), 12, 6)
    assert OPERATORS_CASE.error("swin_shift.attn_mask", mask) == 0
    assert mask.sum(dim=(1, 2)).tolist() == OPERATORS_CASE.store["swin_shift.attn_mask_sum"].tolist()


def test_map_that_is_no_multiple_of_the_window_is_refused():
    x = torch.randn(1, 18 * 24, 128, device=DEVICE)
    with pytest.raises(ValueError, match="18×24"):
        literal.swin_block(aggregator_weights("A"), SWIN + "block_1.", x, x, (18, 24), 12, 0, 4)


# --- the whole head ---

RUNS = {run["op"]: run for run in CASE.facts["runs"]}


def head_inputs(op):
    B, T, P = (RUNS[op][k] for k in "BTP")
    shape = {
        "img": (B, 512, 24, 24),
        "text": (T, P, 512),
        "g0": (B, 512, 24, 24),
        "g1": (B, 256, 48, 48),
        "g2": (B, 128, 96, 96),
    }
    return {n: CASE.randn(f"{op}.in.{n}", s) for n, s in shape.items()}


def run_head(weights, op, inputs):
    text = shared(inputs["text"], len(inputs["img"]))
    rest = {n: x for n, x in inputs.items() if n != "text"}
    return literal.catseg_head(weights, text=text, pooling=tuple(RUNS[op]["pooling"]), **rest)


LARGE = [pytest.param(op, marks=pytest.mark.slow) for op in ("t171", "t256")]


@pytest.mark.parametrize("op", ["t7_pool1", "t7_p3", *LARGE])
def test_catseg_head(op):
    with torch.no_grad():
        out = run_head(aggregator_weights("B", RUNS[op]["P"]), op, head_inputs(op))
    assert CASE.error(f"{op}.out", out) <= OUTPUT


def test_catseg_head_with_gradients():
    weights, inputs = aggregator_weights("B"), head_inputs("t7")
    for leaf in [*weights.values(), *inputs.values()]:
        leaf.requires_grad_()
    out = run_head(weights, "t7", inputs)
    assert CASE.error("t7.out", out) <= OUTPUT
    (out * CASE.randn("t7.cot", out.shape)).sum().backward()
    for name, x in inputs.items():
        assert CASE.error(f"t7.grad.in.{name}", x.grad) <= GOLDEN_CATSEG_GRADIENT, name
    gradients = {name: weight.grad for name, weight in weights.items()}
    CASE.assert_summaries("t7.grads", gradients, GOLDEN_CATSEG_GRADIENT)


def test_class_selection():
    inputs = head_inputs("t300")
    text = inputs["text"][None]
    assert CASE.error("t300.score", literal.class_scores(inputs["img"], text)) <= OUTPUT
    assert literal.select_classes(inputs["img"], text, 256).tolist() == CASE.store["t300.selected"].tolist()


@pytest.mark.slow
def test_catseg_head_keeps_the_best_256_classes():
    with torch.no_grad():
        out = run_head(aggregator_weights("B"), "t300", head_inputs("t300"))
    kept = CASE.store["t300.selected"][0].tolist()
    assert CASE.error("t300.out", out) <= OUTPUT
    assert CASE.error("t300.out_selected", out[:, kept]) <= OUTPUT
    dropped = sorted(set(range(300)) - set(kept))
    assert len(dropped) == 44
    assert (out[:, dropped] == -100).all()


def test_catseg_head_selects_for_each_image():
    weights = aggregator_weights("B", prompts=3)
    inputs = head_inputs("t7")
    text = head_inputs("t7_p3")["text"]
    unit_text = text / text.norm(dim=-1, keepdim=True)
    rest = {n: inputs[n] for n in ("img", "g0", "g1", "g2")}
    unit_img = inputs["img"] / inputs["img"].norm(dim=1, keepdim=True)
    best = torch.einsum("bchw,tpc->btphw", unit_img, unit_text).flatten(2).amax(dim=2).argsort(descending=True)
    kept = [sorted(order[:4].tolist()) for order in best]
    assert kept[0] != kept[1]
    with torch.no_grad():
        out = literal.catseg_head(weights, text=shared(text, 2), pad_len=4, **rest)
        for b, classes in enumerate(kept):
            one = {n: x[b : b + 1] for n, x in rest.items()}
            expected = literal.catseg_head(weights, text=unit_text[None, classes], pad_len=4, **one)
            torch.testing.assert_close(out[b, classes], expected[0], rtol=1e-4, atol=1e-5)
            dropped = sorted(set(range(7)) - set(classes))
            assert (out[b, dropped] == -100).all()


def test_length_of_prompts_counts_only_without_selection():
    weights = aggregator_weights("B", prompts=3)
    # the goldens hardly see the text guidance
    weights["text_guidance_projection.0.weight"] = 30 * weights["text_guidance_projection.0.weight"]
    inputs = head_inputs("t7_p3")
    text = inputs.pop("text")[None, :4]
    longer = text * torch.tensor([1.0, 5.0, 25.0], device=DEVICE)[:, None]
    with torch.no_grad():
        for pad_len, moves in ((4, True), (3, False)):
            a, b = (literal.catseg_head(weights, text=t, pad_len=pad_len, **inputs) for t in (text, longer))
            difference = float((a - b).norm() / (a * (a != -100)).norm())
            assert difference > 1e-2 if moves else difference < 1e-5
