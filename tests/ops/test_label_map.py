"""Label map: golden numbers, the literal form of both methods, chunks of rows and classes, ties, and classes that the
kernels skip."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
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
from counterparts import assert_rewrite, counterpart
from goldens import cascade_inputs, filled, golden
from ovseg_fast import backends, ops
from tolerances import ARGMAX_AGREEMENT, GOLDEN_OUTPUT, KERNEL, LABEL_MARGIN, REWRITE_FLOAT64, relative_error

MODULE = importlib.import_module("ovseg_fast.ops.label_map")  # `ops.label_map` is the function
CHUNKS = [1, 50, 400, 10**9]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels


@pytest.fixture(params=CHUNKS)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """How many scores the PyTorch form computes at a time."""
    monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", request.param)
    with ovs.backend("torch"):
        yield request.param


@pytest.fixture(params=["triton", "cuda"])
def kernels(request: pytest.FixtureRequest) -> str:
    """The backend whose kernels are tested."""
    need(request, request.param)
    return request.param


def need(request: pytest.FixtureRequest, backend: str) -> str:
    """The device of a backend's tensors; skips the test if it cannot run."""
    if backend == "triton":
        pytest.importorskip("triton")
    elif backend != "torch":
        request.getfixturevalue({"cuda": "emulation", "cpu": "cpu_library"}[backend])
    return DEVICE if backend in ("triton", "cuda") else "cpu"


@pytest.fixture(params=[*CHUNKS, "triton", "cuda", "cpu"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The PyTorch form, with so many scores at a time, or the kernels; returns the device of the tensors."""
    backend = request.param if request.param in backends.LAUNCHERS else "torch"
    if backend == "torch":
        monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", request.param)
    device = need(request, backend)
    with ovs.backend(backend):
        yield device


@pytest.mark.parametrize("transductive", [False, True])
def test_golden(transductive: bool) -> None:
    """Cascade-CLIP's scores of one window: resized, sigmoid, seen classes lowered."""
    case, weights = golden("cascade_clip"), filled("cascade_clip_vitb", "decode_head.", "E")
    features, image, text = cascade_inputs()
    maps = [layer.transpose(1, 2).unflatten(2, (32, 32)) for layer in features]
    with torch.no_grad():
        masks = literal.cascade_masks(weights, maps, image, text)
    offset = torch.zeros(20, device=masks.device)
    offset[case.facts["seen"]] = 0 if transductive else 0.1
    size = (512, 512)
    place = ops.Placement([(0, 0)], size, size, size)
    scores = [ops.score_map(mask[None], place, offset=offset) for mask in masks]
    name = "head_eval_selftrain.pred" if transductive else "head_eval.pred"
    assert case.error(name, torch.stack(scores)) <= GOLDEN_OUTPUT


@st.composite
def all_sizes(draw: st.DrawFn) -> dict[str, Any]:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    window = pair(1, 9)
    room = pair(0, 9)
    return {
        "classes": draw(st.integers(1, 5)),
        "map_size": pair(1, 5),
        "window": window,
        "canvas": (window[0] + room[0], window[1] + room[1]),
        "stride": (draw(st.integers(1, window[0])), draw(st.integers(1, window[1]))),
        "size": pair(1, 20),
        "whole": draw(st.booleans()),
        "offset": draw(st.booleans()),
    }


@settings(max_examples=50)
@given(sizes=all_sizes(), chunk=st.sampled_from(CHUNKS))
def test_scores_are_those_of_the_literal_form(sizes: dict[str, Any], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "CHUNK_ELEMENTS", chunk)
        assert_rewrite("score_map", samples.draw(samples.label_map(**sizes)))


@settings(max_examples=60)
@given(sizes=all_sizes(), chunk=st.sampled_from(CHUNKS))
def test_labels_are_the_best_of_the_literal_scores(sizes: dict[str, Any], chunk: int) -> None:
    call = samples.draw(samples.label_map(**sizes))
    scores = counterpart("score_map", call).result()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "CHUNK_ELEMENTS", chunk)
        labels = ops.label_map(*call[0], **call[1])
    assert labels.dtype == torch.int32
    assert labels.shape == sizes["size"]
    assert (labels >= 0).all()
    chosen = scores.gather(0, labels.long()[None])[0]
    assert relative_error(chosen, scores.amax(0)) <= REWRITE_FLOAT64


def catseg_logits(rng: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """(5, T, 24, 24), four windows and the whole image."""
    return 3 * torch.randn(5, 4, 24, 24, generator=rng, dtype=dtype)


def catseg_placement(size: tuple[int, int]) -> ops.Placement:
    """Published windows, on a smaller canvas."""
    return ops.Placement(literal.catseg_corners(160, 96), (96, 96), (160, 160), size)


@pytest.mark.parametrize("size", [(160, 160), (100, 133), (211, 173)])
def test_catseg(size: tuple[int, int], chunk: int, rng: torch.Generator) -> None:
    logits = catseg_logits(rng)
    expected = literal.catseg_label_map(logits, size, 160, 96)
    scores = ops.score_map(logits[:4], catseg_placement(size), whole=logits[4:])
    assert relative_error(scores, expected) <= REWRITE_FLOAT64
    labels = ops.label_map(logits[:4], catseg_placement(size), whole=logits[4:])
    assert (labels == expected.argmax(0)).double().mean() >= ARGMAX_AGREEMENT


@pytest.mark.parametrize("size", [(80, 125), (61, 90), (97, 211)])
def test_cascade_clip(size: tuple[int, int], chunk: int, rng: torch.Generator) -> None:
    canvas, seen = (80, 125), [0, 2, 3]
    corners = literal.cascade_corners(canvas, 64, 53)
    masks = 3 * torch.randn(len(corners), 5, 4, 4, generator=rng, dtype=torch.float64)
    offset = torch.zeros(5, dtype=torch.float64)
    offset[seen] = 0.1
    placement = ops.Placement(corners, (64, 64), canvas, size)
    expected = literal.cascade_label_map(masks, canvas, size, seen, crop=64, stride=53)
    scores = ops.score_map(masks, placement, offset=offset)
    assert relative_error(scores.softmax(0), expected) <= REWRITE_FLOAT64
    labels = ops.label_map(masks, placement, offset=offset)
    assert (labels == expected.argmax(0)).double().mean() >= ARGMAX_AGREEMENT


def test_labels_are_the_argmax_of_the_scores_to_the_bit(rng: torch.Generator) -> None:
    """If all rows are computed at once both do the same arithmetic, near ties included."""
    logits = catseg_logits(rng, torch.float32)
    for size in ((160, 160), (100, 133)):
        labels, scores = (
            function(logits[:4], catseg_placement(size), whole=logits[4:])
            for function in (ops.label_map, ops.score_map)
        )
        assert torch.equal(labels, scores.argmax(0).int())


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 0), (torch.float16, 1), (torch.bfloat16, 1)])
def test_rows_keep_their_place_in_every_precision(dtype: torch.dtype, rows: int) -> None:
    """A tall picture: row numbers above 256 or 2048 are no longer exact in bfloat16 or float16."""
    stripes = torch.tensor([8.0, -8.0]).repeat(20)
    logits = torch.stack([stripes, -stripes])[None, :, :, None].to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "CHUNK_ELEMENTS", 1000)
        labels = ops.label_map(logits, ops.Placement([(0, 0)], (40, 1), (40, 1), (4000, 1)))[:, 0]
    borders = labels.diff().nonzero().flatten() + 1  # midway between two source rows, which lie 100 rows apart
    assert (borders - torch.arange(100, 4000, 100)).abs().max() <= rows


ONE_WINDOW = ops.Placement([(0, 0)], (8, 8), (8, 8), (8, 8))


def simple(logits: Tensor, size: tuple[int, int] = (8, 8), **more: Any) -> Tensor:
    """One window of 8 × 8 pixels."""
    return ops.label_map(logits, ONE_WINDOW._replace(size=size), **more)


def test_the_lower_of_equal_classes_wins(form: str, rng: torch.Generator) -> None:
    logits = torch.randn(1, 6, 4, 4, generator=rng).to(form)
    logits[:, [1, 4]] = 5 + torch.rand(1, 1, 4, 4, generator=rng).to(form)
    for size in ((8, 8), (13, 5)):
        assert (simple(logits, size) == 1).all()
    assert (simple(torch.full((1, 6, 4, 4), 100.0, device=form)) == 0).all()  # sigmoid is 1 for all


def test_nan_is_above_everything_and_the_first_wins(form: str) -> None:
    """As argmax has it."""
    logits = torch.randn(1, 6, 8, 8, device=form)
    logits[0, 4, 2, 3] = logits[0, 2, 2, 3] = logits[0, 3, 5, 5] = float("nan")
    labels = simple(logits)
    assert labels[2, 3] == 2
    assert labels[5, 5] == 3
    assert torch.equal(labels, logits.sigmoid()[0].argmax(0).int())


def test_infinite_logits_are_certain(form: str) -> None:
    logits = torch.randn(1, 3, 8, 8, device=form)
    logits[0, 0] = -float("inf")
    logits[0, 2, 1, 1] = float("inf")
    labels = simple(logits)
    assert labels[1, 1] == 2
    assert (labels > 0).all()


def test_the_offset_decides(form: str, rng: torch.Generator) -> None:
    logits = 0.01 * torch.randn(1, 4, 4, 4, generator=rng).to(form)
    offset = torch.tensor([0.1, 0.1, 0.0, 0.1], device=form)
    assert (simple(logits, (9, 7), offset=offset) == 2).all()
    assert (simple(logits, (9, 7), offset=offset - 1).unique() == 2).all()  # scores may be any number


def test_the_whole_image_counts_half(form: str) -> None:
    """Two classes: the windows are sure of the first, the whole image of the second and a little more."""
    windows = torch.tensor([2.0, -2.0], device=form).view(1, 2, 1, 1).expand(1, 2, 4, 4).clone()
    whole = torch.tensor([-2.0, 2.1], device=form).view(1, 2, 1, 1).expand(1, 2, 4, 4).clone()
    assert (simple(windows) == 0).all()
    assert (simple(windows, whole=whole) == 1).all()


def test_overlapping_windows_are_averaged_by_count(chunk: int) -> None:
    """Three windows over one strip; each pixel has the mean of those that hold it."""
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    placement = ops.Placement([(0, 0), (0, 2), (0, 3)], (2, 4), (2, 7), (2, 7))
    scores = ops.score_map(logits, placement, offset=torch.zeros(1).double())[0, 0]
    a, b, c = logits[:, 0, 0, 0].sigmoid().tolist()
    expected = [a, a, (a + b) / 2, (a + b + c) / 3, (b + c) / 2, (b + c) / 2, c]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))


def test_memory_does_not_grow_with_the_classes() -> None:
    """At most CHUNK_ELEMENTS scores, or those of one class, are computed at a time."""
    largest = 0
    interpolate = F.interpolate

    def measured(maps: Tensor, size: tuple[int, int], **keywords: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, maps.shape[0] * maps.shape[1] * size[0] * size[1])
        return interpolate(maps, size, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "CHUNK_ELEMENTS", 5000)
        patch.setattr(F, "interpolate", measured)
        with ovs.backend("torch"):
            ops.label_map(torch.randn(1, 300, 4, 4), ops.Placement([(0, 0)], (40, 40), (40, 40), (100, 90)))
    assert 0 < largest <= 5000


@pytest.mark.parametrize(
    ("positions", "mention"),
    [
        ([(0, 0)], "positions must name 2 windows, one per map, got 1"),
        ([(0, 0), (0, 5)], "on the (8, 12) canvas, got (0, 5)"),
        ([(0, 0), (-1, 4)], "on the (8, 12) canvas, got (-1, 4)"),
        ([(0, 0), (0, 3)], "cover the whole (8, 12) canvas"),
        ([(0, 0), (0, 0)], "cover the whole (8, 12) canvas"),
    ],
)
@pytest.mark.parametrize("function", [ops.label_map, ops.score_map])
def test_windows_must_tile_the_canvas(function: Any, positions: list[tuple[int, int]], mention: str) -> None:
    with pytest.raises(ValueError, match=rf"^{function.__name__}: positions ") as caught:
        function(torch.randn(2, 3, 4, 4), ops.Placement(positions, (8, 8), (8, 12), (8, 8)))
    assert mention in str(caught.value)


@pytest.mark.parametrize("function", [ops.label_map, ops.score_map])
def test_a_placement_of_another_type_is_refused(function: Any) -> None:
    expected = rf"^{function.__name__}: placement must be an ovseg_fast\.ops\.Placement, got list\.$"
    with pytest.raises(TypeError, match=expected):
        function(torch.randn(1, 3, 4, 4), [(0, 0)])


# --- the best k ---


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of scores (T, H, W): NaN first, the lower of equals first."""
    ordered, order = scores.sort(dim=0, descending=True, stable=True)
    return ordered[:k], order[:k].int()


def assert_identical(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for result, truth in zip(results, expected, strict=True):
        assert result.dtype == truth.dtype
        torch.testing.assert_close(result, truth, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_top_labels_are_the_best_scores_in_order(k: int, form: str, rng: torch.Generator) -> None:
    """Equal scores and NaN among them."""
    logits = torch.randn(1, 9, 8, 8, generator=rng).round().to(form)
    logits[0, 5, 1:4, 2] = float("nan")
    logits[0, 2, 2, 2:5] = float("nan")
    logits[0, [3, 7], :, 6] = float("inf")
    results = ops.top_labels(logits, ONE_WINDOW, k=k)
    assert_identical(results, best(ops.score_map(logits, ONE_WINDOW), k))


@settings(max_examples=50)
@given(sizes=all_sizes(), chunk=st.sampled_from(CHUNKS))
def test_top_labels_are_those_of_the_literal_scores(sizes: dict[str, Any], chunk: int) -> None:
    k = min(3, sizes["classes"])
    call = samples.draw(samples.label_map(**sizes, k=k))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "CHUNK_ELEMENTS", chunk)
        scores, labels = ops.top_labels(*call[0], **call[1])
    call[1].pop("k")
    truth = counterpart("score_map", call).result()
    assert relative_error(scores, best(truth, k)[0]) <= REWRITE_FLOAT64
    assert relative_error(truth.gather(0, labels.long()), scores) <= REWRITE_FLOAT64


def test_labels_and_their_scores_have_no_gradient(form: str, rng: torch.Generator) -> None:
    logits = torch.randn(1, 3, 4, 4, generator=rng).to(form).requires_grad_()
    assert not simple(logits).requires_grad
    assert not any(result.requires_grad for result in ops.top_labels(logits, ONE_WINDOW, k=2))


# --- classes that no window kept ---


def kept_call(rng: torch.Generator, whole: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Logits of 6 of 40 classes for each of four windows (and the whole image), and where the windows lie. No window
    keeps number 0, which is the best where the last window lies alone: its logits are below those of the others."""
    shape = (4 + whole, 6)
    logits = 3 * torch.randn(*shape, 5, 7, generator=rng, dtype=dtype)
    low = torch.rand(*shape, 1, 1, generator=rng) < 0.5
    low[:3, 0], low[3:] = False, True
    logits -= 120 * low.to(dtype)
    classes = 1 + torch.rand(4 + whole, 39, generator=rng).argsort(1)[:, :6].sort().values
    maps = [ops.KeptLogits(logits[part], classes[part], 40, -100.0) for part in (slice(4), slice(4, None))]
    positions = [(top, left) for top in (0, 13) for left in (0, 21)]
    return maps[0], ops.Placement(positions, (20, 30), (33, 51), (41, 29)), maps[1] if whole else None


@pytest.fixture(params=["torch", "cpu"])
def kept_form(request: pytest.FixtureRequest) -> Iterator[None]:
    need(request, request.param)
    with ovs.backend(request.param):
        yield


@pytest.mark.usefixtures("kept_form")
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_give_what_all_logits_give(
    whole: bool, offset: bool, dtype: torch.dtype, rng: torch.Generator
) -> None:
    logits, placement, maps = kept_call(rng, whole, dtype)
    # Multiples of 1/8: whatever the number of windows, their mean is exact.
    lowered = torch.randint(0, 2, (40,), generator=rng).to(dtype) / 8 if offset else None
    if lowered is not None:
        lowered[0] = 0
    few = {"whole": maps, "offset": lowered}
    dense = logits.dense()
    every = {"whole": None if maps is None else maps.dense(), "offset": lowered}
    labels = ops.label_map(logits, placement, **few)
    assert torch.equal(labels, ops.label_map(dense, placement, **every))
    assert 0 < (labels == 0).sum() < labels.numel()
    scores, names = ops.top_labels(logits, placement, k=5, **few)
    expected = ops.top_labels(dense, placement, k=5, **every)
    assert torch.equal(names, expected[1])
    torch.testing.assert_close(scores, expected[0])
    torch.testing.assert_close(ops.score_map(logits, placement, **few), ops.score_map(dense, placement, **every))


def test_other_kernels_take_kept_logits(kernels: str, rng: torch.Generator) -> None:
    logits, placement, _ = kept_call(rng, False)
    logits = logits._replace(logits=logits.logits.to(DEVICE), classes=logits.classes.to(DEVICE))
    placement = placement._replace(size=(8, 9))
    with ovs.backend(kernels):
        labels = ops.label_map(logits, placement)
        assert torch.equal(labels, ops.label_map(logits.dense(), placement))
    assert 0 < (labels == 0).sum() < labels.numel()


def test_kept_logits_have_gradients(rng: torch.Generator) -> None:
    logits, placement, _ = kept_call(rng, False)
    logits.logits.requires_grad_()
    assert ops.score_map(logits, placement).requires_grad


def test_kept_logits_that_do_not_fit_are_refused(rng: torch.Generator) -> None:
    logits, placement, whole = kept_call(rng, True)
    assert whole is not None
    with pytest.raises(TypeError, match=r"^label_map: whole must be KeptLogits like the other maps, got Tensor\.$"):
        ops.label_map(logits, placement, whole=whole.dense())
    with pytest.raises(TypeError, match=r"^label_map: logits must be KeptLogits like the other maps, got Tensor\.$"):
        ops.label_map(logits.dense(), placement, whole=whole)
    with pytest.raises(ValueError, match=r"whole must have the total and dropped of logits, \(40, -100\.0\), got"):
        ops.label_map(logits, placement, whole=whole._replace(total=41))
    with pytest.raises(ValueError, match=r"^label_map: classes must be in 0\.\.39, got -1\.\."):
        ops.label_map(logits._replace(classes=logits.classes - logits.classes.min() - 1), placement)
    with pytest.raises(ValueError, match="offset must have one number for each of 40 classes, got 6"):
        ops.label_map(logits, placement, offset=torch.zeros(6))
    with pytest.raises(ValueError, match=r"k must be in 1\.\.min\(T, 8\) = 8, got 9"):
        ops.top_labels(logits, placement, k=9)


# --- kernels for CPUs ---


@pytest.fixture
def cpu(cpu_library: Path) -> Iterator[None]:
    with ovs.backend("cpu"):
        yield


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    ("canvas", "size"),
    [((40, 61), (90, 300)), ((40, 61), (30, 61)), ((40, 61), (25, 37)), ((40, 361), (9, 20)), ((40, 61), (40, 61))],
)  # a vector's sources lie in one vector, or are those themselves, or in two, or in many
@pytest.mark.parametrize("whole", [False, True])
def test_cpu_kernels_resize_by_any_factor(
    canvas: tuple[int, int], size: tuple[int, int], whole: bool, rng: torch.Generator
) -> None:
    sizes = {"map_size": (7, 11), "window": (29, 50), "stride": (11, 11), "canvas": canvas, "size": size}
    call = samples.label_map(classes=9, whole=whole, **sizes)(samples.Draw(rng, torch.float32, "cpu"))
    scores = ops.score_map(*call[0], **call[1])
    wide = samples.map_tensors(lambda tensor: tensor.double(), call)
    with ovs.backend("torch"):
        truth = ops.score_map(*wide[0], **wide[1])
    assert relative_error(scores, truth) <= KERNEL[torch.float32]
    assert torch.equal(ops.label_map(*call[0], **call[1]), scores.argmax(0).int())
    for k in (2, 8):
        assert_identical(ops.top_labels(*call[0], k=k, **call[1]), best(scores, k))


@pytest.mark.usefixtures("cpu")
def test_cpu_kernels_take_any_number_of_windows(rng: torch.Generator) -> None:
    logits = torch.randn(300, 2, 2, 1, generator=rng)
    placement = ops.Placement([(0, left) for left in range(300)], (3, 3), (3, 302), (5, 77))
    scores = ops.score_map(logits, placement)
    with ovs.backend("torch"):
        torch.testing.assert_close(scores, ops.score_map(logits, placement))


@pytest.mark.usefixtures("cpu")
def test_cpu_kernels_give_the_same_on_any_number_of_threads(rng: torch.Generator) -> None:
    logits, placement, whole = kept_call(rng, True)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.top_labels(logits, placement._replace(size=(200, 90)), k=3, whole=whole))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_identical(result, results[0])


@pytest.mark.usefixtures("cpu")
def test_cpu_kernels_have_no_gradient(rng: torch.Generator) -> None:
    logits = torch.randn(1, 3, 4, 4, generator=rng)
    offset = torch.zeros(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"the cpu backend .*: its kernel has no gradient\.$"):
        ops.score_map(logits, ONE_WINDOW, offset=offset)
    with ovs.backend("auto"):
        assert ops.score_map(logits, ONE_WINDOW, offset=offset).requires_grad


# --- kernels ---


def assert_labels_follow_float64(call: samples.Call, labels: Tensor) -> None:
    wide = samples.map_tensors(lambda tensor: tensor.cpu().double(), call)
    scores = ops.score_map(*wide[0], **wide[1])
    (first, second), (expected, _) = best(torch.cat([scores, torch.full_like(scores[:1], -10)]), 2)
    clear = first - second > LABEL_MARGIN
    assert clear.any()
    assert torch.equal(labels.cpu()[clear], expected[clear])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("maps", "window", "canvas", "size"),
    [
        ((3, 4), (7, 6), (9, 8), (8, 17)),
        ((3, 6), (7, 6), (9, 6), (9, 6)),  # along one axis only
        ((7, 6), (7, 6), (9, 6), (4, 6)),
        ((5, 9), (3, 4), (3, 4), (3, 9)),
    ],
)
def test_kernel_labels_are_those_of_float64(
    maps: tuple[int, int],
    window: tuple[int, int],
    canvas: tuple[int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
    kernels: str,
    rng: torch.Generator,
) -> None:
    build = samples.label_map(
        classes=9, map_size=maps, window=window, canvas=canvas, size=size, stride=(2, 2), whole=True, offset=True
    )
    call = build(samples.Draw(rng, dtype, DEVICE))
    with ovs.backend(kernels):
        labels = ops.label_map(*call[0], **call[1])
        scores = ops.score_map(*call[0], **call[1])
    assert_labels_follow_float64(call, labels)
    wide = samples.map_tensors(torch.Tensor.double, call)
    assert relative_error(scores, ops.score_map(*wide[0], **wide[1])) <= KERNEL[dtype]


@pytest.mark.parametrize("size", [(20, 20), (13, 31)])
@pytest.mark.parametrize("whole", [False, True])
def test_kernels_skip_no_class_that_is_best_somewhere(
    size: tuple[int, int], whole: bool, kernels: str, rng: torch.Generator
) -> None:
    """A photograph: each of 40 classes is sure of a few places, here and there two of them of the same one."""
    call = samples.label_map(
        classes=40, map_size=(9, 9), window=(12, 12), canvas=(20, 20), size=size, stride=(8, 8), whole=whole
    )(samples.Draw(rng, torch.float32, DEVICE))
    for tensor in samples.tensors(call):
        tensor.copy_(tensor / 4 - 6 + 9 * (torch.rand(tensor.shape, generator=rng) < 0.03).to(tensor))
    with ovs.backend(kernels):
        labels = ops.label_map(*call[0], **call[1])
        scores = ops.score_map(*call[0], **call[1])
        results = ops.top_labels(*call[0], k=5, **call[1])
    assert torch.equal(labels, scores.argmax(0).int())
    assert_identical(results, best(scores, 5))
    assert len(labels.unique()) > 5
    assert_labels_follow_float64(call, labels)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("argument", range(3))
def test_kernels_skip_no_class_with_a_bad_number(
    value: float, argument: int, kernels: str, rng: torch.Generator
) -> None:
    """20 classes that are hopeless but for one number of one of them."""
    call = samples.label_map(
        classes=20, map_size=(3, 3), window=(8, 8), canvas=(10, 10), size=(7, 13), whole=True, offset=True
    )(samples.Draw(rng, torch.float32, DEVICE))
    logits, maps = call[0][0], call[1]["whole"]
    logits[:, 1:] -= 20
    maps[:, 1:] -= 20
    target = samples.tensors(call)[argument]
    target[(0, 17, 0, 0) if argument < 2 else 17] = value
    with ovs.backend(kernels):
        labels = ops.label_map(*call[0], **call[1])
        scores = ops.score_map(*call[0], **call[1])
        results = ops.top_labels(*call[0], k=3, **call[1])
    assert torch.equal(labels, best(scores, 1)[1][0])
    assert_identical(results, best(scores, 3))


def test_the_kernel_of_scores_is_refused_if_a_gradient_is_needed(kernels: str, rng: torch.Generator) -> None:
    logits = torch.randn(1, 3, 4, 4, generator=rng).to(DEVICE)
    offset = torch.zeros(3, device=DEVICE, requires_grad=True)
    with ovs.backend(kernels):
        with pytest.raises(RuntimeError, match=rf"^label_map: the {kernels} backend .*: its kernel has no gradient\.$"):
            ops.score_map(logits, ONE_WINDOW, offset=offset)
        with torch.no_grad():
            ops.score_map(logits, ONE_WINDOW, offset=offset)
        assert ovs.last_backend("label_map") == kernels
    with ovs.backend("auto"):
        assert ops.score_map(logits, ONE_WINDOW, offset=offset).requires_grad
    assert ovs.last_backend("label_map") == "torch"


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("k", [1, 4, 8])
def test_cuda_kernels_share_bounds_among_very_many_classes(k: int, rng: torch.Generator) -> None:
    """More classes than a block stores bounds for; numbers 6 and 4999 are equal, and surely the best."""
    logits = torch.randn(1, 5000, 2, 2, generator=rng).to(DEVICE)
    logits[0, [6, 4999]] = 9.0
    placement = ops.Placement([(0, 0)], (4, 4), (4, 4), (5, 3))
    with ovs.backend("cuda"):
        results = ops.top_labels(logits, placement, k=k)
        scores = ops.score_map(logits, placement)
    assert (results[1][0] == 6).all()
    assert_identical(results, best(scores, k))


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("windows", [64, 65])
def test_cuda_kernels_take_up_to_64_windows(windows: int, rng: torch.Generator) -> None:
    logits = torch.randn(windows, 2, 2, 1, generator=rng).to(DEVICE)
    positions = [(0, left) for left in range(windows)]
    placement = ops.Placement(positions, (3, 3), (3, windows + 2), (3, windows + 2))
    for function in (ops.label_map, ops.score_map):
        expected = function(logits, placement)
        with ovs.backend("cuda"):
            if windows > 64:
                with pytest.raises(RuntimeError, match="its kernels take up to 64 windows, not 65"):
                    function(logits, placement)
            else:
                torch.testing.assert_close(function(logits, placement), expected)


def test_autocast_leaves_the_logits_as_they_are(form: str, rng: torch.Generator) -> None:
    logits, whole = torch.randn(2, 1, 3, 4, 4, generator=rng).to(form)
    with torch.autocast(form, torch.bfloat16):
        mixed = simple(logits, whole=whole.bfloat16())
    assert torch.equal(mixed, simple(logits, whole=whole.bfloat16().float()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("function", ["label_map", "score_map", "top_labels"])
def test_launching_does_not_wait(function: str, kernels: str, rng: torch.Generator) -> None:
    row = samples.select("small", function=function)[0]
    call = row.build(rng, torch.float32, "cuda")
    with ovs.backend(kernels):
        row.run(call)
        torch.cuda.set_sync_debug_mode("error")
        try:
            row.run(call)
        finally:
            torch.cuda.set_sync_debug_mode("default")
