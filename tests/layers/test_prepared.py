"""What the layers remember of their weights is never out of date, and really is remembered."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, jvp

import ovseg_fast as ovs
from ovseg_fast.layers.cost_aggregator import CostAggregator
from ovseg_fast.layers.prepared import Prepared

SIZES = {"channels": 16, "guidance": 8, "heads": 2, "window": 3, "pad_length": 6, "layers": 1}
DECODER = {"decoder_appearance": (4, 3), "decoder_guidance": (4, 2), "decoder_channels": (16, 8)}


class Twice(nn.Module):
    """A module of which something is prepared, and how often that was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.prepared = Prepared()
        self.computed = 0

    def twice(self, weight: Tensor, *_: Tensor) -> Tensor:
        self.computed += 1
        return 2 * weight @ torch.eye(4)

    def forward(self, *others: Tensor) -> Tensor:
        return self.prepared(self.twice, self.weight, *others)


@pytest.fixture
def aggregator() -> CostAggregator:
    model = CostAggregator(embed_dim=6, prompts=2, **SIZES, **DECODER).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    return model


@pytest.fixture
def inputs() -> tuple[Any, ...]:
    appearance = [torch.randn(1, 12, 12, 4), torch.randn(1, 24, 24, 3)]
    return torch.randn(1, 6, 6, 6), torch.randn(4, 2, 6), appearance, 1


def uncached(model: CostAggregator, inputs: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(Prepared, "forward", lambda self, function, *tensors: function(*tensors))
        return model(*inputs)


def optimiser_step(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.enable_grad():
        model(*inputs).square().mean().backward()
    optimizer.step()
    return model


def load(model: nn.Module, _: Any) -> nn.Module:
    model.load_state_dict({name: 1.5 * tensor for name, tensor in model.state_dict().items()})
    return model


def assign(model: nn.Module, _: Any) -> nn.Module:
    model.load_state_dict({name: 1.5 * tensor for name, tensor in model.state_dict().items()}, assign=True)
    return model.requires_grad_()


def through_data(model: nn.Module, _: Any) -> nn.Module:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    return model


def other_data(model: nn.Module, _: Any) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = 1.5 * parameter.data
    return model


def deep_copy(model: nn.Module, _: Any) -> nn.Module:
    return through_data(copy.deepcopy(model), None)


def pickled(model: nn.Module, _: Any) -> nn.Module:
    return through_data(pickle.loads(pickle.dumps(model)), None)


CHANGES: list[Callable[..., Any]] = [optimiser_step, load, assign, through_data, other_data, deep_copy, pickled]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("inference", [False, True])
def test_changed_weights_are_noticed(
    change: Callable[..., Any],
    inference: bool,
    aggregator: CostAggregator,
    inputs: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mode = torch.inference_mode if inference else torch.no_grad
    with mode():
        before = aggregator(*inputs)
    model = change(aggregator, inputs)
    with mode():
        result, expected = model(*inputs), uncached(model, inputs, monkeypatch)
        assert torch.equal(result, expected)
        assert torch.equal(model(*inputs), expected)
        assert not torch.equal(result, before)


@torch.no_grad()
def test_dtype_autocast_and_text_are_noticed(
    aggregator: CostAggregator, inputs: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, text, appearance, pooling = inputs
    single = aggregator(*inputs)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            low = aggregator(*inputs)
            assert torch.equal(low, uncached(aggregator, inputs, monkeypatch))
        assert torch.equal(aggregator(*inputs), single)
    other = aggregator(image, 2 + text, appearance, pooling)
    text.add_(2)
    assert torch.equal(aggregator(*inputs), other) and not torch.equal(other, single)
    wide = (image.double(), text.double(), [maps.double() for maps in appearance], pooling)
    assert torch.equal(aggregator.double()(*wide), uncached(aggregator, wide, monkeypatch))


def test_training_follows_inference(
    aggregator: CostAggregator, inputs: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        aggregator(*inputs)
    for frozen in (False, True):
        image = inputs[0].clone().requires_grad_()
        aggregator.requires_grad_(not frozen)
        leaves = [image] if frozen else [image, *aggregator.parameters()]
        results = [aggregator(image, *inputs[1:]), uncached(aggregator, (image, *inputs[1:]), monkeypatch)]
        found, expected = (torch.autograd.grad(result.square().mean(), leaves) for result in results)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_lent_weights_are_those_of_the_call(
    aggregator: CostAggregator, inputs: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    lent = {name: 1.5 * parameter.detach() for name, parameter in aggregator.named_parameters()}
    with torch.no_grad():
        before = aggregator(*inputs)
        result = functional_call(aggregator, lent, inputs)
        assert torch.equal(aggregator(*inputs), before)
        aggregator.load_state_dict(lent)
        assert torch.equal(result, uncached(aggregator, inputs, monkeypatch))


@torch.no_grad()
def test_a_second_call_computes_nothing_again(aggregator: CostAggregator, inputs: tuple[Any, ...]) -> None:
    calls: list[str] = []

    def counted(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        return lambda *tensors: (calls.append(name), function(*tensors))[1]

    with pytest.MonkeyPatch.context() as patch, ovs.backend("torch"):
        for place in ("layers.upsampling_decoder.joint_kernel", "ops.class_aggregation.guidance_terms"):
            module = __import__(f"ovseg_fast.{place.rpartition('.')[0]}", fromlist=["_"])
            name = place.rpartition(".")[2]
            patch.setattr(module, name, counted(getattr(module, name), name))
        aggregator(*inputs)
        assert sorted(calls) == ["guidance_terms", "joint_kernel", "joint_kernel"]
        aggregator(*inputs)
        assert len(calls) == 3
        aggregator(inputs[0], inputs[1] + 1, *inputs[2:])  # another text, the same weights
        assert calls[3:] == ["guidance_terms"]


@torch.no_grad()
def test_what_forgets() -> None:
    model = Twice()
    steps = (model.eval, model.train, model.float, lambda: model.load_state_dict(model.state_dict()), lambda: model)
    for forget in steps:
        forget()
        assert not model.prepared.entries or forget is steps[-1]
        for _ in range(2):
            assert torch.equal(model(), 2 * model.weight)
    assert model.computed == 4
    assert not copy.deepcopy(model).prepared.entries
    assert not pickle.loads(pickle.dumps(model)).prepared.entries
    assert model.prepared.entries
    assert not model.prepared.state_dict()


def test_nothing_is_remembered_where_that_could_be_wrong() -> None:
    model, weight = Twice(), torch.randn(3, 4)
    with torch.no_grad():
        model()
    assert model().requires_grad
    with torch.no_grad():
        _, slope = jvp(lambda weight: functional_call(model, {"weight": weight}, ()), (model.weight,), (weight,))
        assert torch.equal(slope, 2 * weight)
        each = torch.vmap(lambda weight: functional_call(model, {"weight": weight}, ()))(weight.expand(2, 3, 4))
        assert torch.equal(each, 2 * weight.expand(2, 3, 4))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(model.weight.detach(), weight)
            result = functional_call(model, {"weight": dual}, ())
            assert torch.equal(forward_ad.unpack_dual(result).tangent, 2 * weight)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(model(torch.ones(1)), FakeTensor)
        assert type(model()) is Tensor and torch.equal(model(), 2 * model.weight)


@torch.no_grad()
def test_results_are_those_of_a_compiled_call() -> None:
    torch.compiler.reset()
    model = Twice()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        model.weight.data.mul_(1.5)
        assert torch.equal(compiled(), 2 * model.weight) and torch.equal(model(), 2 * model.weight)


@torch.no_grad()
def test_memory_that_another_tensor_takes_over() -> None:
    """The same address, version and shape, not the same tensor."""
    prepared = Prepared()
    for _ in range(20):
        weight = torch.randn(3, 4)
        assert torch.equal(prepared(torch.neg, weight), -weight)
        del weight


@torch.no_grad()
def test_threads_share_what_is_remembered() -> None:
    prepared, weights = Prepared(), [torch.randn(64, 64) for _ in range(4)]

    def run(number: int) -> bool:
        weight = weights[number % 4]
        return torch.equal(prepared(torch.neg, weight), -weight)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(400)))
