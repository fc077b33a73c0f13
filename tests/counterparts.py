"""The literal form of an operator's call: the same arguments in the published layout, the result in ours.

`counterpart(function, call)` prepares everything, so that its `run` holds nothing but the literal form and can be
timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import literal
from goldens import ATTENTION, CLASSES, SPATIAL, STAGE, to_published
from ovseg_fast import ops
from samples import Call, arguments, floating, map_floating, tensors
from tolerances import CANCELLED_FLOAT64, REWRITE_FLOAT64, REWRITE_GRADIENT_FACTOR, relative_error


class Counterpart(NamedTuple):
    """`run()` is the literal form on prepared inputs; `to_ours` brings its result to the operator's layout."""

    run: Callable[[], Any]
    to_ours: Callable[[Any], Any]

    def result(self) -> Any:
        return self.to_ours(self.run())


def counterpart(function: str, call: Call) -> Counterpart:
    """The literal form of a call of `ovseg_fast.ops.<function>`."""
    return COUNTERPARTS[function](**arguments(function, call))


def assert_rewrite(function: str, call: Call) -> None:
    """Operator and literal form agree in float64 on a random call, and so do all their gradients."""

    def theirs(*args: Any, **keywords: Any) -> Any:
        return counterpart(function, (args, keywords)).result()

    assert_equal_functions(call, getattr(ops, function), theirs)


def assert_equal_functions(call: Call, ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    """Two functions agree on a float64 call, and so do the gradients of a random projection of their results."""
    outcomes = []
    cotangents: list[Tensor] = []
    for function in (theirs, ours):
        args, kwargs = leaves = map_floating(lambda tensor: tensor.detach().clone().requires_grad_(), call)
        results = tensors(function(*args, **kwargs))
        cotangents = cotangents or [torch.randn_like(result) for result in results]
        projected = sum((a * b).sum() for a, b in zip(results, cotangents, strict=True))
        outcomes.append((results, torch.autograd.grad(projected, floating(leaves), materialize_grads=True)))
    (expected, expected_gradients), (results, gradients) = outcomes
    for result, truth in zip(results, expected, strict=True):
        assert result.dtype == torch.float64
        assert relative_error(result, truth) <= REWRITE_FLOAT64
    largest = max(float(tensor.norm()) for tensor in (*expected_gradients, *cotangents))
    for gradient, truth in zip(gradients, expected_gradients, strict=True):
        cancelled = float((gradient - truth).norm()) <= CANCELLED_FLOAT64 * largest
        assert cancelled or relative_error(gradient, truth) <= REWRITE_GRADIENT_FACTOR * REWRITE_FLOAT64


def per_image(tensor: Tensor, batch: int, dim: int) -> Tensor:
    """What all images share repeated for each of them; unchanged when it has `dim` axes already."""
    return tensor if tensor.dim() == dim else tensor[None].repeat(batch, *[1] * tensor.dim())


def to_maps(tokens: Tensor) -> Tensor:
    """(B, T, H, W, C) -> (B, C, T, H, W)."""
    return tokens.permute(0, 4, 1, 2, 3).contiguous()


def to_tokens(maps: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, T, H, W, C)."""
    return maps.permute(0, 2, 3, 4, 1)


def cost_volume(image: Tensor, text: Tensor) -> Counterpart:
    maps, text = image.permute(0, 3, 1, 2).contiguous(), text[None].repeat(len(image), 1, 1, 1)
    return Counterpart(lambda: literal.cost_volume(maps, text), to_tokens)


def cost_embedding(image: Tensor, text: Tensor, weight: Tensor, bias: Tensor) -> Counterpart:
    volume = cost_volume(image, text)
    return Counterpart(lambda: literal.cost_embedding(volume.run(), weight, bias), to_tokens)


def embed_volume(volume: Tensor, weight: Tensor, bias: Tensor) -> Counterpart:
    maps = to_maps(volume)
    return Counterpart(lambda: literal.cost_embedding(maps, weight, bias), to_tokens)


def spatial_aggregation(
    x: Tensor, guidance: Tensor, *, heads: int, window: int, shift: int, **parameters: Tensor
) -> Counterpart:
    batch, classes, height, width, channels = x.shape
    weights = to_published(SPATIAL, parameters)
    tokens, guidance = x.reshape(batch * classes, height * width, channels), guidance.flatten(1, 2)

    def run() -> Tensor:
        repeated = guidance[:, None].repeat(1, classes, 1, 1).flatten(0, 1)
        return literal.swin_block(weights, "", tokens, repeated, (height, width), window, shift, heads)

    return Counterpart(run, lambda out: out.reshape(x.shape))


def class_aggregation(
    x: Tensor,
    guidance: Tensor,
    *,
    heads: int,
    pooling: int,
    pad_length: int,
    attention: str = "linear",
    **parameters: Tensor,
) -> Counterpart:
    weights = to_published(CLASSES, parameters)
    maps, guidance = to_maps(x), per_image(guidance, len(x), 3)
    return Counterpart(
        lambda: literal.class_aggregation(weights, "", maps, guidance, pooling, pad_length, heads, attention), to_tokens
    )


def decoder_stage(x: Tensor, guidance: Tensor, **parameters: Tensor) -> Counterpart:
    """Of `upsampling_decoder` on the `guidance_term` of this guidance; published group norms have D // 16 groups."""
    weights = to_published(STAGE, parameters)
    maps, guidance = x.flatten(0, 1).permute(0, 3, 1, 2).contiguous(), guidance.permute(0, 3, 1, 2).contiguous()
    return Counterpart(
        lambda: literal.upsampling_stage(weights, "", maps, guidance),
        lambda out: out.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]),
    )


def encoder_block(x: Tensor, *, heads: int, dense: bool = False, **others: Any) -> Counterpart:
    weights = {ENCODER_NAMES[name]: others.pop(name) for name in ENCODER_NAMES}
    if dense:
        return Counterpart(lambda: literal.clip_value_block(weights, "", x), lambda out: out)
    options = {**others, "head_width": x.shape[-1] // heads}
    return Counterpart(lambda: literal.clip_block(weights, "", x, **options), lambda out: out)


def layer_gather(
    hidden: Sequence[Tensor],
    patches: int,
    shared_weight: Tensor,
    shared_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    projection: Tensor,
    weights: Tensor | None = None,
) -> Counterpart:
    published = {
        "prompt_norm.weight": shared_weight,
        "prompt_norm.bias": shared_bias,
        "ln_post.weight": norm_weight[-1],
        "ln_post.bias": norm_bias[-1],
        "proj_layers": projection[:-1],
        "proj": projection[-1],
    }
    for i in range(len(hidden) - 1):
        published |= {f"ln_layers.{i}.weight": norm_weight[i], f"ln_layers.{i}.bias": norm_bias[i]}

    def run() -> list[Tensor]:
        maps = literal.layer_gather(published, hidden, (1, patches))[0]
        return maps if weights is None else [literal.gaussian_aggregation(maps, weights)]

    def to_ours(maps: list[Tensor]) -> Tensor:
        tokens = torch.stack([layer.squeeze(2).transpose(1, 2) for layer in maps])
        return tokens if weights is None else tokens[0]

    return Counterpart(run, to_ours)


def gaussian_aggregation(features: Tensor, weights: Tensor) -> Counterpart:
    maps = [layer.transpose(1, 2).unsqueeze(2).contiguous() for layer in features]
    return Counterpart(lambda: literal.gaussian_aggregation(maps, weights), lambda out: out.squeeze(2).transpose(1, 2))


def mask_attention(queries: Tensor, memory: Tensor, *, heads: int, **parameters: Tensor) -> Counterpart:
    weights = to_published(ATTENTION, parameters)
    return Counterpart(lambda: literal.mask_attention(weights, "", queries, memory, heads), lambda out: out[0])


def mask_scores(queries: Tensor, memory: Tensor, *, heads: int, **parameters: Tensor) -> Counterpart:
    """The literal form computes the attended values too: the published last layers do."""
    absent = {name.replace("q_", part): parameters[name] for part in ("v_", "proj_") for name in ("q_weight", "q_bias")}
    full = mask_attention(queries, memory, heads=heads, **parameters, **absent)
    return Counterpart(full.run, lambda out: out[1])


def score_map(
    logits: Tensor, placement: ops.Placement, *, whole: Tensor | None = None, offset: Tensor | None = None
) -> Counterpart:
    """Either method's sliding window at any sizes; each step on whole tensors."""

    positions, window, canvas, size = placement

    def resize(maps: Tensor, to: tuple[int, int]) -> Tensor:
        return F.interpolate(maps, to, mode="bilinear", align_corners=False)

    def run() -> Tensor:
        scores = torch.sigmoid(resize(logits, window))
        if offset is not None:
            scores = scores - offset[:, None, None]
        blended = literal.overlap_average(scores, positions, canvas)[None]
        if whole is not None:
            blended = (blended + resize(torch.sigmoid(resize(whole, window)), canvas)) / 2
        return resize(blended, size)[0]

    return Counterpart(run, lambda scores: scores)


def label_map(**parameters: Any) -> Counterpart:
    scores = score_map(**parameters)
    return Counterpart(lambda: scores.run().argmax(0), lambda labels: labels.int())


def mask_losses(logits: Tensor, labels: Tensor, *, terms: Sequence[str] = ("bce",)) -> Counterpart:
    def run() -> dict[str, Tensor]:
        losses = {}
        if "bce" in terms:
            losses["bce"] = literal.catseg_loss(logits, labels)
        if not {"focal", "dice"}.isdisjoint(terms):
            losses["focal"], losses["dice"] = literal.cascade_losses(logits, labels)
        return losses

    return Counterpart(run, lambda losses: {name: losses[name] for name in terms})


def top_labels(*, k: int, **parameters: Any) -> Counterpart:
    scores = score_map(**parameters)
    return Counterpart(
        lambda: scores.run().sort(dim=0, descending=True, stable=True),
        lambda found: (found.values[:k], found.indices[:k].int()),
    )


ENCODER_NAMES = {  # of our weights in CLIP's blocks
    **{f"norm{i}_{kind}": f"ln_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")},
    **{f"{part}_weight": f"attn.{part}_proj_weight" for part in "qkv"},
    "qkv_bias": "attn.in_proj_bias",
    **{f"proj_{kind}": f"attn.out_proj.{kind}" for kind in ("weight", "bias")},
    **{f"fc1_{kind}": f"mlp.c_fc.{kind}" for kind in ("weight", "bias")},
    **{f"fc2_{kind}": f"mlp.c_proj.{kind}" for kind in ("weight", "bias")},
}

COUNTERPARTS: dict[str, Callable[..., Counterpart]] = {
    "cost_volume": cost_volume,
    "cost_embedding": cost_embedding,
    "embed_volume": embed_volume,
    "spatial_aggregation": spatial_aggregation,
    "class_aggregation": class_aggregation,
    "encoder_block": encoder_block,
    "layer_gather": layer_gather,
    "gaussian_aggregation": gaussian_aggregation,
    "mask_attention": mask_attention,
    "mask_scores": mask_scores,
    "mask_losses": mask_losses,
    "score_map": score_map,
    "label_map": label_map,
    "top_labels": top_labels,
}
