"""Pictures of what a model in training predicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import write_whole
from ..visualize import overlay, palette

HEIGHT = 240  # of a row in pixels
GAP = 6


def comparison(rows: Sequence[tuple[Image.Image, np.ndarray, np.ndarray]], classes: Sequence[str]) -> Image.Image:
    """A row for each image: the image, the true labels (white where there is no class), the predicted ones over it.

    Args:
        rows: RGB images with their true labels (H, W), −1 for no class, and the predicted ones (H, W).
        classes: T names.
    """
    colours = np.concatenate([palette(len(classes)), np.full((1, 3), 255, np.uint8)])  # the last one is that of −1
    strips = []
    for image, truth, predicted in rows:
        parts = [image, Image.fromarray(colours[truth]), overlay(image, predicted, classes, legend=False)]
        width = max(1, round(image.width * HEIGHT / image.height))
        strips.append([part.resize((width, HEIGHT), Image.Resampling.NEAREST) for part in parts])
    widths = [3 * strip[0].width + 2 * GAP for strip in strips]
    sheet = Image.new("RGB", (max(widths), len(strips) * (HEIGHT + GAP) - GAP), "white")
    for number, strip in enumerate(strips):
        for place, part in enumerate(strip):
            sheet.paste(part, (place * (part.width + GAP), number * (HEIGHT + GAP)))
    return sheet


def save_comparison(
    path: Path, rows: Sequence[tuple[Image.Image, np.ndarray, np.ndarray]], classes: Sequence[str]
) -> None:
    """Write `comparison` as a PNG, whole or not at all."""
    picture = comparison(rows, classes)
    write_whole(path, picture.save)
