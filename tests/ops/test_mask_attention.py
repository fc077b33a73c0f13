"""Mask attention: golden numbers, the literal form and PyTorch's own attention."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ovseg_fast as ovs
import samples
from counterparts import assert_rewrite
from goldens import ATTENTION, DEVICE, cascade_inputs, cascade_queries, filled, golden, to_operator
from ovseg_fast import backends, ops
from test_kernels import check_gradients
from test_operators import gradients
from tolerances import GOLDEN_OUTPUT, KERNEL, REWRITE_FLOAT64, relative_error


@pytest.mark.usefixtures("every_backend")
def test_golden() -> None:
    """The first layer of the last stage, whose memory is a layer of the encoder as it stands."""
    case, weights = golden("cascade_clip"), filled("cascade_clip_vitb", "decode_head.", "E")
    features, _, _ = cascade_inputs()
    queries = cascade_queries(weights, 2)
    parameters = to_operator(ATTENTION, weights, "cascade_decoders.2.layers.0.multihead_attn.")
    scores = ops.mask_scores(queries, features[6], **{k: v for k, v in parameters.items() if k[0] in "qk"})
    assert case.error("head_eval.stage2.layer0.scores", scores) <= GOLDEN_OUTPUT


@st.composite
def all_sizes(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 4))
    return {
        "batch": draw(st.integers(1, 3)),
        "classes": draw(st.integers(1, 9)),
        "patches": draw(st.integers(1, 20)),
        "channels": heads * draw(st.integers(1, 6)),
        "heads": heads,
    }


@settings(max_examples=40)
@given(sizes=all_sizes())
def test_rewrite(sizes: dict[str, Any]) -> None:
    assert_rewrite("mask_attention", samples.draw(samples.mask_attention(**sizes)))


@settings(max_examples=30)
@given(sizes=all_sizes())
def test_rewrite_of_the_scores(sizes: dict[str, Any]) -> None:
    assert_rewrite("mask_scores", samples.draw(samples.mask_attention(**sizes, scores_only=True)))


def test_it_is_pytorchs_multi_head_attention() -> None:
    (queries, memory, *parameters), _ = samples.draw(
        samples.mask_attention(batch=2, classes=5, patches=9, channels=24, heads=4)
    )
    attention = torch.nn.MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64)
    state = {
        "in_proj_weight": torch.cat(parameters[0:6:2]),
        "in_proj_bias": torch.cat(parameters[1:6:2]),
        "out_proj.weight": parameters[6],
        "out_proj.bias": parameters[7],
    }
    attention.load_state_dict(state)
    output = ops.mask_attention(queries, memory, *parameters, heads=4)
    assert relative_error(output, attention(queries, memory, memory)[0]) <= REWRITE_FLOAT64


def test_dropout_drops_attention(rng: torch.Generator) -> None:
    build = samples.mask_attention(classes=20, patches=50, channels=16)
    (args, keywords) = build(samples.Draw(rng, torch.float64, "cpu"))
    output = ops.mask_attention(*args, **keywords)
    assert relative_error(ops.mask_attention(*args, **keywords, dropout=0.5), output) > 1e-2
    nothing = ops.mask_attention(*args, **keywords, dropout=1.0)
    torch.testing.assert_close(nothing, args[-1].expand_as(nothing))  # all weights dropped: only the last bias is left


@pytest.mark.parametrize("dropout", [-0.1, 1.1])
def test_dropout_must_be_a_probability(dropout: float) -> None:
    args, keywords = samples.draw(samples.mask_attention())
    with pytest.raises(ValueError, match=r"mask_attention: dropout must be in 0\.\.1, got"):
        ops.mask_attention(*args, **keywords, dropout=dropout)


# --- kernels ---


def kernel_case(rng: torch.Generator, **sizes: int) -> tuple[tuple[torch.Tensor, ...], int]:
    """(q, k, v) in float32 for the custom operator, and the number of heads."""
    draw = samples.Draw(rng, torch.float32, DEVICE)
    queries, keys, heads, width = (sizes.get(name, 3) for name in ("queries", "keys", "heads", "width"))
    q, k, v = (draw(2, length, heads * width).requires_grad_() for length in (queries, keys, keys))
    return (q, k, v), heads


def test_what_the_kernels_do_not_take_goes_to_pytorch() -> None:
    for keywords, reason in (({"dropout": 0.5}, "no dropout"), ({"heads": 1}, "heads of at most 128 channels")):
        args, _ = samples.draw(samples.mask_attention(channels=130, heads=1), torch.float32)
        args = tuple(tensor.to(DEVICE) for tensor in args)
        keywords = {"heads": 2, **keywords}
        with ovs.backend("triton"), pytest.raises(RuntimeError, match=f"mask_attention: the triton backend .*{reason}"):
            ops.mask_attention(*args, **keywords)
        with ovs.backend("auto"):
            ops.mask_attention(*args, **keywords)
        assert ovs.last_backend("mask_attention") in ("cpu", "torch")


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize(("heads", "width"), [(1, 1), (3, 5), (2, 64), (1, 65), (5, 96), (1, 300)])
@pytest.mark.parametrize("patches", [1, 2, 64, 65, 300])
def test_the_cpu_kernels_take_any_size(heads: int, width: int, patches: int, rng: torch.Generator) -> None:
    build = samples.mask_attention(batch=2, classes=101, patches=patches, channels=heads * width, heads=heads)
    for dtype in (torch.float32, torch.bfloat16):
        args, keywords = build(samples.Draw(rng, dtype, "cpu"))
        wide = [tensor.double() for tensor in args]
        for function, count in ((ops.mask_attention, 10), (ops.mask_scores, 6)):
            expected = function(*wide[:count], **keywords)
            with ovs.backend("cpu"):
                result = function(*args[:count], **keywords)
            assert relative_error(result, expected) <= KERNEL[dtype]


@pytest.mark.usefixtures("cpu_library")
def test_what_the_cpu_kernels_do_not_take_goes_to_pytorch() -> None:
    args, keywords = samples.draw(samples.mask_attention(), torch.float32)
    for options, reason in (({"dropout": 0.5}, "no dropout"), ({"attention": "xformers"}, "'xformers' was asked for")):
        with ovs.backend("cpu"), pytest.raises(RuntimeError, match=f"mask_attention: the cpu backend .*{reason}"):
            ops.mask_attention(*args, **keywords, **options)
    ops.mask_attention(*args, **keywords, dropout=0.5)
    assert ovs.last_backend("mask_attention") == "torch"


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("dtype", backends.CPU_DTYPES, ids=str)
def test_cpu_softmax_of_nothing_but_minus_infinity_or_nan(dtype: torch.dtype, rng: torch.Generator) -> None:
    """As below, of Triton's."""
    q, k, v = (torch.randn(2, count, 4, generator=rng).to(dtype) for count in (3, 40, 40))
    q[:, 0], q[:, 1, 0] = 1.0, float("nan")
    k[..., 0] = float("-inf")
    output = torch.ops.ovseg_fast.mask_attention_inference(q, k, v, 1, "cpu")
    assert (output[:, 0] == 0).all() and output[:, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_tiles_give_what_small_ones_give(
    dtype: torch.dtype, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = importlib.import_module("ovseg_fast.kernels.mask_attention")
    row = next(row for row in samples.select("odd", function="mask_attention"))
    results = []
    for few in (kernels.FEW, 0):
        monkeypatch.setattr(kernels, "FEW", few)
        call = row.build(torch.Generator().manual_seed(int(rng.initial_seed())), dtype, DEVICE)
        with ovs.backend("triton"):
            results.append((samples.tensors(row.run(call)), gradients(row, call)))
    (small, small_slopes), (large, large_slopes) = results
    for result, expected in zip(large, small, strict=True):
        assert relative_error(result, expected) <= KERNEL[dtype]
    names = list(samples.arguments("mask_attention", call))[: len(small_slopes)]
    check_gradients(names, large_slopes, [slope.double() for slope in small_slopes], dtype)


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_frozen_inputs_get_no_gradient(wanted: str, rng: torch.Generator) -> None:
    (q, k, v), heads = kernel_case(rng, queries=5, keys=9)
    tensors = {"q": q, "k": k, "v": v}
    full = torch.autograd.grad(loss(q, k, v, heads), tensors[wanted])
    frozen = {name: tensor if name == wanted else tensor.detach() for name, tensor in tensors.items()}
    (gradient,) = torch.autograd.grad(loss(**frozen, heads=heads), frozen[wanted])
    assert torch.equal(gradient, *full)


def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    output, *_ = torch.ops.ovseg_fast.mask_attention(q, k, v, heads, "triton")
    return output.square().sum() + torch.ops.ovseg_fast.mask_scores(q, k, heads, "triton").sin().sum()


def test_kernel_softmax_of_nothing_but_minus_infinity_or_nan(rng: torch.Generator) -> None:
    """Weights are 0 if all scores of a row are −∞, as in PyTorch's fused attention, and NaN if all are NaN."""
    (q, k, v), _ = kernel_case(rng, queries=3, keys=40, heads=1, width=4)
    q, k, v = q.detach(), k.detach(), v.detach()
    q[:, 0], q[:, 1, 0] = 1.0, float("nan")
    k[..., 0] = float("-inf")
    output, log_sum, _ = torch.ops.ovseg_fast.mask_attention(q, k, v, 1, "triton")
    assert (output[:, 0] == 0).all() and log_sum[:, :, 0].isfinite().all()
    assert output[:, 1].isnan().all()
