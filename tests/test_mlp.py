"""The Triton kernels of the residual MLP that both aggregation blocks share, for this part alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ovseg_fast.kernels.common import residual_mlp as kernels
from ovseg_fast.ops.common.residual_mlp import KERNEL_CHANNELS, mlp_backward, mlp_refusal, residual_mlp
from samples import Draw
from test_kernels import DEVICE, check_gradients
from tolerances import KERNEL, relative_error

NAMES = ("x", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
ACTIVATIONS = ("gelu", "relu")
ODD = ((2, 5, 7), 15, 37)
SIZES = [((4, 16), 16, 64), ((1, 1), 128, 65), ODD, ((67,), 128, 70), ((3, 11), 130, 33), ((40,), 256, 16)]


def build(
    rng: torch.Generator, sizes: tuple[tuple[int, ...], int, int], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The seven tensors of a call, of `sizes` (shape without channels, C, M)."""
    shape, channels, hidden = sizes
    draw = Draw(rng, dtype, DEVICE)
    parts = draw.norm(channels), draw.linear(hidden, channels), draw.linear(channels, hidden)
    return [draw.tokens(*shape, channels), *(tensor for part in parts for tensor in part)]


def away_from_ties(call: list[Tensor]) -> list[Tensor]:
    """The same call with a bias b₁ at which no row is near the tie of ReLU.

    Rounding to 16 bits carries some numbers over zero, where the gradient jumps: that says nothing about a kernel.
    """
    wide = [tensor.double() for tensor in call]
    normed = torch.nn.functional.layer_norm(wide[0], wide[0].shape[-1:], *wide[1:3]).flatten(0, -2)
    values = (normed @ wide[3].T).sort(0).values
    rows = len(values)
    if rows == 1:
        return [*call[:4], values[0].sign().to(call[4].dtype) / 2, *call[5:]]
    middle = values[rows // 4 : max(rows - rows // 4, 2)]
    gap = middle.diff(dim=0).argmax(0, keepdim=True)
    bias = -(middle.gather(0, gap) + middle.gather(0, gap + 1))[0] / 2
    return [*call[:4], bias.to(call[4].dtype), *call[5:]]


def run(call: list[Tensor], activation: str, backend: str = "triton") -> Tensor:
    return (kernels.residual_mlp if backend == "triton" else residual_mlp)(*call, activation=activation)


def gradients(call: list[Tensor], activation: str, backend: str = "triton") -> list[Tensor]:
    if backend == "triton":
        x, *weights = call
        grad = cotangent(x)
        return [*mlp_backward(kernels, grad, x, weights, activation, True, [True] * 6)]
    leaves = [tensor.detach().requires_grad_() for tensor in call]
    out = run(leaves, activation, backend)
    return list(torch.autograd.grad(out, leaves, cotangent(out)))


def cotangent(out: Tensor) -> Tensor:
    drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return drawn.to(out.device, out.dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernel_follows_float64(
    sizes: tuple[tuple[int, ...], int, int], activation: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    call = build(rng, sizes, dtype)
    if activation == "relu":
        call = away_from_ties(call)
    wide = [tensor.double() for tensor in call]
    assert relative_error(run(call, activation), run(wide, activation, "torch")) <= KERNEL[dtype]
    check_gradients(NAMES, gradients(call, activation), gradients(wide, activation, "torch"), dtype)


def test_weight_gradients_of_many_rows_are_summed_in_parts(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several steps a program, several programs, the last of them with fewer rows."""
    monkeypatch.setattr(kernels, "PROGRAMS", 9)
    call = build(rng, ((5, 41), 16, 40))
    wide = [tensor.double() for tensor in call]
    check_gradients(NAMES, gradients(call, "gelu"), gradients(wide, "gelu", "torch"), torch.float32)


def test_gelu_is_exact_to_the_precision_of_float32() -> None:
    """Where LN gives one in a single channel, W₁ a hidden unit's number there and W₂ is the identity, the output is
    GELU of these numbers: no sum has more than one term."""
    numbers = torch.linspace(-9, 9, KERNEL_CHANNELS, device=DEVICE)
    zeros, first = torch.zeros_like(numbers), torch.eye(len(numbers), device=DEVICE)[0]
    call = [zeros, zeros, first, numbers[:, None] * first, zeros, torch.eye(len(numbers), device=DEVICE), zeros]
    truth = torch.nn.functional.gelu(numbers.double())
    torch.testing.assert_close(run(call, "gelu").double(), truth, atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_rows_give_weight_gradients_of_zero(activation: str, rng: torch.Generator) -> None:
    call = build(rng, ((0, 3), 8, 20))
    assert run(call, activation).shape == (0, 3, 8)
    x, *others = gradients(call, activation)
    assert x.shape == (0, 3, 8)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in others)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_runs_repeat_bit_by_bit_and_leave_the_inputs_alone(activation: str, rng: torch.Generator) -> None:
    call = build(rng, ODD)
    before = [tensor.clone() for tensor in call]
    runs = [[run(call, activation), *gradients(call, activation)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(call, before, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_come_out_where_pytorch_has_them(activation: str, value: float, rng: torch.Generator) -> None:
    call = build(rng, ODD)
    for argument, name in enumerate(NAMES):
        bad = [tensor.clone() for tensor in call]
        target = bad[argument].view(-1)
        target[torch.randint(target.numel(), (1,), generator=rng)] = value
        result, truth = (run(bad, activation, backend) for backend in ("triton", "torch"))
        assert torch.equal(result.isfinite(), truth.isfinite()), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_computed_for_what_needs_them_alone(
    activation: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, *weights = call = build(rng, ((5,), 6, 7))
    everything = gradients(call, activation)
    flags: list[list[bool]] = []
    launcher = kernels.residual_mlp_backward
    monkeypatch.setattr(
        kernels, "residual_mlp_backward", lambda *arguments: (flags.append(arguments[-3:]), launcher(*arguments))[1]
    )
    for alone, name in enumerate(NAMES):
        needs = [place == alone for place in range(len(NAMES))]
        found = mlp_backward(kernels, cotangent(x), x, weights, activation, needs[0], needs[1:])
        assert torch.equal(found[alone], everything[alone]), name
        assert sum(flags[-1]) == 1


def test_rows_wider_than_a_kernel_holds_are_refused() -> None:
    width = KERNEL_CHANNELS + 1
    assert mlp_refusal(torch.empty(3, KERNEL_CHANNELS), torch.empty(7, KERNEL_CHANNELS)) is None
    reason = mlp_refusal(torch.empty(3, width), torch.empty(7, width))
    assert reason is not None
    assert str(width) in reason
    assert KERNEL_CHANNELS == kernels.CHANNELS
