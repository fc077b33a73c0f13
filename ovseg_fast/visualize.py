"""Label maps and maps of numbers as pictures: colours, overlays with a legend, cost maps, pages of panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

SPREAD = 1024  # so many colours are chosen to lie far apart; further ones only differ
CALM = 32  # the first ones are neither dark nor glaring, so that a photograph shows through
LEGEND_MIN_SIDE = 320  # a picture whose longer side is shorter is enlarged when it gets a legend
PAPER, INK, FAINT = (255, 255, 255), (35, 35, 40), (110, 110, 118)
# Cost maps from low to high: ever lighter, so that they can be read without telling colours apart.
GRADIENT = ((24, 18, 62), (52, 60, 140), (28, 118, 158), (52, 170, 132), (164, 214, 84), (255, 240, 130))


def palette(n: int) -> np.ndarray:
    """Colours of classes 0..n-1, (n, 3) uint8, all different. Class i has the same colour whatever n is.

    Raises:
        ValueError: n is negative.
    """
    if n < 0:
        raise ValueError(f"n must be the number of colours, at least 0, got {n}.")
    spread = _spread_colours()
    if n <= len(spread):
        return spread[:n].copy()
    # An odd factor visits every 24-bit colour once, in an order that jumps about.
    codes = np.arange(n, dtype=np.int64) * 0x9E3779B1 % 2**24
    further = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1).astype(np.uint8)
    used = {tuple(colour) for colour in spread.tolist()}
    new = [colour for colour in further.tolist() if tuple(colour) not in used]
    return np.concatenate([spread, np.array(new[: n - len(spread)], dtype=np.uint8)])


def overlay(
    image: Image.Image, labels: ArrayLike, classes: Sequence[str], alpha: float = 0.5, legend: bool = True
) -> Image.Image:
    """Lay the colours of the labels over the photograph.

    Args:
        image: the photograph.
        labels: (H, W) integers in 0..T-1, the size of `image`.
        classes: T names.
        alpha: opacity of the colours, 0..1.
        legend: add a legend beside or below: colour, name and share of the picture of each class that appears, the
            largest first. A picture smaller than 320 pixels is then enlarged.

    Returns:
        An RGB image, of the size of `image` without a legend.

    Raises:
        ValueError, TypeError: labels that do not fit `image` or `classes`, or `alpha` outside 0..1.
    """
    labels = check_labels(labels, len(classes))
    if labels.shape != (image.height, image.width):
        raise ValueError(
            f"labels must be of the image's size, {image.height} x {image.width} (H, W), got {labels.shape}."
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be an opacity in 0..1, got {alpha!r}.")
    shares = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
    factor = math.ceil(LEGEND_MIN_SIDE / max(image.size)) if legend else 1
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        labels = labels.repeat(factor, axis=0).repeat(factor, axis=1)

    colours = palette(int(labels.max()) + 1)
    picture = Image.blend(image.convert("RGB"), Image.fromarray(colours[labels]), alpha)
    lines = Image.fromarray(np.uint8(160) * _borders(labels, max(1, round(min(image.size) / 500))))
    picture.paste(PAPER, mask=lines)
    if not legend:
        return picture
    entries = [
        _Entry(tuple(colours[index].tolist()), " ".join(classes[index].split()), float(shares[index]))
        for index in np.argsort(-shares, kind="stable").tolist()
        if shares[index]
    ]
    return _add_legend(picture, entries)


def label_image(labels: ArrayLike, n: int) -> Image.Image:
    """The labels themselves as an image whose pixel values are the class indices.

    Args:
        labels: (H, W) integers in 0..n-1.
        n: number of classes, at most 65536.

    Returns:
        Up to 256 classes an image of PIL mode P with the colours of `palette`, above one of 16-bit grey levels (I;16).

    Raises:
        ValueError, TypeError: labels that do not fit `n`, or too many classes.
    """
    labels = check_labels(labels, n)
    if n > 65536:
        raise ValueError(f"a label image holds at most 65536 classes, got {n}; save as .npz instead.")
    if n > 256:
        return Image.fromarray(labels.astype(np.uint16))
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(palette(n).tobytes())
    return image


def cost_map(values: ArrayLike, low: float | None = None, high: float | None = None) -> Image.Image:
    """A map of numbers, such as the costs or the scores of one class, as colours from dark blue to light yellow.

    Args:
        values: (H, W) finite numbers.
        low, high: what the first and the last colour stand for; by default the least and the greatest value. Give the
            same to several maps to compare them.

    Returns:
        An RGB image, W pixels wide and H high. Values outside low..high get the colour of the nearer end.

    Raises:
        ValueError: `values` is not two-dimensional, empty or not finite, or `low` is above `high`.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"values must have shape (H, W) with no size zero, got {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError("values must be finite, got NaN or infinite ones.")
    low, high = float(array.min() if low is None else low), float(array.max() if high is None else high)
    if not low <= high:
        raise ValueError(f"low must not be above high, got {low} and {high}.")
    place = np.clip((array - low) / (high - low), 0, 1) if high > low else np.full(array.shape, 0.5)
    stops = np.linspace(0, 1, len(GRADIENT))
    channels = [np.interp(place, stops, [colour[i] for colour in GRADIENT]) for i in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


class Panel(NamedTuple):
    """A picture on a page.

    Attributes:
        image: scaled to the page's panel size. title, subtitle: two lines above it. note: a line below it.
        colour: of a small square before the title, or None.
    """

    image: Image.Image
    title: str = ""
    subtitle: str = ""
    note: str = ""
    colour: tuple[int, ...] | None = None


def panels(rows: Sequence[Sequence[Panel]], title: str = "", subtitle: str = "", side: int = 192) -> Image.Image:
    """Put pictures side by side on a page, all of one size, with what is written at them.

    Args:
        rows: at least one panel in all. Rows may differ in length; one without any title moves up to the row above.
        title, subtitle: two lines at the top of the page.
        side: longer side of a panel in pixels. The first image tells the aspect ratio.

    Returns:
        An RGB image. What is written is cut with an ellipsis where it is wider than its panel.

    Raises:
        ValueError: there is no panel, or `side` is under 32.
    """
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError("rows must hold at least one panel, got none.")
    if side < 32:
        raise ValueError(f"side must be at least 32 pixels, got {side}.")
    first = rows[0][0].image
    width, height = (max(1, round(side * length / max(first.size))) for length in first.size)
    size = max(11, round(side / 15))
    font, large = ImageFont.load_default(size), ImageFont.load_default(round(1.5 * size))
    line, gap, margin = round(1.6 * size), size, 2 * size
    columns = max(map(len, rows))
    page_width = 2 * margin + columns * (width + gap) - gap

    # Where each text and each row goes, from the top down; then the page is as high as that.
    header, y = [], margin
    for text, ink, its_font, room in ((title, INK, large, round(1.6 * line)), (subtitle, FAINT, font, line)):
        if text:
            header.append((y + room // 2, text, ink, its_font))
            y += room
    tops = []
    for index, row in enumerate(rows):
        lines = [any(panel.title for panel in row), any(panel.subtitle for panel in row)]
        y += 2 * gap if index and any(lines) else gap // 2
        tops.append((y, y + lines[0] * line, y + sum(lines) * line))  # of title, subtitle and image
        y = tops[-1][2] + height + any(panel.note for panel in row) * line

    page = Image.new("RGB", (page_width, y + margin), PAPER)
    draw = ImageDraw.Draw(page)
    for middle, text, ink, its_font in header:
        draw.text((margin, middle), _fit(text, its_font, page_width - 2 * margin), ink, its_font, anchor="lm")
    for row, (title_top, subtitle_top, image_top) in zip(rows, tops, strict=True):
        for place, panel in enumerate(row):
            left = margin + place * (width + gap)
            text_left, middle = left, title_top + line // 2
            if panel.colour:
                top = middle - size // 2
                draw.rectangle((left, top, left + size - 1, top + size - 1), panel.colour)
                text_left += round(1.5 * size)
            for text, x, y, ink in (
                (panel.title, text_left, middle, INK),
                (panel.subtitle, left, subtitle_top + line // 2, FAINT),
                (panel.note, left, image_top + height + line // 2, FAINT),
            ):
                if text:
                    draw.text((x, y), _fit(text, font, left + width - x), ink, font, anchor="lm")
            page.paste(_scale(panel.image, width, height), (left, image_top))
    return page


def key(entries: Sequence[tuple[tuple[int, ...], str]], width: int, height: int) -> Image.Image:
    """Colours with the names that they stand for, one a line, as a picture of that size in pixels.

    What does not fit is cut: a name with an ellipsis, further entries with their number.
    """
    size = max(11, round(max(width, height) / 15))
    font, line = ImageFont.load_default(size), round(1.45 * size)
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    rows = max(1, height // line)
    shown = list(entries) if len(entries) <= rows else list(entries)[: rows - 1]
    for place, (colour, name) in enumerate(shown):
        top = place * line
        draw.rectangle((0, top, size - 1, top + size - 1), colour)
        text = round(1.5 * size)
        draw.text((text, top + size // 2), _fit(" ".join(name.split()), font, width - text), INK, font, anchor="lm")
    if len(shown) < len(entries):
        more = f"+ {len(entries) - len(shown)} more"
        draw.text((round(1.5 * size), len(shown) * line + size // 2), more, FAINT, font, anchor="lm")
    return image


def check_labels(labels: ArrayLike, n: int) -> np.ndarray:
    """(H, W) int32 labels, checked to lie in 0..n-1.

    Raises:
        TypeError: no integers. ValueError: not two-dimensional, empty, or a label outside 0..n-1.
    """
    array = np.asarray(labels)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {array.dtype}.")
    if array.ndim != 2 or not array.size:
        raise ValueError(f"labels must have shape (H, W) with no size zero, got {array.shape}.")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= n:
        raise ValueError(f"labels must lie in 0..{n - 1} for {n} classes, got {low}..{high}.")
    return np.ascontiguousarray(array, dtype=np.int32)


class _Entry(NamedTuple):
    colour: tuple[int, ...] | None
    name: str
    share: float


def _add_legend(picture: Image.Image, entries: list[_Entry]) -> Image.Image:
    width, height = picture.size
    size = min(max(round(math.sqrt(width * height) / 40), 13), 120)
    font = ImageFont.load_default(size)
    line, swatch, gap = round(1.6 * size), round(1.1 * size), round(0.6 * size)
    share_width = math.ceil(font.getlength("100.0 %"))
    name_width = min(math.ceil(max(font.getlength(entry.name) for entry in entries)), 16 * size)
    name_width = max(name_width, math.ceil(font.getlength("+ 999 more")))
    column = swatch + gap + name_width + gap + share_width
    step = column + 2 * size

    beside = width <= 1.6 * height
    if beside:
        rows = (height - 2 * size) // line
        columns = min(math.ceil(len(entries) / rows), max(1, width // step))
        x, y = width + size, size
        canvas = (x + (columns - 1) * step + column + size, height)
    else:
        columns = max(1, (width - 2 * size + step - column) // step)
        rows = min(math.ceil(len(entries) / columns), max(8, height // line))
        x, y = size, height + size
        canvas = (width, y + rows * line + size)
    if len(entries) > rows * columns:
        kept = rows * columns - 1
        rest = entries[kept:]
        entries = [*entries[:kept], _Entry(None, f"+ {len(rest)} more", sum(entry.share for entry in rest))]

    page = Image.new("RGB", canvas, PAPER)
    page.paste(picture, (0, 0))
    draw = ImageDraw.Draw(page)
    for place, entry in enumerate(entries):
        left, middle = x + place // rows * step, y + place % rows * line + line // 2
        if entry.colour:
            top = middle - swatch // 2
            draw.rectangle((left, top, left + swatch - 1, top + swatch - 1), entry.colour)
        text = left + swatch + gap
        draw.text((text, middle), _fit(entry.name, font, name_width), INK, font, anchor="lm")
        draw.text((left + column, middle), _percent(entry.share), INK, font, anchor="rm")
    return page


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, cut with an ellipsis where it is wider."""
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)  # the cut of length low fits, that of length high does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = font.getlength(text[:middle].rstrip() + "…") <= width
        low, high = (middle, high) if fits else (low, middle)
    return text[:low].rstrip() + "…"


def _scale(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image.convert("RGB")
    # Whole steps keep pixels and borders sharp; anything else would make them uneven.
    sharp = width % image.width == 0 and height % image.height == 0
    return image.convert("RGB").resize((width, height), Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS)


def _percent(share: float) -> str:
    return "< 0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"


def _borders(labels: np.ndarray, width: int) -> np.ndarray:
    """(H, W) bool: pixels within `width` to the right of or below a pixel of another class."""
    found = np.zeros(labels.shape, dtype=bool)
    for offset in range(1, width + 1):
        found[:, offset:] |= labels[:, offset:] != labels[:, :-offset]
        found[offset:] |= labels[offset:] != labels[:-offset]
    return found


@lru_cache(maxsize=1)
def _spread_colours() -> np.ndarray:
    """(SPREAD, 3) uint8 colours, each as far as can be from those before it in OKLab, where equal distances look equal.

    None is nearly black, white or grey: they have to stand out from a photograph.
    """
    levels = np.linspace(0, 255, 24).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(candidates)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    keep = (lab[:, 0] > 0.4) & (lab[:, 0] < 0.93) & (chroma > 0.07)
    candidates, lab, chroma = candidates[keep], lab[keep], chroma[keep]
    calm = (lab[:, 0] > 0.52) & (lab[:, 0] < 0.88) & (chroma > 0.1) & (chroma < 0.23)

    chosen = [int(np.argmin(np.abs(candidates - (230, 60, 60)).sum(1)))]
    nearest = np.full(len(lab), np.inf)
    while len(chosen) < SPREAD:
        nearest = np.minimum(nearest, ((lab - lab[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(np.where(calm | (len(chosen) >= CALM), nearest, 0).argmax()))
    return candidates[chosen].astype(np.uint8)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB 0..255, (n, 3), to OKLab (Ottosson, "A perceptual color space for image processing", 2020)."""
    part = rgb / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [[0.4122214708, 0.2119034982, 0.0883024619], [0.5363325363, 0.6806995451, 0.2817188376],
         [0.0514459929, 0.1073969566, 0.6299787005]]
    )  # fmt: skip
    return np.cbrt(cones) @ np.array(
        [[0.2104542553, 1.9779984951, 0.0259040371], [0.7936177850, -2.4285922050, 0.7827717662],
         [-0.0040720468, 0.4505937099, -0.8086757660]]
    )  # fmt: skip
