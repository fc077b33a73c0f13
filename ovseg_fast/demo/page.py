"""The page that `ovseg-fast demo` writes: scene, truth and prediction, and the maps that led to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..segmentation import Segmentation
from ..segmenter import Segmenter
from ..visualize import Panel, cost_map, key, overlay, palette, panels

COLUMNS = 5  # the first row: scene, truth, prediction, wrong pixels, key
MIN_SIDE = 192  # of a panel in pixels, so that names fit above it
WRONG, PAPER, HATCH = (222, 36, 36), (255, 255, 255), (176, 176, 184)
UNNAMED = "no name was typed"


def cost_maps(segmenter: Segmenter, image: Image.Image, names: Sequence[str]) -> NDArray[np.float32]:
    """Cosines of dense image and text embeddings, (T, H, W) in −1..1, resized to the image, encoded in one pass.

    They are what the model starts from: the cost volume of CAT-Seg (section 3.2), the last stage of Cascade-CLIP.
    """
    model = segmenter.model.eval()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(segmenter.device, model.pixel_mean.dtype)
    with torch.no_grad():
        text = model.text_from_prompts(segmenter.embed_text(names))
        return model.cost_maps(pixels, text).float().cpu().numpy()


def page(
    result: Segmentation,
    truth: NDArray[np.int32],
    costs: NDArray[np.float32],
    notes: Sequence[str],
    shown: Sequence[int],
    title: str,
    subtitle: str,
) -> Image.Image:
    """Everything side by side.

    Args:
        result: of T names. truth: (H, W) indices into them, −1 for none. costs: (T, H, W), see `cost_maps`.
        notes: a few words on each name. shown: indices of the names whose maps are shown.

    Returns:
        an RGB image: the row listed at `COLUMNS`, then each shown name's costs, on one scale, and scores, from 0 to 1.
    """
    colours = [tuple(colour) for colour in palette(len(result.classes)).tolist()]
    longest = max(result.image.size)
    side = longest * -(-MIN_SIDE // longest)  # a whole multiple, so that borders stay even
    width, height = (length * side // longest for length in result.image.size)

    counted = truth >= 0
    wrong = counted & (result.labels != truth)
    judged = "pixels" if counted.all() else "named pixels"
    share = f"{100 * wrong.sum() / counted.sum():.1f} % of the {judged}" if counted.any() else "no pixel can be judged"
    present = sorted({*truth[counted].tolist(), *result.labels.ravel().tolist()})
    entries = [(colours[index], result.classes[index]) for index in present]
    if not counted.all():
        entries.append((HATCH, UNNAMED))
    first = [
        Panel(result.image, "Scene"),
        Panel(_coloured(result.image, truth, result.classes), "Truth"),
        Panel(_coloured(result.image, result.labels, result.classes), "Prediction"),
        Panel(_errors(result.image, wrong, counted), "Wrong pixels", note=share),
        Panel(key(entries, width, height), "Names"),
    ]
    rows = [first]
    low, high = float(costs[list(shown)].min()), float(costs[list(shown)].max())
    for start in range(0, len(shown), COLUMNS):
        rows += [[], []]
        for i in shown[start : start + COLUMNS]:
            maps, scores = costs[i], result.scores[i]
            note = f"cosine {maps.min():.2f} to {maps.max():.2f}"
            rows[-2].append(Panel(cost_map(maps, low, high), result.classes[i], notes[i], note, colours[i]))
            note = f"score {scores.min():.2f} to {scores.max():.2f}"
            rows[-1].append(Panel(cost_map(scores, 0, 1), note=note))
    return panels(rows, title, subtitle, side)


def _coloured(image: Image.Image, labels: NDArray[np.int32], names: Sequence[str]) -> Image.Image:
    """The names' colours over the image, hatched where no name fits."""
    known = np.where(labels < 0, len(names), labels)
    # Over grey: the scene's colours would change those of the names.
    picture = overlay(image.convert("L"), known, [*names, UNNAMED], alpha=0.75, legend=False)
    return _hatched(picture, labels < 0)


def _errors(image: Image.Image, wrong: NDArray[np.bool_], counted: NDArray[np.bool_]) -> Image.Image:
    """A pale image with the wrong pixels in red, hatched where the truth is unknown."""
    pale = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, PAPER), 0.6)
    pale.paste(WRONG, mask=Image.fromarray(np.uint8(220) * wrong))
    return _hatched(pale, ~counted)


def _hatched(picture: Image.Image, where: NDArray[np.bool_]) -> Image.Image:
    step = max(2, max(picture.size) // 32)
    rows, columns = np.indices(where.shape)
    lines = (rows + columns) % (2 * step) < step
    picture.paste(PAPER, mask=Image.fromarray(np.uint8(255) * where))
    picture.paste(HATCH, mask=Image.fromarray(np.uint8(255) * (where & lines)))
    return picture
