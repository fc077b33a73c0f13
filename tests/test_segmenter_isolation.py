"""A result depends on neither the blocks and threads around the call nor on what another call left behind."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torture import threads

import ovseg_fast as ovs
from ovseg_fast.layers.prepared import Prepared
from ovseg_fast.models import steady

NAMES = ["green grass", "star", "red cross"]
MODELS = ["catseg-tiny", "cascade-clip-tiny"]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


BLOCKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "default meta": default_device,
    "backend": lambda: ovs.backend("torch"),
}


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (70, 110, 3), dtype=np.uint8)


@pytest.fixture(params=MODELS)
def seg(request: pytest.FixtureRequest) -> ovs.Segmenter:
    return ovs.load(request.param, device="cpu")


def assert_equal(result: ovs.Segmentation, expected: ovs.Segmentation, rounding: bool = False) -> None:
    """With `rounding`, of two backends: both may round differently."""
    if rounding:
        assert np.allclose(result.scores, expected.scores, rtol=1e-4, atol=1e-6)
        return
    assert np.array_equal(result.labels, expected.labels)
    assert np.array_equal(result.scores, expected.scores)
    for one, other in zip(result.top(2), expected.top(2), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("place", ["load", "encode", "segment", "scores"])
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_around_a_part_of_the_work(
    block: str, place: str, seg: ovs.Segmenter, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def within(here: str) -> AbstractContextManager[Any]:
        return BLOCKS[block]() if here == place else nullcontext()

    expected = seg.segment(photo, NAMES, mode="whole")
    with within("load"):
        other = ovs.load(seg.model.preset, device="cpu")
    with within("encode"):
        encoded = other.encode(photo, "whole")
    with within("segment"):
        result = encoded.segment(NAMES)
    with within("scores"):
        assert_equal(result, expected, rounding=block == "backend")


@pytest.mark.parametrize("block", ["inference mode", "meta", "float64"])
def test_text_made_in_a_block_takes_part_in_gradients_after_it(block: str, seg: ovs.Segmenter) -> None:
    with BLOCKS[block]():
        seg.embed_text(NAMES)
    weight = torch.ones(64, requires_grad=True)
    (seg.embed_text(NAMES) * weight).sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_autocast_leaves_is_of_the_models_dtype(dtype: torch.dtype, seg: ovs.Segmenter, photo: np.ndarray) -> None:
    expected = seg.segment(photo, NAMES)
    fresh = ovs.load(seg.model.preset, device="cpu")
    with torch.autocast("cpu", dtype):
        low = fresh.segment(photo, NAMES)
        encoded = fresh.encode(photo)
        text = fresh.embed_text(NAMES)
    assert low.scores.shape == expected.scores.shape and (low.labels == expected.labels).mean() > 0.98
    assert (encoded.segment(NAMES).labels == expected.labels).mean() > 0.98
    assert text.dtype == torch.float32 and not torch.equal(text, fresh.embed_text(NAMES))  # not served outside
    assert_equal(fresh.segment(photo, NAMES), expected)
    with torch.autocast("cpu", dtype):
        assert torch.equal(fresh.embed_text(NAMES), text)  # nor the other way round


def test_loaded_models_are_in_evaluation_mode_and_float32(photo: np.ndarray) -> None:
    with default_dtype(torch.bfloat16):
        seg = ovs.load("cascade-clip-tiny", device="cpu")
    tensors = [*seg.model.parameters(), *seg.model.buffers()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert torch.equal(seg.model.pixel_mean.view(-1), torch.tensor(seg.model.statistics[0]))
    assert not any(module.training for module in seg.model.modules())
    images, text = torch.rand(1, 3, 96, 96), seg.model.text_from_prompts(seg.embed_text(NAMES))
    assert torch.equal(seg.model(images, text), seg.model(images, text))


def test_no_call_changes_a_mode_even_for_a_moment(seg: ovs.Segmenter, photo: np.ndarray) -> None:
    expected = seg.segment(photo, NAMES)
    model = seg.model.train()
    next(iter(model.children())).eval()
    modes = [module.training for module in model.modules()]
    seen: list[list[bool]] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: seen.append([part.training for part in model.modules()]))
    assert_equal(seg.segment(photo, NAMES), expected, rounding=True)  # modules with hooks run by themselves
    assert seen and all(found == modes for found in seen)


@pytest.mark.parametrize("added", ["weight_norm", "spectral_norm"])
def test_a_parametrised_model_in_training_mode(added: str, seg: ovs.Segmenter, photo: np.ndarray) -> None:
    """Spectral norm also changes its buffers in training mode, which a call must not do."""
    parametrise = getattr(torch.nn.utils.parametrizations, added)
    for module in list(seg.model.modules()):
        if isinstance(module, torch.nn.Linear):
            parametrise(module)
    expected = seg.segment(photo, NAMES)
    seg.model.train()
    before = {name: tensor.clone() for name, tensor in seg.model.state_dict().items()}
    assert_equal(seg.segment(photo, NAMES), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in seg.model.state_dict().items())
    assert all(module.training for module in seg.model.modules())


def test_threads_that_share_a_segmenter(capsys: pytest.CaptureFixture[str]) -> None:
    assert threads.main(8) == 0
    assert capsys.readouterr().out.count("0 wrong of 32 calls") == 2


def test_threads_compute_scores_once(seg: ovs.Segmenter, photo: np.ndarray) -> None:
    result, found = seg.segment(photo, NAMES), []
    workers = [threading.Thread(target=lambda: found.append(result.scores)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 8 and all(scores is result.scores for scores in found)


def scale_data(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.25)


def permute_data(model: torch.nn.Module) -> None:
    weight = model.text_encoder.token_embedding.weight  # type: ignore[union-attr]
    weight.data.copy_(weight.data.flip(0))


def replace_data(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = 1.25 * parameter.data


CHANGES: list[Callable[[Any], object]] = [
    scale_data,
    permute_data,
    replace_data,
    lambda model: model.to(torch.bfloat16),
    lambda model: model.load_state_dict({name: 1.25 * tensor for name, tensor in model.state_dict().items()}),
]


@pytest.mark.parametrize("change", CHANGES, ids=["scale", "permute", "replace", "dtype", "load"])
def test_cached_text_does_not_outlive_its_weights(change: Callable[[Any], object], seg: ovs.Segmenter) -> None:
    seg.embed_text(NAMES)
    change(seg.model)
    expected = ovs.Segmenter(copy.deepcopy(seg.model)).embed_text(NAMES)
    assert torch.equal(seg.embed_text(NAMES), expected)
    assert expected.dtype == seg.model.pixel_mean.dtype


@pytest.mark.parametrize("change", CHANGES[2:], ids=["replace", "dtype", "load"])
def test_an_encoded_image_does_not_outlive_its_weights(
    change: Callable[[Any], object], seg: ovs.Segmenter, photo: np.ndarray
) -> None:
    encoded = seg.encode(photo)
    change(seg.model)
    with pytest.raises(ValueError, match=r"have changed since the image was encoded; encode it again\.$"):
        encoded.segment(NAMES)
    with pytest.raises(ValueError, match="encode it again"):
        pickle.dumps(encoded)


def test_where_layers_do_not_see_data_writes_the_segmenter_does(
    photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the contents of weights are not compared."""
    monkeypatch.setattr(Prepared, "compares", staticmethod(lambda device: False))
    seg = ovs.load("catseg-tiny", device="cpu")
    seg.segment(photo, NAMES)
    assert any(module.entries for module in seg.model.modules() if isinstance(module, Prepared))
    scale_data(seg.model.aggregator)  # type: ignore[arg-type]
    expected = ovs.Segmenter(copy.deepcopy(seg.model)).segment(photo, NAMES)
    assert_equal(seg.segment(photo, NAMES), expected)


def test_a_digest_sees_every_change() -> None:
    tensors = [
        torch.randn(300, 70),
        torch.randn(7),
        torch.randn(3).bfloat16(),
        torch.randn(4, 6).t(),
        torch.tensor(2.0),
    ]
    tensors.append(torch.randn(1 << 20))
    before = steady.digest(tensors)
    assert steady.digest([tensor.clone() for tensor in tensors]) == before
    for tensor in tensors:
        kept = tensor.clone()
        for index in (0, -1):
            place = tuple(index for _ in tensor.shape)
            tensor[place] = torch.nextafter(tensor[place], torch.tensor(9.0).to(tensor.dtype))
            assert steady.digest(tensors) != before
            tensor.copy_(kept)
        if tensor.dim():
            tensor.copy_(kept.flip(0))
            assert steady.digest(tensors) != before
            tensor.copy_(kept)
    assert steady.digest(tensors) == before
    assert steady.digest(()) == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_dtype_takes_all_images(dtype: torch.dtype, seg: ovs.Segmenter) -> None:
    model = seg.model.to(dtype)
    text = model.text_from_prompts(seg.embed_text(NAMES))
    pixels = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    expected = model(pixels, text)
    assert expected.dtype == dtype and expected.isfinite().all()
    for other in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        result = model((pixels / 255).to(other), text)
        assert result.dtype == dtype
        assert (result - expected).abs().mean() < 0.05 * expected.abs().mean()
    loss = model.loss(pixels, torch.randint(0, 3, (1, 96, 96)), text)["loss"]
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, "autocast"])
def test_many_classes_are_chosen_by_float32_cosines(low: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosines that 16 bits cannot tell apart still choose the best classes."""
    aggregator = ovs.load("catseg-tiny", device="cpu").model.aggregator  # type: ignore[union-attr]
    chosen: list[torch.Tensor] = []
    embed = ovs.ops.embed_volume
    image, base = torch.randn(1, 12, 12, 64), torch.randn(64)
    image[0, 5, 5] = base
    order = torch.randperm(60)
    text = base + torch.linspace(0, 0.002, 60)[order].sqrt().unsqueeze(1) * torch.randn(
        64
    )  # the cosine falls with each
    appearance = [torch.randn(1, 24, 24, 32), torch.randn(1, 48, 48, 16)]
    if low != "autocast":
        aggregator.to(low)
        image, text, appearance = image.to(low), text.to(low), [maps.to(low) for maps in appearance]
    cosines = torch.nn.functional.cosine_similarity(image.float().view(-1, 1, 64), text.float(), dim=-1).amax(0)
    expected = cosines.topk(32).indices.sort().values

    def spy(volume: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        chosen.append(volume.float().amax((0, 2, 3, 4)))
        return embed(volume, *weights)

    monkeypatch.setattr(ovs.ops, "embed_volume", spy)
    block = torch.autocast("cpu", torch.bfloat16) if low == "autocast" else nullcontext()
    with torch.no_grad(), block:
        logits = aggregator(image, text.unsqueeze(1), appearance, 1)
    kept = (logits[0].float().flatten(1) != -100).any(1).nonzero().view(-1)
    assert torch.equal(kept, expected)
    low_dtype = torch.bfloat16 if low == "autocast" else low
    assert len(cosines.to(low_dtype).unique()) < len(cosines.unique())  # 16 bits would have tied some
