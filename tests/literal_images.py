"""Images for the literal encoders, and what CAT-Seg's features are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import literal
from goldens import filled, golden

CLIP = "sem_seg_head.predictor.clip_model."
CLIP_PIXELS = (122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.3231630)
IMAGENET_PIXELS = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def normalised(pixels: Tensor, constants: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, std = (torch.tensor(c, device=pixels.device).reshape(1, 3, 1, 1) for c in constants)
    return (pixels - mean) / std


def catseg_logits(pixels: Tensor, pooling: int) -> Tensor:
    """CAT-Seg ViT-B/16 from normalised images (B, 3, 384, 384) to logits, with the golden's text."""
    size = len(pixels)
    upsample = [filled("catseg_vitb", f"upsample{i}.", "C") for i in (1, 2)]
    with torch.no_grad():
        dense, guidance = literal.dense_image_encoder(filled("catseg_vitb", CLIP + "visual.", "C"), pixels)
        g1, g2 = (
            F.conv_transpose2d(g, w["weight"], w["bias"], stride=w["weight"].shape[-1])
            for g, w in zip(guidance, upsample, strict=True)
        )
        features = dense[:, 1:].transpose(1, 2).reshape(size, 512, 24, 24)
        text = torch.from_numpy(golden("catseg_vitb").store["text"])[:, None].to(pixels.device)
        weights = filled("catseg_vitb", "sem_seg_head.predictor.transformer.", "C")
        return literal.catseg_head(weights, features, text.expand(size, *text.shape), g1, g2, pooling)
