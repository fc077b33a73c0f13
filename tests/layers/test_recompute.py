"""Recomputation: the same results, less memory held between the passes, and the backend of the forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

import ovseg_fast as ovs
from ovseg_fast import backends
from ovseg_fast.layers import recompute
from ovseg_fast.layers.cost_aggregator import CostAggregator
from ovseg_fast.layers.recompute import recomputed
from tolerances import REWRITE_FLOAT64, REWRITE_GRADIENT_FACTOR, relative_error

CLASSES, SIDE = 40, 12  # several tiles


@pytest.fixture(autouse=True)
def _torch_backend():
    with ovs.backend("torch"):
        yield


@pytest.fixture
def aggregator():
    sizes = {"channels": 16, "guidance": 16, "heads": 2, "window": 6, "pad_length": 64, "layers": 2}
    decoder = {"decoder_appearance": (8, 8), "decoder_guidance": (8, 4), "decoder_channels": (16, 8)}
    return CostAggregator(embed_dim=12, prompts=1, **sizes, **decoder).double()


def inputs(rng, batch=2):
    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64, requires_grad=True)

    return draw(batch, SIDE, SIDE, 12), draw(CLASSES, 1, 12), draw(batch, 24, 24, 8), draw(batch, 48, 48, 8)


def step(aggregator, image, text, *appearance):
    """Logits, gradients of inputs and weights, and elements held for the backward pass."""
    held = {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        logits = aggregator(image, text, appearance, 2)
    kept = sum(held.values())
    leaves = [image, text, *appearance, *aggregator.parameters()]
    cotangent = torch.sin(torch.arange(logits.numel(), dtype=logits.dtype)).view_as(logits)
    return logits, torch.autograd.grad((logits * cotangent).sum(), leaves), kept


def test_same_results_and_less_held(rng, aggregator, monkeypatch):
    arguments = inputs(rng)
    logits, gradients, kept = step(aggregator, *arguments)
    monkeypatch.setattr(recompute, "recomputes", lambda x: False)
    stored_logits, stored_gradients, stored_kept = step(aggregator, *arguments)
    assert relative_error(logits, stored_logits) <= REWRITE_FLOAT64
    for gradient, stored in zip(gradients, stored_gradients, strict=True):
        limit = REWRITE_GRADIENT_FACTOR * REWRITE_FLOAT64 * stored.norm() + 1e-12 * max(g.norm() for g in gradients)
        assert (gradient - stored).norm() <= limit
    assert kept <= stored_kept / 2


def test_nothing_is_recomputed_without_gradients(aggregator, rng, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("recomputed")

    monkeypatch.setattr("ovseg_fast.layers.recompute.checkpoint", refuse)
    image, text, *appearance = inputs(rng)
    with torch.no_grad():
        aggregator(image, text, appearance, 2)
    with pytest.raises(AssertionError, match="recomputed"):
        aggregator(image, text, appearance, 2)


def test_the_backward_pass_takes_the_backend_of_the_forward_pass():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(backends.requested())
            return (x * x).sin()

    spy, x = Spy(), torch.rand(3, requires_grad=True)
    with ovs.backend("auto"):
        with ovs.backend("torch"):
            y = recomputed(spy, spy.forward, x)
        y.sum().backward()
        assert seen == ["torch", "torch"]
        assert backends.requested() == "auto"


def test_weights_lent_for_the_forward_pass_alone_are_those_of_the_backward_pass(aggregator, rng):
    image, text, *appearance = inputs(rng)
    lent = {name: torch.randn_like(weight, requires_grad=True) for name, weight in aggregator.named_parameters()}
    logits = functional_call(aggregator, lent, (image, text, appearance, 2))
    gradients = torch.autograd.grad(logits.square().mean(), [image, *lent.values()])
    aggregator.load_state_dict(lent)
    expected = torch.autograd.grad(
        aggregator(image, text, appearance, 2).square().mean(), [image, *aggregator.parameters()]
    )
    for gradient, other in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, other)


def test_autocast_is_kept(rng, aggregator):
    image, text, *appearance = (tensor.detach().float().requires_grad_() for tensor in inputs(rng, 1))
    aggregator.float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = aggregator(image, text, appearance, 2)
    logits.float().square().mean().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in aggregator.parameters())
