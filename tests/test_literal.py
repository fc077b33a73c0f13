"""The literal forms against the numbers of the published implementations in `parity/`."""

from __future__ import annotations

import json
from functools import cache
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import literal
from parity import fill
from tolerances import (
    ARGMAX_AGREEMENT,
    GOLDEN_CASCADE_CLIP_GRADIENT,
    GOLDEN_CATSEG_GRADIENT,
    GOLDEN_LOSS,
    GOLDEN_OPERATOR_GRADIENT,
    GOLDEN_OUTPUT,
    ZERO_GRADIENT,
)

PARITY = Path(__file__).parent / "parity"
AGGREGATOR = "sem_seg_head.predictor.transformer."
CLIP = "sem_seg_head.predictor.clip_model."

OUTPUT = GOLDEN_OUTPUT / 2  # nothing is rewritten here, so no room is needed for another order of summation


@cache
def golden(case):
    with np.load(PARITY / f"{case}.npz") as store:
        return dict(store), json.loads((PARITY / f"{case}.json").read_text())


@cache
def shapes(keys):
    return json.loads((PARITY / f"keys_{keys}.json").read_text())["state"]


def filled(keys, prefix, salt, full_names=True, dtype=torch.float32):
    """The synthetic weights below `prefix`, keyed without it; the stream is that of the full or of the short name."""
    weights = {}
    for full, shape in shapes(keys).items():
        if full.startswith(prefix) and not fill.is_buffer(full):
            short = full[len(prefix) :]
            weights[short] = torch.from_numpy(fill.fill(full if full_names else short, shape, salt).copy()).to(dtype)
    assert weights
    return weights


def aggregator_weights(salt, prompts=1, dtype=torch.float32):
    weights = filled("catseg_vitb", AGGREGATOR, salt, full_names=False, dtype=dtype)
    weights["conv1.weight"] = torch.from_numpy(fill.fill("conv1.weight", (128, prompts, 7, 7), salt)).to(dtype)
    return weights


def randn(name, shape, salt, dtype=torch.float32):
    return torch.from_numpy(fill.randn(name, shape, salt)).to(dtype)


def tokens(count, salt, name="tokens"):
    return torch.from_numpy(fill.tokens(count, salt, name))


def error(store, name, tensor):
    return fill.rel_err(store, name, tensor.detach().numpy())


def assert_only_rounding(weights, name):
    """The gradient of a key bias that softmax is invariant to."""
    assert weights[name].grad.norm() <= ZERO_GRADIENT * weights[name.replace("bias", "weight")].grad.norm()


def assert_summaries(weights, grads, salt, limit, invariant=()):
    """Norm and a random projection of every parameter gradient, and which parameters receive none."""
    assert sorted(grads["grad_norm"]) == sorted(n for n, w in weights.items() if w.grad is not None)
    assert sorted(grads["grad_none"]) == sorted(n for n, w in weights.items() if w.grad is None)
    for name, norm in grads["grad_norm"].items():
        if name.endswith(tuple(invariant)):
            assert_only_rounding(weights, name)
            continue
        grad = weights[name].grad.double()
        assert abs(float(grad.norm()) - norm) <= limit * norm, name
        dot = float((grad * randn(f"dot.{name}", grad.shape, salt).double()).sum())
        assert abs(dot - grads["grad_dot"][name]) <= limit * norm, name


@pytest.mark.parametrize("row", json.loads((PARITY / "fill_check.json").read_text()), ids=lambda r: r["name"])
def test_generated_arrays_are_those_of_the_goldens(row):
    if row["kind"] == "image":
        array = fill.image(row["name"], *row["shape"], row["salt"])
    elif row["kind"] == "tokens":
        array = fill.tokens(row["shape"][0], row["salt"], row["name"])
    elif row["kind"] == "labels":
        array = fill.labels(row["name"], *row["shape"], row["classes"], row["salt"])
    elif row["kind"] == "sample_index":
        array = fill.sample_index(row["name"], row["size"])
    else:
        array = getattr(fill, row["kind"])(row["name"], row["shape"], row["salt"])
    assert fill.checksum(array) == row["crc32"]


# ------------------------------------------------------------------------------------------------ CAT-Seg operators

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


def operator_inputs(op, dtype):
    shape = golden("catseg_ops")[1]["ops"][op]["inputs"]
    inputs = {n: randn(f"{op}.in.{n}", s, "A", dtype) for n, s in shape.items()}
    return aggregator_weights("A", 3 if op.endswith("p3") else 1, dtype), inputs


# these two take seconds each and hold nothing that the others lack
@pytest.mark.parametrize("op", [op for op in OPERATORS if op not in ("layer", "class_pool1_t7")])
def test_catseg_operator_in_float64(op):
    store, _ = golden("catseg_ops")
    weights, inputs = operator_inputs(op, torch.float64)
    with torch.no_grad():
        out = OPERATORS[op](weights, **inputs)
    assert out.dtype == torch.float64
    assert error(store, f"{op}.out", out) <= OUTPUT


class Gates:
    """ReLU in which the chosen inputs that are zero within rounding are taken to lie on the other side.

    ReLU has no derivative at 0: where rounding decides the side of an input, either gradient is right, and one such
    input alone moves some gradients by 1e-3.
    """

    TIE = 3e-6

    def __init__(self, flipped=()):
        self.flipped, self.found, self.outputs = flipped, 0, []

    def __call__(self, x):
        ties = (x.detach().abs() < self.TIE).flatten().nonzero().flatten()
        gate = x.detach() > 0
        for position in ties.tolist():
            gate.view(-1)[position] ^= self.found in self.flipped
            self.found += 1
        out = x * gate
        out.retain_grad()
        self.outputs.append((out, ties))
        return out

    def that_matter(self):
        """Numbers of the ties that have a gradient to stop or let through; those of padded classes have none."""
        grads = torch.cat([out.grad.flatten()[ties] for out, ties in self.outputs])
        return grads.nonzero().flatten().tolist()


def gradient_errors(op, gates):
    """Relative error of every stored gradient; those that are zero in exact arithmetic are checked at once."""
    store, _ = golden("catseg_ops")
    weights, inputs = operator_inputs(op, torch.float32)
    for leaf in [*weights.values(), *inputs.values()]:
        leaf.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "relu", gates)
        out = OPERATORS[op](weights, **inputs)
    assert error(store, f"{op}.out", out) <= OUTPUT
    (out * randn(f"{op}.cot", out.shape, "A")).sum().backward()
    compared = [n[len(f"{op}.grad.") :] for n in fill.names(store) if n.startswith(f"{op}.grad.")]
    assert {f"in.{n}" for n in inputs} <= set(compared)
    errors = {}
    for name in compared:
        if "swin_block" in name and name.endswith("attn.k.bias"):
            assert_only_rounding(weights, name)
        else:
            leaf = inputs[name[3:]] if name.startswith("in.") else weights[name]
            errors[name] = error(store, f"{op}.grad.{name}", leaf.grad)
    return errors


@pytest.mark.parametrize("op", OPERATORS)
def test_catseg_operator_with_gradients(op):
    gates = Gates()
    errors = gradient_errors(op, gates)
    if max(errors.values()) > GOLDEN_OPERATOR_GRADIENT and gates.found:
        ties = gates.that_matter()
        other_sides = chain(combinations(ties, 1), combinations(ties, 2))
        tried = (gradient_errors(op, Gates(flipped)) for flipped in other_sides)
        errors = next((e for e in tried if max(e.values()) <= GOLDEN_OPERATOR_GRADIENT), errors)
    assert max(errors.values()) <= GOLDEN_OPERATOR_GRADIENT, errors


def test_shift_mask():
    store, _ = golden("catseg_ops")
    mask = literal.shift_mask((24, 24), 12, 6)
    assert error(store, "swin_shift.attn_mask", mask) == 0
    assert mask.sum(dim=(1, 2)).tolist() == store["swin_shift.attn_mask_sum"].tolist()


def test_map_that_is_no_multiple_of_the_window_is_refused():
    x = torch.randn(1, 18 * 24, 128)
    with pytest.raises(ValueError, match="18×24"):
        literal.swin_block(aggregator_weights("A"), SWIN + "block_1.", x, x, (18, 24), 12, 0, 4)


# --------------------------------------------------------------------------------------------- CAT-Seg's whole head

RUNS = {run["op"]: run for run in golden("catseg_aggregator")[1]["runs"]}


def head_inputs(op):
    B, T, P = (RUNS[op][k] for k in "BTP")
    shape = {
        "img": (B, 512, 24, 24),
        "text": (T, P, 512),
        "g0": (B, 512, 24, 24),
        "g1": (B, 256, 48, 48),
        "g2": (B, 128, 96, 96),
    }
    return {n: randn(f"{op}.in.{n}", s, "B") for n, s in shape.items()}


def run_head(weights, op, inputs):
    text = shared(inputs["text"], len(inputs["img"]))
    rest = {n: x for n, x in inputs.items() if n != "text"}
    return literal.catseg_head(weights, text=text, pooling=tuple(RUNS[op]["pooling"]), **rest)


LARGE = [pytest.param(op, marks=pytest.mark.slow) for op in ("t171", "t256")]


@pytest.mark.parametrize("op", ["t7_pool1", "t7_p3", *LARGE])
def test_catseg_head(op):
    store, _ = golden("catseg_aggregator")
    with torch.no_grad():
        out = run_head(aggregator_weights("B", RUNS[op]["P"]), op, head_inputs(op))
    assert error(store, f"{op}.out", out) <= OUTPUT


def test_catseg_head_with_gradients():
    store, info = golden("catseg_aggregator")
    weights, inputs = aggregator_weights("B"), head_inputs("t7")
    for leaf in [*weights.values(), *inputs.values()]:
        leaf.requires_grad_()
    out = run_head(weights, "t7", inputs)
    assert error(store, "t7.out", out) <= OUTPUT
    (out * randn("t7.cot", out.shape, "B")).sum().backward()
    for name, x in inputs.items():
        assert error(store, f"t7.grad.in.{name}", x.grad) <= GOLDEN_CATSEG_GRADIENT, name
    invariant = [f"swin_block.block_{b}.attn.k.bias" for b in (1, 2)]
    assert_summaries(weights, info["t7.grads"], "B", GOLDEN_CATSEG_GRADIENT, invariant)


def test_class_selection():
    store, _ = golden("catseg_aggregator")
    inputs = head_inputs("t300")
    text = inputs["text"][None]
    assert error(store, "t300.score", literal.class_scores(inputs["img"], text)) <= OUTPUT
    assert literal.select_classes(inputs["img"], text, 256).tolist() == store["t300.selected"].tolist()


@pytest.mark.slow
def test_catseg_head_keeps_the_best_256_classes():
    store, _ = golden("catseg_aggregator")
    with torch.no_grad():
        out = run_head(aggregator_weights("B"), "t300", head_inputs("t300"))
    kept = store["t300.selected"][0].tolist()
    assert error(store, "t300.out", out) <= OUTPUT
    assert error(store, "t300.out_selected", out[:, kept]) <= OUTPUT
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
    longer = text * torch.tensor([1.0, 5.0, 25.0])[:, None]
    with torch.no_grad():
        for pad_len, moves in ((4, True), (3, False)):
            a, b = (literal.catseg_head(weights, text=t, pad_len=pad_len, **inputs) for t in (text, longer))
            difference = float((a - b).norm() / (a * (a != -100)).norm())
            assert difference > 1e-2 if moves else difference < 1e-5


# ---------------------------------------------------------------------------------------------------- text and image


@pytest.mark.parametrize(
    ("case", "keys", "prefix", "salt", "raw"),
    [
        ("cascade_clip", "cascade_clip_vitb", "text_encoder.", "E", "text.raw"),
        ("catseg_vitb", "catseg_vitb", CLIP, "C", "text_raw"),
        ("catseg_vitl", "catseg_vitl", CLIP, "D", "text_raw"),
    ],
    ids=["joint", "split", "split-large"],
)
def test_text_encoder(case, keys, prefix, salt, raw):
    store, _ = golden(case)
    names = ("token_embedding", "positional_embedding", "transformer.", "ln_final", "text_projection")
    weights = {}
    for name in names:
        weights.update({name + rest: w for rest, w in filled(keys, prefix + name, salt).items()})
    with torch.no_grad():
        features = literal.text_encoder(weights, tokens(len(store[raw]), salt))
    assert error(store, raw, features) <= OUTPUT
    assert error(store, "text", F.normalize(features, dim=-1)) <= OUTPUT


CLIP_PIXELS = (122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.3231630)
IMAGENET_PIXELS = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def image(name, size, salt):
    return torch.from_numpy(fill.image(name, *size, salt)).permute(2, 0, 1)[None].float()


def normalised(pixels, constants):
    mean, std = (torch.tensor(c).reshape(1, 3, 1, 1) for c in constants)
    return (pixels - mean) / std


def resized(maps, size):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def test_dense_image_encoder():
    store, _ = golden("catseg_vitb")
    weights = filled("catseg_vitb", CLIP + "visual.", "C")
    pixels = normalised(image("square.image", (384, 384), "C"), CLIP_PIXELS)
    assert error(store, "square.clip_input", pixels) <= OUTPUT
    with torch.no_grad():
        dense, (early, late) = literal.dense_image_encoder(weights, pixels)
        positions = literal.resize_positions(weights["positional_embedding"], (24, 24), "bicubic")
    assert error(store, "pos_embed_24", positions) <= OUTPUT
    assert error(store, "square.block_a", early) <= OUTPUT
    assert error(store, "square.block_b", late) <= OUTPUT
    assert error(store, "square.dense", dense) <= OUTPUT


def test_layer_gather():
    store, _ = golden("cascade_clip")
    weights = filled("cascade_clip_vitb", "backbone.", "E")
    pixels = normalised(image("small.image", (384, 384), "E"), IMAGENET_PIXELS)
    with torch.no_grad():
        features, global_embedding = literal.layer_gather(weights, *literal.prompted_image_encoder(weights, pixels))
    assert len(features) == 7
    for i, feature in enumerate(features):
        assert error(store, f"small.feat{i}", feature) <= OUTPUT
    assert error(store, "small.global", global_embedding) <= OUTPUT


# ---------------------------------------------------------------------------------------------- Cascade-CLIP's head


def cascade_inputs():
    shape = {**{f"feat{i}": (2, 512, 32, 32) for i in range(7)}, "global": (2, 512), "text": (20, 512)}
    return {n: torch.from_numpy(fill.unit(fill.randn(f"head.in.{n}", s, "E"), 1)) for n, s in shape.items()}


def cascade_arguments(weights, inputs):
    return weights, [inputs[f"feat{i}"] for i in range(7)], inputs["global"]


def test_cascade_head():
    store, info = golden("cascade_clip")
    inputs = cascade_inputs()
    arguments = cascade_arguments(filled("cascade_clip_vitb", "decode_head.", "E"), inputs)
    with torch.no_grad():
        scores = literal.stage_scores(*arguments, inputs["text"])
        masks = literal.cascade_head(*arguments, inputs["text"])
    assert [len(layers) for layers in scores] == [3, 3, 3]
    for k, layers in enumerate(scores):
        for j, layer in enumerate(layers):
            assert error(store, f"head_eval.stage{k}.layer{j}.scores", layer) <= OUTPUT
    assert error(store, "head_eval.pred_masks", masks) <= OUTPUT
    assert error(store, "head_eval.pred", literal.cascade_scores(masks, info["seen"])) <= OUTPUT
    transductive = literal.cascade_scores(masks, info["seen"], penalty=0)
    assert error(store, "head_eval_selftrain.pred", transductive) <= OUTPUT


def test_cascade_head_with_gradients():
    store, info = golden("cascade_clip")
    inputs, weights = cascade_inputs(), filled("cascade_clip_vitb", "decode_head.", "E")
    for leaf in [*weights.values(), *inputs.values()]:
        leaf.requires_grad_()
    masks = literal.cascade_head(*cascade_arguments(weights, inputs), inputs["text"][info["seen"]])
    assert error(store, "head_train.pred_masks", masks) <= OUTPUT

    labels = np.stack([fill.labels(f"label{i}", 512, 512, 20, "E") for i in range(2)])
    renumbered = np.full(256, 255)
    renumbered[info["seen"]] = np.arange(15)
    labels = torch.from_numpy(renumbered[labels])
    assert error(store, "label_mapped", labels[:, None]) == 0
    focal, dice = literal.cascade_losses(masks, labels)
    focal = 100 * focal
    assert focal.item() == pytest.approx(info["head_train"]["decode.loss_mask"], rel=GOLDEN_LOSS)
    assert dice.item() == pytest.approx(info["head_train"]["decode.loss_dice"], rel=GOLDEN_LOSS)

    (focal + dice).backward()
    for name in ("feat0", "feat3", "feat6", "global", "text"):
        assert error(store, f"head_train.grad.{name}", inputs[name].grad) <= GOLDEN_CASCADE_CLIP_GRADIENT, name
    for name in ("weights_s1", "weights_s2"):
        assert error(store, f"head_train.grad.{name}", weights[name].grad) <= GOLDEN_CASCADE_CLIP_GRADIENT, name
    invariant = [f"layers.{j}.multihead_attn.k.bias" for j in (0, 1)]
    assert_summaries(weights, info["head_train.grads"], "E", GOLDEN_CASCADE_CLIP_GRADIENT, invariant)


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


# -------------------------------------------------------------------------------------------------------- label maps


def bilinear(maps, size):
    """Resize of (..., h, w) with align_corners=False, pixel centre by pixel centre, in numpy."""

    def matrix(n, m):
        rows = np.zeros((m, n))
        for i in range(m):
            position = max((i + 0.5) * n / m - 0.5, 0)
            low = min(int(position), n - 1)
            rows[i, low] += 1 - (position - low)
            rows[i, min(low + 1, n - 1)] += position - low
        return rows

    return matrix(maps.shape[-2], size[0]) @ maps @ matrix(maps.shape[-1], size[1]).T


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def covering_average(maps, corners, height, width):
    """At every pixel the mean over the windows that hold it, found pixel by pixel."""
    h, w = maps.shape[-2:]
    out = np.empty((maps.shape[1], height, width))
    for y in range(height):
        for x in range(width):
            hits = [
                window[:, y - top, x - left]
                for window, (top, left) in zip(maps, corners, strict=True)
                if 0 <= y - top < h and 0 <= x - left < w
            ]
            out[:, y, x] = np.mean(hits, axis=0)
    return out


def test_window_positions():
    assert literal.catseg_corners() == [(0, 0), (0, 256), (256, 0), (256, 256)]
    assert literal.cascade_corners((600, 800)) == [(0, 0), (0, 288), (88, 0), (88, 288)]
    assert literal.cascade_corners((512, 512)) == [(0, 0)]
    assert literal.cascade_corners((512, 938)) == [(0, 0), (0, 426)]
    assert literal.cascade_corners((512, 939)) == [(0, 0), (0, 426), (0, 427)]
    with pytest.raises(ValueError, match="image_size"):
        literal.cascade_corners((511, 800))


def test_catseg_label_map():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 3, 6, 6, generator=generator, dtype=torch.float64)
    out = literal.catseg_label_map(logits, (25, 31), size=40, window=24)
    windows = sigmoid(bilinear(logits.numpy(), (24, 24)))
    local = covering_average(windows[:4], [(0, 0), (0, 16), (16, 0), (16, 16)], 40, 40)
    expected = bilinear((local + bilinear(windows[4], (40, 40))) / 2, (25, 31))
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-12)


def test_cascade_label_map():
    generator = torch.Generator().manual_seed(0)
    masks = 3 * torch.randn(6, 4, 4, 4, generator=generator, dtype=torch.float64)
    image_size, out_size, seen = (20, 33), (27, 41), [0, 2]
    arguments = {"seen": seen, "crop": 16, "stride": 13}
    corners = [(0, 0), (0, 13), (0, 17), (4, 0), (4, 13), (4, 17)]
    scores = sigmoid(bilinear(masks.numpy(), (16, 16)))
    scores[:, seen] -= 0.1
    average = covering_average(scores, corners, *image_size)
    got = literal.cascade_window_average(masks, image_size, **arguments)
    np.testing.assert_allclose(got.numpy(), average, rtol=0, atol=1e-12)
    exponentials = np.exp(bilinear(average, out_size))
    got = literal.cascade_label_map(masks, image_size, out_size, **arguments)
    np.testing.assert_allclose(got.numpy(), exponentials / exponentials.sum(axis=0), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="6, one per window"):
        literal.cascade_label_map(masks[:5], image_size, out_size, **arguments)


def agreement(store, name, labels):
    return (labels.numpy().reshape(-1)[store[f"{name}.idx"]] == store[f"{name}.val"]).mean()


@pytest.mark.slow
@pytest.mark.parametrize(("op", "pooling", "out_size"), [("slide", 1, (480, 640)), ("slide_pool2", 2, (640, 640))])
def test_catseg_sliding_windows_from_image_to_labels(op, pooling, out_size):
    store, _ = golden("catseg_vitb")
    picture = image(f"{op}.image", (480, 640), "C")
    large = resized(picture, (640, 640))
    crops = [large[:, :, top : top + 384, left : left + 384] for top, left in literal.catseg_corners()]
    pixels = normalised(torch.cat([*crops, resized(picture, (384, 384))]), CLIP_PIXELS)
    assert error(store, f"{op}.clip_input", pixels) <= OUTPUT
    upsample = {n: filled("catseg_vitb", n + ".", "C") for n in ("upsample1", "upsample2")}
    with torch.no_grad():
        dense, guidance = literal.dense_image_encoder(filled("catseg_vitb", CLIP + "visual.", "C"), pixels)
        g1, g2 = (
            F.conv_transpose2d(g, w["weight"], w["bias"], stride=w["weight"].shape[-1])
            for g, w in zip(guidance, upsample.values(), strict=True)
        )
        features = dense[:, 1:].transpose(1, 2).reshape(5, 512, 24, 24)
        text = shared(torch.from_numpy(store["text"])[:, None], 5)
        weights = filled("catseg_vitb", AGGREGATOR, "C")
        logits = literal.catseg_head(weights, features, text, g1, g2, pooling)
    assert error(store, f"{op}.logits", logits) <= OUTPUT
    probabilities = literal.catseg_label_map(logits, out_size)
    assert error(store, f"{op}.sem_seg", probabilities) <= OUTPUT
    assert agreement(store, f"{op}.argmax", probabilities.argmax(dim=0)) >= ARGMAX_AGREEMENT


@pytest.mark.slow
def test_cascade_sliding_windows_from_image_to_labels():
    store, info = golden("cascade_clip")
    picture = normalised(image("slide.image", (600, 800), "E"), IMAGENET_PIXELS)
    corners = literal.cascade_corners((600, 800))
    crops = torch.cat([picture[:, :, top : top + 512, left : left + 512] for top, left in corners])
    text = torch.from_numpy(store["text"])
    backbone, head = (filled("cascade_clip_vitb", part, "E") for part in ("backbone.", "decode_head."))
    with torch.no_grad():
        gathered = literal.layer_gather(backbone, *literal.prompted_image_encoder(backbone, crops))
        masks = literal.cascade_masks(head, *gathered, text)
    average = literal.cascade_window_average(masks, (600, 800), info["seen"])[None]
    assert error(store, "slide.pred", average) <= OUTPUT
    assert error(store, "slide.pred_rescaled", resized(average, (450, 600))) <= OUTPUT
    probabilities = literal.cascade_label_map(masks, (600, 800), (450, 600), info["seen"])[None]
    assert error(store, "slide.softmax", probabilities) <= OUTPUT
    assert agreement(store, "slide.argmax", probabilities.argmax(dim=1)) >= ARGMAX_AGREEMENT


# ------------------------------------------------------------------------------------------------------------ losses


@pytest.mark.slow
def test_catseg_training_loss():
    store, info = golden("catseg_vitb")
    pixels = torch.cat([normalised(image(f"train.image{i}", (384, 384), "C"), CLIP_PIXELS) for i in range(2)])
    upsample = {n: filled("catseg_vitb", n + ".", "C") for n in ("upsample1", "upsample2")}
    with torch.no_grad():
        dense, guidance = literal.dense_image_encoder(filled("catseg_vitb", CLIP + "visual.", "C"), pixels)
        g1, g2 = (
            F.conv_transpose2d(g, w["weight"], w["bias"], stride=w["weight"].shape[-1])
            for g, w in zip(guidance, upsample.values(), strict=True)
        )
        features = dense[:, 1:].transpose(1, 2).reshape(2, 512, 24, 24)
        text = shared(torch.from_numpy(store["text"])[:, None], 2)
        logits = literal.catseg_head(filled("catseg_vitb", AGGREGATOR, "C"), features, text, g1, g2, 2)
    assert error(store, "train.logits", logits) <= OUTPUT
    labels = torch.from_numpy(np.stack([fill.labels(f"train.label{i}", 384, 384, 7, "C") for i in range(2)]))
    assert literal.catseg_loss(logits, labels).item() == pytest.approx(info["train"]["loss"], rel=GOLDEN_LOSS)


@pytest.mark.parametrize("case", ["loss_plain", "loss_one_ignored"])
def test_cascade_losses_with_gradient(case):
    store, info = golden("cascade_clip")
    logits = randn("loss.in.logits", (2, 15, 48, 64), "E").requires_grad_()
    labels = np.stack([fill.labels(f"loss.label{i}", 96, 128, 15, "E") for i in range(2)])
    if case == "loss_one_ignored":
        labels[1] = 255
    focal, dice = literal.cascade_losses(logits, torch.from_numpy(labels))
    assert 100 * focal.item() == pytest.approx(info["loss_cases"][case]["loss_mask"], rel=GOLDEN_LOSS)
    assert dice.item() == pytest.approx(info["loss_cases"][case]["loss_dice"], rel=GOLDEN_LOSS)
    (100 * focal + dice).backward()
    assert error(store, f"{case}.grad.logits", logits.grad) <= GOLDEN_CASCADE_CLIP_GRADIENT
