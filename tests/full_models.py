"""The full-size models with the golden numbers' weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import literal
import ovseg_fast as ovs
from goldens import DEVICE, filled
from ovseg_fast.checkpoints.upstream import Stored, upstream_format
from ovseg_fast.models import CascadeCLIP, CATSeg, SegmentationModel


def full_model(preset: str, keys: str, salt: str) -> torch.nn.Module:
    """A preset with the goldens' weights, in evaluation mode."""
    model = ovs.build(preset)
    ovs.checkpoints.load_upstream(model, filled(keys, "", salt))
    return model.eval().to(DEVICE)


def upstream_parts(model: SegmentationModel) -> dict[str, Stored]:
    """Which of our tensors each upstream name stands for."""
    return upstream_format(model.upstream_rules, {name: tensor.shape for name, tensor in model.state_dict().items()})


def upstream_trainable(model: SegmentationModel) -> list[str]:
    """Upstream's names of the parameters that require gradients; what we never read is none and left out."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    stored = upstream_parts(model).items()
    return [name for name, (_, parts) in stored if all(own in trainable for own, _ in parts)]


def upstream_gradients(model: SegmentationModel) -> dict[str, Tensor | None]:
    """Gradients of the trainable parameters under upstream's names and in its shapes; None where there is none."""
    parameters, stored = dict(model.named_parameters()), upstream_parts(model)
    gradients: dict[str, Tensor | None] = {}
    for name in upstream_trainable(model):
        shape, parts = stored[name]
        own = [(parameters[part].grad, row) for part, row in parts]
        found = [grad.reshape(-1) if row is None else grad[row] for grad, row in own if grad is not None]
        gradients[name] = torch.cat(found).view(shape) if len(found) == len(own) else None
    return gradients


def literal_catseg_loss(
    model: CATSeg, weights: dict[str, Tensor], images: Tensor, labels: Tensor, tokens: Tensor
) -> Tensor:
    """The published training loss of CAT-Seg, literally and with its text encoder.

    Args:
        model: its sizes are used, nothing else. weights: under upstream's names.
        images: (B, 3, s, s) in 0..255, of the encoder's size. labels: (B, H, W). tokens: (T, P, 77).
    """
    config, prefix = model.config, "sem_seg_head.predictor."
    clip, head = below(weights, prefix + "clip_model."), below(weights, prefix + "transformer.")
    text = F.normalize(literal.text_encoder(clip, tokens.flatten(0, 1)), dim=-1).unflatten(0, tokens.shape[:2])
    pixels = (images - model.pixel_mean) / model.pixel_std
    dense, guidance = literal.dense_image_encoder(clip, pixels, config.guidance_blocks, "visual.")
    maps = [
        F.conv_transpose2d(part, weights[f"upsample{i}.weight"], weights[f"upsample{i}.bias"], stride=2 * i)
        for i, part in enumerate(guidance, 1)
    ]
    features = dense[:, 1:].transpose(1, 2).reshape(len(images), -1, *guidance[0].shape[-2:])
    text = text.expand(len(images), *text.shape)
    sizes = {"pad_len": config.pad_length, "window": config.window, "heads": config.heads}
    logits = literal.catseg_head(head, features, text, *maps, config.class_pooling, **sizes)
    return literal.catseg_loss(logits, labels)


def literal_cascade_losses(
    model: CascadeCLIP, weights: dict[str, Tensor], images: Tensor, labels: Tensor, text: Tensor
) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of Cascade-CLIP without their weights, literally and without dropout; arguments as above,
    text (T, E)."""
    outputs = (*(block for stage in model.config.stages for block in stage), model.image_encoder.clip.layers - 1)
    backbone, head = below(weights, "backbone."), below(weights, "decode_head.")
    pixels = (images - model.pixel_mean) / model.pixel_std
    features, embedding = literal.layer_gather(backbone, *literal.prompted_image_encoder(backbone, pixels, outputs))
    return literal.cascade_losses(literal.cascade_masks(head, features, embedding, text, model.config.heads), labels)


def below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with the prefix, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
