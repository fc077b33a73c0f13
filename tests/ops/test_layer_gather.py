"""Layer gather: golden numbers and the literal form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import literal
import ovseg_fast as ovs
import samples
from counterparts import assert_rewrite
from goldens import DEVICE, filled, golden
from ovseg_fast import ops
from parity import fill
from tolerances import GOLDEN_OUTPUT, KERNEL, REWRITE_FLOAT64, relative_error


@pytest.fixture(params=["triton", "cuda"])
def kernels(request: pytest.FixtureRequest) -> str:
    """The backend whose kernels are tested."""
    if request.param == "cuda":
        request.getfixturevalue("emulation")
    return request.param


@pytest.mark.slow_in_interpreter
@pytest.mark.usefixtures("every_backend")
def test_golden() -> None:
    """Of hidden states that the literal image encoder gives."""
    case, weights = golden("cascade_clip"), filled("cascade_clip_vitb", "backbone.", "E")
    image = torch.from_numpy(fill.image("small.image", 384, 384, "E")).permute(2, 0, 1).float().to(DEVICE)
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]], device=DEVICE)[:, :, None, None]
    with torch.no_grad():
        hidden, (height, width) = literal.prompted_image_encoder(weights, ((image - mean) / std)[None])
    features = ops.layer_gather(
        hidden,
        height * width,
        weights["prompt_norm.weight"],
        weights["prompt_norm.bias"],
        torch.stack([*(weights[f"ln_layers.{i}.weight"] for i in range(6)), weights["ln_post.weight"]]),
        torch.stack([*(weights[f"ln_layers.{i}.bias"] for i in range(6)), weights["ln_post.bias"]]),
        torch.cat([weights["proj_layers"], weights["proj"][None]]),
    )
    for i, feature in enumerate(features):
        maps = feature.transpose(1, 2).unflatten(2, (height, width))
        assert case.error(f"small.feat{i}", maps) <= GOLDEN_OUTPUT


@settings(max_examples=40)
@given(
    sizes=st.fixed_dictionaries(
        {
            "layers": st.integers(1, 7),
            "batch": st.integers(1, 3),
            "prompts": st.integers(-1, 4),  # −1: no class token either
            "patches": st.integers(1, 9),
            "channels": st.integers(2, 12),
            "out": st.integers(1, 12),
            "weighted": st.booleans(),
        }
    )
)
def test_rewrite(sizes: dict[str, Any]) -> None:
    assert_rewrite("layer_gather", samples.draw(samples.layer_gather(**sizes)))


def test_epsilons_are_the_published_ones_unless_given(rng: torch.Generator) -> None:
    """Hidden states so small that the epsilons decide."""
    (hidden, *rest), _ = samples.layer_gather(layers=2)(samples.Draw(rng, torch.float64, "cpu"))
    hidden = [1e-3 * tokens for tokens in hidden]
    rest[1:3] = [1e-3 * rest[1], 1e-3 * rest[2]]
    assert_rewrite("layer_gather", ((hidden, *rest), {}))
    default = ops.layer_gather(hidden, *rest)
    assert relative_error(ops.layer_gather(hidden, *rest, shared_eps=1e-6, norm_eps=1e-5), default) <= REWRITE_FLOAT64
    assert relative_error(ops.layer_gather(hidden, *rest, shared_eps=1e-5), default) > 1e-4
    assert relative_error(ops.layer_gather(hidden, *rest, norm_eps=1e-6), default) > 1e-4


def test_length_is_one_and_prompts_take_no_part(rng: torch.Generator) -> None:
    (hidden, patches, *rest), _ = samples.layer_gather()(samples.Draw(rng, torch.float64, "cpu"))
    features = ops.layer_gather(hidden, patches, *rest)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(features.shape[:-1], dtype=torch.float64))
    changed = [tokens.clone() for tokens in hidden]
    for tokens in changed:
        tokens[:, :-patches] = float("nan")
    assert torch.equal(ops.layer_gather(changed, patches, *rest), features)


@pytest.mark.parametrize(
    ("value", "kind", "mention"),
    [
        (3, TypeError, "hidden must be a list of tensors (B, N, D), got int"),
        (torch.zeros(3, 1, 8, 8), TypeError, "hidden must be a list of tensors (B, N, D), got Tensor"),
        ([], ValueError, "hidden must hold at least one tensor"),
    ],
    ids=["int", "tensor", "empty"],
)
def test_hidden_must_be_a_list(value: Any, kind: type[Exception], mention: str) -> None:
    (_, *rest), _ = samples.draw(samples.layer_gather())
    with pytest.raises(kind) as caught:
        ops.layer_gather(value, *rest)
    assert mention in str(caught.value)


def test_a_row_of_norms_for_each_block() -> None:
    (hidden, *rest), _ = samples.draw(samples.layer_gather(layers=3))
    with pytest.raises(ValueError, match="norm_weight must have one row per block, 2, got 3"):
        ops.layer_gather(hidden[:2], *rest)


def test_a_weight_for_each_layer() -> None:
    (gathered, _) = samples.draw(samples.layer_gather(layers=3))
    with pytest.raises(ValueError, match="layer_gather: weights must be"):
        ops.layer_gather(*gathered, weights=torch.ones(2).double())


def test_with_weights_it_is_the_sum_of_the_gathered_layers(rng: torch.Generator) -> None:
    gathered, weights = samples.layer_gather(weighted=True)(samples.Draw(rng, torch.float64, "cpu"))
    for epsilons in ({}, {"shared_eps": 1e-2, "norm_eps": 1e-3}):
        expected = ops.gaussian_aggregation(ops.layer_gather(*gathered, **epsilons), **weights)
        assert torch.equal(ops.layer_gather(*gathered, **weights, **epsilons), expected)


@pytest.mark.parametrize("layers", [1, 3, 9])
def test_kernels_store_no_single_layer_of_a_sum(
    layers: int, kernels: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = samples.layer_gather(layers=layers, batch=2, patches=29, weighted=True)
    call, weights = build(samples.Draw(rng, torch.float32, DEVICE))
    wide, wide_weights = samples.map_tensors(Tensor.double, (call, weights))
    truth = ops.layer_gather(*wide, **wide_weights)
    allocated, new_empty = [], Tensor.new_empty

    def recorded(tensor: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        result = new_empty(tensor, *arguments, **keywords)
        allocated.append(result.numel())
        return result

    monkeypatch.setattr(Tensor, "new_empty", recorded)
    with ovs.backend(kernels):
        result = ops.layer_gather(*call, **weights)
    assert relative_error(result, truth) <= KERNEL[torch.float32]
    # One launch of Triton's takes eight layers; of more, the sums of each launch's are kept.
    assert sum(allocated) == result.numel() * (2 if kernels == "triton" and layers > 8 else 1)


def test_kernels_leave_a_wider_projection_to_pytorch(kernels: str, rng: torch.Generator) -> None:
    call, _ = samples.layer_gather(layers=1, patches=1, out=1025)(samples.Draw(rng, torch.float32, DEVICE))
    assert ops.layer_gather(*call).shape == (1, 1, 1, 1025)
    with ovs.backend(kernels), pytest.raises(RuntimeError, match="E = 1025 is larger than 1024"):
        ops.layer_gather(*call)


@pytest.mark.usefixtures("emulation")
def test_cuda_kernels_take_32_layers(rng: torch.Generator) -> None:
    draw = samples.Draw(rng, torch.float32, DEVICE)
    (call, _), (many, _) = (samples.layer_gather(layers=layers, patches=1)(draw) for layers in (32, 33))
    truth = ops.layer_gather(*samples.map_floating(Tensor.double, call))
    with ovs.backend("cuda"):
        assert relative_error(ops.layer_gather(*call), truth) <= KERNEL[torch.float32]
        with pytest.raises(RuntimeError, match="its CUDA C\\+\\+ kernels take up to 32 layers, got 33"):
            ops.layer_gather(*many)


@pytest.mark.parametrize(
    "wanted", ["hidden", "one hidden state", "shared_weight", "norm_bias", "projection", "weights"]
)
def test_kernels_give_each_gradient_alone(wanted: str, kernels: str, rng: torch.Generator) -> None:
    """The same as with the others; what is frozen gets none."""

    def gradients(chosen: set[int] | None) -> list[Tensor | None]:
        leaves = [tensor.detach().clone() for tensor in samples.tensors(call)]
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_(chosen is None or index in chosen)
        with ovs.backend(kernels):
            ops.layer_gather(leaves[:3], patches, *leaves[3:8], weights=leaves[8]).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    call = samples.layer_gather(weighted=True)(samples.Draw(rng, torch.float32, DEVICE))
    patches = call[0][1]
    chosen = {
        "hidden": {0, 1, 2},
        "one hidden state": {1},
        "shared_weight": {3},
        "norm_bias": {6},
        "projection": {7},
        "weights": {8},
    }
    everything = gradients(None)
    for index, gradient in enumerate(gradients(chosen[wanted])):
        if index in chosen[wanted]:
            assert gradient is not None
            assert relative_error(gradient, everything[index]) <= KERNEL[torch.float32]
        else:
            assert gradient is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_come_out_of_single_layers_too(value: float, kernels: str, rng: torch.Generator) -> None:
    """The rows that test_kernels takes for this are weighted sums."""
    call, _ = samples.layer_gather(layers=2)(samples.Draw(rng, torch.float32, DEVICE))
    for argument in range(len(samples.floating(call))):
        bad = samples.map_tensors(torch.clone, call)
        samples.floating(bad)[argument].view(-1)[-1] = value
        with ovs.backend(kernels):
            result = ops.layer_gather(*bad)
        with ovs.backend("torch"):
            truth = ops.layer_gather(*bad)
        assert torch.equal(result.isfinite(), truth.isfinite()), argument
        assert not truth.isfinite().all()


def test_kernels_read_the_tokens_where_they_lie(
    kernels: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states with unit stride over the channels are not copied."""
    (hidden, *rest), _ = samples.layer_gather(batch=2)(samples.Draw(rng, torch.float32, DEVICE))
    apart = [torch.stack([tokens, tokens], 2)[:, :, 0] for tokens in hidden]
    with ovs.backend(kernels):
        expected = ops.layer_gather(hidden, *rest)
        monkeypatch.setattr(torch.Tensor, "contiguous", refuse_copies)
        assert torch.equal(ops.layer_gather(apart, *rest), expected)


def refuse_copies(tensor: Tensor) -> Tensor:
    assert tensor.is_contiguous()
    return tensor
