"""Spatial aggregation: golden numbers, the literal form, and windows that reach beyond the map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import literal
import ovseg_fast as ovs
import samples
from counterparts import assert_equal_functions, assert_rewrite
from goldens import SPATIAL, assert_gradients, golden, to_operator
from ovseg_fast import backends, ops
from ovseg_fast.ops.spatial_aggregation import window_layout
from tolerances import GOLDEN_OUTPUT, KERNEL, relative_error

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SIZES = {
    "batch": st.integers(1, 2),
    "classes": st.integers(1, 4),
    "guidance": st.integers(1, 5),
    "hidden": st.integers(1, 9),
}


@st.composite
def heads_and_channels(draw: st.DrawFn) -> dict[str, int]:
    heads = draw(st.integers(1, 3))
    return {"heads": heads, "channels": heads * draw(st.integers(1, 5))}


@st.composite
def published_maps(draw: st.DrawFn) -> dict[str, int]:
    """Sides that are multiples of the window; a shift only where both have several."""
    window = draw(st.integers(1, 5))
    sides = [window * draw(st.integers(1, 3)), window * draw(st.integers(1, 3))]
    shift = draw(st.integers(0, window - 1)) if min(sides) > window else 0
    return {"window": window, "shift": shift, "height": sides[0], "width": sides[1]}


@st.composite
def any_maps(draw: st.DrawFn) -> dict[str, int]:
    sides = {name: draw(st.integers(1, 12)) for name in ("height", "width")}
    window = draw(st.integers(1, min(5, *sides.values())))
    return {"window": window, "shift": draw(st.integers(0, window - 1)), **sides}


def published(leaves: Mapping[str, Tensor], block: int) -> ops.SpatialAggregationWeights:
    return ops.SpatialAggregationWeights(**to_operator(SPATIAL, leaves, f"layers.0.swin_block.block_{block}."))


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize(
    ("op", "block", "side", "shift"),
    [
        pytest.param("swin_plain", 1, 24, 0, marks=pytest.mark.slow_in_interpreter),
        pytest.param("swin_shift", 2, 24, 6, marks=pytest.mark.slow_in_interpreter),
        ("swin_small", 2, 12, 0),
    ],
)
def test_golden(op: str, block: int, side: int, shift: int) -> None:
    def aggregated(leaves: Mapping[str, Tensor]) -> Tensor:
        x, guidance = (leaves[name].unflatten(1, (side, side)) for name in ("in.x", "in.guidance"))
        weights = published(leaves, block)
        out = ops.spatial_aggregation(x.unsqueeze(1), guidance, weights, heads=4, window=12, shift=shift)
        return out.squeeze(1).flatten(1, 2)

    assert_gradients(op, aggregated)


def test_golden_mask() -> None:
    _, _, mask = window_layout(24, 24, 12, 6, torch.device("cpu"), torch.float32)
    assert mask is not None
    case = golden("catseg_ops")
    assert case.error("swin_shift.attn_mask", mask) == 0
    assert mask.sum((1, 2)).tolist() == case.store["swin_shift.attn_mask_sum"].tolist()


@settings(max_examples=60)
@given(sizes=st.fixed_dictionaries(SIZES), heads=heads_and_channels(), maps=published_maps())
def test_rewrite(sizes: dict[str, int], heads: dict[str, int], maps: dict[str, int]) -> None:
    assert_rewrite("spatial_aggregation", samples.draw(samples.spatial_aggregation(**sizes, **heads, **maps)))


def token_by_token(
    x: Tensor, guidance: Tensor, weights: ops.SpatialAggregationWeights, *, heads: int, window: int, shift: int
) -> Tensor:
    """The block where each token looks for the others of its window; a map of any size."""
    named = weights._asdict()

    def linear(name: str, tokens: Tensor) -> Tensor:
        return F.linear(tokens, named[f"{name}_weight"], named[f"{name}_bias"])

    def norm(name: str, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:], named[f"{name}_weight"], named[f"{name}_bias"])

    _, classes, height, width, channels = x.shape
    full_height, full_width = (-(-side // window) * window for side in (height, width))
    places = [(i, j) for i in range(height) for j in range(width)]
    # The window of each token after the shift, and whether the shift carried it around the border.
    windows = [((i - shift) % full_height // window, (j - shift) % full_width // window) for i, j in places]
    carried = [(i < shift, j < shift) for i, j in places]

    tokens = x.flatten(2, 3)
    normed = norm("norm1", tokens)
    guided = torch.cat([normed, guidance.flatten(1, 2).unsqueeze(1).expand(-1, classes, -1, -1)], -1)
    q, k = linear("q", guided).unflatten(-1, (heads, -1)), linear("k", guided).unflatten(-1, (heads, -1))
    v = linear("v", normed).unflatten(-1, (heads, -1))
    rows = []
    for token, own in enumerate(windows):
        others = [i for i, other in enumerate(windows) if other == own]
        scores = torch.einsum("bthd,btnhd->bthn", q[:, :, token], k[:, :, others]) / (channels // heads) ** 0.5
        scores = scores + torch.tensor([0.0 if carried[i] == carried[token] else -100.0 for i in others])
        rows.append(torch.einsum("bthn,btnhd->bthd", scores.softmax(-1), v[:, :, others]).flatten(-2))
    tokens = tokens + linear("proj", torch.stack(rows, 2))
    tokens = tokens + linear("fc2", F.gelu(linear("fc1", norm("norm2", tokens))))
    return tokens.view(x.shape)


@settings(max_examples=40)
@given(sizes=st.fixed_dictionaries(SIZES), heads=heads_and_channels(), maps=any_maps())
def test_windows_end_with_the_map(sizes: dict[str, int], heads: dict[str, int], maps: dict[str, int]) -> None:
    call = samples.draw(samples.spatial_aggregation(**sizes, **heads, **maps))
    assert_equal_functions(call, ops.spatial_aggregation, token_by_token)


@pytest.mark.parametrize("place", [(0, 0), (6, 4), (3, 9)])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("argument", [0, 1], ids=["x", "guidance"])
def test_nan_stays_within_its_window(place: tuple[int, int], shift: int, argument: int, rng: torch.Generator) -> None:
    build = samples.spatial_aggregation(batch=2, classes=2, height=7, width=10, window=4, shift=shift)
    args, kwargs = build(samples.Draw(rng, torch.float64, "cpu"))
    args[argument].select(0, 1)[(0, *place) if argument == 0 else place] = float("nan")
    result, truth = ops.spatial_aggregation(*args, **kwargs), token_by_token(*args, **kwargs)
    assert torch.equal(result.isnan(), truth.isnan())
    assert 0 < truth.isnan().sum() < truth.numel() / 2


def test_the_shift_mask_is_a_number_not_a_ban() -> None:
    """As published, −100 is added: a score that is higher by far more still gets through."""
    (x, guidance, weights), keywords = samples.draw(samples.spatial_aggregation(height=8, window=4, shift=2))
    assert_rewrite("spatial_aggregation", ((x, 50 * guidance, weights), keywords))


def test_the_kernels_add_the_number_too(rng: torch.Generator) -> None:
    build = samples.spatial_aggregation(height=8, window=4, shift=2)
    (x, guidance, weights), keywords = build(samples.Draw(rng, torch.float32, KERNEL_DEVICE))
    results = []
    for name in ("triton", "torch"):
        with ovs.backend(name):
            results.append(ops.spatial_aggregation(x, 50 * guidance, weights, **keywords))
    assert relative_error(*results) <= KERNEL[torch.float32]


def test_the_kernels_refuse_a_window_that_they_cannot_hold(rng: torch.Generator) -> None:
    build = samples.spatial_aggregation(classes=1, height=17, width=17, window=17)
    args, keywords = build(samples.Draw(rng, torch.float32, KERNEL_DEVICE))
    with ovs.backend("triton"), pytest.raises(RuntimeError, match="window 17 is larger than 16"):
        ops.spatial_aggregation(*args, **keywords)
    ops.spatial_aggregation(*args, **keywords)
    assert ovs.last_backend("spatial_aggregation") == "torch"


def test_the_dtype_of_the_kernel_tells_how_much_shared_memory_it_needs(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []

    def refusal(_: str, name: str, *others: Any) -> str | None:
        if name == "cuda":
            needed.append(others[-1])
        return None if name == "torch" else "only asked"

    monkeypatch.setattr(backends, "refusal", refusal)
    args, keywords = samples.spatial_aggregation(**samples.WIDE)(samples.Draw(rng, torch.float32, KERNEL_DEVICE))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(KERNEL_DEVICE, dtype, enabled=dtype != torch.float32):
            ops.spatial_aggregation(*args, **keywords)
    assert needed == [163, 0]


@pytest.mark.parametrize("argument", [0, 1, 2, 4, 8, 10, 11])
def test_the_kernels_give_one_gradient_alone(argument: int, rng: torch.Generator) -> None:
    """What is frozen is left out, and changes nothing for the others."""
    build = samples.spatial_aggregation(classes=1, height=3, width=2, channels=4, heads=1, window=2, shift=1)
    call = build(samples.Draw(rng, torch.float32, KERNEL_DEVICE))
    leaves = samples.tensors(call)

    def loss() -> Tensor:
        return ops.spatial_aggregation(*call[0], **call[1]).square().sum()

    with ovs.backend("triton"):
        leaves[argument].requires_grad_()
        (alone,) = torch.autograd.grad(loss(), leaves[argument])
        for tensor in leaves:
            tensor.requires_grad_()
        among_all = torch.autograd.grad(loss(), leaves)
    assert torch.equal(alone, among_all[argument])


def test_layout_of_windows() -> None:
    """Every position has one slot, and the mask alone tells what lies beyond."""
    for height, width, window, shift in ((6, 6, 3, 0), (6, 9, 3, 2), (7, 5, 3, 1), (5, 11, 4, 3)):
        order, inverse, mask = window_layout(height, width, window, shift, torch.device("cpu"), torch.float64)
        assert torch.equal(order[inverse], torch.arange(height * width))
        if height % window == 0 and width % window == 0:
            expected = literal.shift_mask((height, width), window, shift, torch.float64) if shift else None
            assert (mask is None) == (expected is None)
            assert mask is None or torch.equal(mask, expected)
        else:
            assert mask is not None
            reachable = (mask > float("-inf")).any(1).sum()
            assert reachable == height * width
            assert (mask > float("-inf")).any(2).all()


def test_golden_output_holds_in_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that are worked on one by one, though they are alike, each give what the golden has."""
    monkeypatch.setattr("ovseg_fast.ops.common.tiles.TILE_TOKENS", 1)
    leaves = golden("catseg_ops").leaves("swin_shift")
    weights = ops.SpatialAggregationWeights(*(weight.detach() for weight in published(leaves, 2)))
    x, guidance = (leaves[name].detach().unflatten(1, (24, 24)) for name in ("in.x", "in.guidance"))
    sizes = {"heads": 4, "window": 12, "shift": 6}
    out = ops.spatial_aggregation(x.unsqueeze(1).expand(-1, 3, -1, -1, -1), guidance, weights, **sizes)
    for t in range(3):
        assert golden("catseg_ops").error("swin_shift.out", out[:, t].flatten(1, 2)) <= GOLDEN_OUTPUT
