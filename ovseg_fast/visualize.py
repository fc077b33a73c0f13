"""Pictures of label maps and of numbers: colours, overlays with a legend, cost maps, pages of panels."""

from __future__ import annotations

import math
import os
import unicodedata
from bisect import bisect
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from . import fonts
from .arguments import check_number, check_whole
from .fonts import Font

SPREAD = 1024  # colours that are chosen to be far apart; further ones are only different
CALM = 32  # colours that are neither dark nor glaring, so that a photograph shows through; they come first
LEGEND_MIN_SIDE = 320  # smaller pictures are enlarged when they get a legend
PAPER, INK, FAINT = (255, 255, 255), (35, 35, 40), (110, 110, 118)
# Cost maps from low to high: ever lighter, so that they read without telling colours apart.
GRADIENT = ((24, 18, 62), (52, 60, 140), (28, 118, 158), (52, 170, 132), (164, 214, 84), (255, 240, 130))


def palette(n: int) -> np.ndarray:
    """Colours of classes 0..n-1, (n, 3) uint8, all different; each is the same for every n. ValueError: n < 0."""
    check_whole("n", n, "colours")
    if n < 0:
        raise ValueError(f"n must be the number of colours, at least 0, got {n}.")
    spread = _spread_colours()
    if n <= len(spread):
        return spread[:n].copy()
    # An odd factor visits every 24-bit colour once, in scattered order.
    codes = np.arange(n, dtype=np.int64) * 0x9E3779B1 % 2**24
    codes = codes[~np.isin(codes, spread @ np.array([1 << 16, 1 << 8, 1]))][: n - len(spread)]
    return np.concatenate([spread, np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1).astype(np.uint8)])


def overlay(
    image: Image.Image,
    labels: ArrayLike,
    classes: Sequence[str],
    alpha: float = 0.5,
    legend: bool = True,
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """Lay the colours of the labels over the photograph; gives an RGB image, without a legend of the size of `image`.

    Args:
        image: the photograph. labels: (H, W) integers in 0..T-1, of its size. classes: T names.
        alpha: opacity of the colours, 0..1.
        legend: add a legend beside or below: colour, name and share of each class in the picture, largest first. A
            picture smaller than 320 pixels is then enlarged.
        font: a TrueType or OpenType file for the legend. Names with letters that it lacks are drawn in PIL's own font
            or one of the system that has them, otherwise as "class 3", their index, with one warning. Right-to-left
            and joining scripts need a Pillow with Raqm, as its wheels are; without it a warning says so.

    Raises:
        ValueError, TypeError: labels that do not fit `image` or `classes`, `alpha` outside 0..1, or no font.
    """
    labels = check_label_map(labels, len(classes), image)
    alpha = check_number("alpha", alpha, 0, 1, "an opacity")
    shares = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
    factor = math.ceil(LEGEND_MIN_SIDE / max(image.size)) if legend else 1
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        labels = labels.repeat(factor, axis=0).repeat(factor, axis=1)

    colours = palette(int(labels.max()) + 1)
    picture = Image.blend(image.convert("RGB"), Image.fromarray(colours[labels]), alpha)
    borders = _borders(labels, max(1, round(min(image.size) / 500)))
    picture.paste(PAPER, mask=Image.fromarray(np.uint8(160) * borders))
    if not legend:
        return picture
    largest = [index for index in np.argsort(-shares, kind="stable").tolist() if shares[index]]
    entries = [_Entry(tuple(colours[i].tolist()), _line(classes[i]), float(shares[i]), f"class {i}") for i in largest]
    return _add_legend(picture, entries, font)


def label_image(labels: ArrayLike, n: int) -> Image.Image:
    """An image whose pixel values are the class indices.

    Args:
        labels: (H, W) integers in 0..n-1. n: number of classes, at most 65536; up to 256 give an image of PIL mode P
            with the colours of `palette`, more 16-bit grey levels (I;16).

    Raises:
        ValueError, TypeError: labels that do not fit `n`, or too many classes.
    """
    labels = check_label_map(labels, n)
    if n > 65536:
        raise ValueError(f"a label image holds at most 65536 classes, got {n}; save as .npz instead.")
    image = Image.fromarray(labels.astype(np.uint8 if n <= 256 else np.uint16))
    if n <= 256:
        image.putpalette(palette(n).tobytes())
    return image


def cost_map(values: ArrayLike, low: float | None = None, high: float | None = None) -> Image.Image:
    """An RGB image (H, W) of numbers, such as the costs or scores of a class, in colours from dark blue to yellow.

    Args:
        values: (H, W) finite numbers.
        low, high: values of the first and the last colour, which those beyond also get; by default the least and the
            greatest.

    Raises:
        ValueError, TypeError: `values` is not two-dimensional, or empty; a number is not finite; or `low` is above
            `high`.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"values must have shape (H, W) with no size zero, got {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError("values must be finite, got NaN or infinite ones.")
    low = float(array.min()) if low is None else check_number("low", low)
    high = float(array.max()) if high is None else check_number("high", high)
    if not low <= high:
        raise ValueError(f"low must not be above high, got {low} and {high}.")
    place = np.clip((array - low) / (high - low), 0, 1) if high > low else np.full(array.shape, 0.5)
    stops = np.linspace(0, 1, len(GRADIENT))
    channels = [np.interp(place, stops, [colour[i] for colour in GRADIENT]) for i in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


class Panel(NamedTuple):
    """A picture on a page, with two lines above it, a note below it and a small square of `colour` at its title."""

    image: Image.Image
    title: str = ""
    subtitle: str = ""
    note: str = ""
    colour: tuple[int, ...] | None = None


def panels(
    rows: Sequence[Sequence[Panel]],
    title: str = "",
    subtitle: str = "",
    side: int = 192,
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """Captioned pictures of one size, side by side on a page.

    Args:
        rows: at least one panel in all. Rows may differ in length; one without titles moves up to the row above.
        title, subtitle: two lines at the top of the page. Text that is too wide is cut with an ellipsis.
        side: longer side of a panel in pixels. The first image sets the aspect ratio.
        font: see `overlay`; a text that no font has is written in escapes.

    Raises:
        ValueError: there is no panel, `side` is under 32, or no font.
    """
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError("rows must hold at least one panel, got none.")
    check_number("side", side, 32, what="a number of pixels")
    first = rows[0][0].image
    width, height = (max(1, round(side * length / max(first.size))) for length in first.size)
    size = max(11, round(side / 15))
    texts = [text for row in rows for panel in row for text in (panel.title, panel.subtitle, panel.note)]
    small, large = _Writer([*texts, subtitle], size, font), _Writer([title], round(1.5 * size), font)
    line, gap, margin = round(1.6 * size), size, 2 * size
    columns = max(map(len, rows))
    page_width = 2 * margin + columns * (width + gap) - gap

    # From the top down, where each text and each row goes; this gives the height of the page.
    header, y = [], margin
    for text, ink, writer, room in ((title, INK, large, round(1.6 * line)), (subtitle, FAINT, small, line)):
        if text:
            header.append((y + room // 2, text, ink, writer))
            y += room
    tops = []
    for index, row in enumerate(rows):
        lines = [any(panel.title for panel in row), any(panel.subtitle for panel in row)]
        y += 2 * gap if index and any(lines) else gap // 2
        tops.append((y, y + lines[0] * line, y + sum(lines) * line))  # of title, subtitle and image
        y = tops[-1][2] + height + any(panel.note for panel in row) * line

    page = Image.new("RGB", (page_width, y + margin), PAPER)
    draw = ImageDraw.Draw(page)
    for middle, text, ink, writer in header:
        writer.write(draw, margin, middle, text, page_width - 2 * margin, ink)
    for row, (title_top, subtitle_top, image_top) in zip(rows, tops, strict=True):
        for place, panel in enumerate(row):
            left = margin + place * (width + gap)
            indent = round(1.5 * size) if panel.colour else 0
            _swatch(draw, left, title_top + line // 2, size, panel.colour)
            small.write(draw, left + indent, title_top + line // 2, panel.title, width - indent)
            small.write(draw, left, subtitle_top + line // 2, panel.subtitle, width, FAINT)
            small.write(draw, left, image_top + height + line // 2, panel.note, width, FAINT)
            # Whole multiples keep pixels and borders sharp.
            sharp = width % panel.image.width == 0 and height % panel.image.height == 0
            method = Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS
            page.paste(panel.image.convert("RGB").resize((width, height), method), (left, image_top))
    return page


def key(
    entries: Sequence[tuple[tuple[int, ...], str]],
    width: int,
    height: int,
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """Colours and their names, one per line, as a picture of that size in pixels; what does not fit is counted.

    `font` is as for `panels`.
    """
    size = max(11, round(max(width, height) / 15))
    line, indent = round(1.45 * size), round(1.5 * size)
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    rows = max(1, height // line)
    shown = list(entries) if len(entries) <= rows else list(entries)[: rows - 1]
    writer = _Writer([name for _, name in shown], size, font)
    for place, (colour, name) in enumerate(shown):
        middle = place * line + size // 2
        _swatch(draw, 0, middle, size, colour)
        writer.write(draw, indent, middle, name, width - indent)
    if len(shown) < len(entries):
        more = f"+ {len(entries) - len(shown)} more"
        draw.text((indent, len(shown) * line + size // 2), more, FAINT, ImageFont.load_default(size), anchor="lm")
    return image


def check_label_map(labels: ArrayLike, n: int, image: Image.Image | None = None) -> np.ndarray:
    """(H, W) int32 labels, checked to lie in 0..n-1 and to be of the image's size.

    Raises:
        TypeError: not integers. ValueError: not two-dimensional, empty, of another size, or a label outside 0..n-1.
    """
    array = np.asarray(labels)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {array.dtype}.")
    if array.ndim != 2 or not array.size:
        raise ValueError(f"labels must have shape (H, W) with no size zero, got {array.shape}.")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= n:
        raise ValueError(f"labels must lie in 0..{n - 1} for {n} classes, got {low}..{high}.")
    if image is not None and array.shape != (image.height, image.width):
        size = f"{image.height} x {image.width} (H, W)"
        raise ValueError(f"labels must be of the image's size, {size}, got {array.shape}.")
    return np.ascontiguousarray(array, dtype=np.int32)


class _Entry(NamedTuple):
    colour: tuple[int, ...] | None
    name: str
    share: float
    instead: str  # of a name that no font has


def _add_legend(picture: Image.Image, entries: list[_Entry], font: str | os.PathLike[str] | None) -> Image.Image:
    width, height = picture.size
    size = min(max(round(math.sqrt(width * height) / 40), 13), 120)
    plain = ImageFont.load_default(size)
    writer = _Writer([entry.name for entry in entries], size, font, [entry.instead for entry in entries])
    line, swatch, gap = round(1.6 * size), round(1.1 * size), round(0.6 * size)
    share_width = math.ceil(plain.getlength("100.0 %"))
    name_width = min(math.ceil(max(writer.width(entry.name) for entry in entries)), 16 * size)
    name_width = max(name_width, math.ceil(plain.getlength("+ 999 more")))
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
        entries, rest = entries[: rows * columns - 1], entries[rows * columns - 1 :]
        entries.append(_Entry(None, f"+ {len(rest)} more", sum(entry.share for entry in rest), ""))

    page = Image.new("RGB", canvas, PAPER)
    page.paste(picture, (0, 0))
    draw = ImageDraw.Draw(page)
    for place, entry in enumerate(entries):
        left, middle = x + place // rows * step, y + place % rows * line + line // 2
        _swatch(draw, left, middle, swatch, entry.colour)
        writer.write(draw, left + swatch + gap, middle, entry.name, name_width)
        share = "< 0.1 %" if entry.share < 0.0005 else f"{100 * entry.share:.1f} %"
        draw.text((left + column, middle), share, INK, plain, anchor="rm")
    return page


def _swatch(draw: ImageDraw.ImageDraw, left: int, middle: int, size: int, colour: tuple[int, ...] | None) -> None:
    if colour:
        top = middle - size // 2
        draw.rectangle((left, top, left + size - 1, top + size - 1), colour)


class _Writer:
    """Writes texts in one size, each in a font that has its letters.

    Args:
        texts: those to be written; others are written in PIL's own font. size: in pixels. font: see `overlay`.
        instead: of each text, what is written if no font has it; by default the text in escapes.
    """

    def __init__(
        self,
        texts: Sequence[str],
        size: int,
        font: str | os.PathLike[str] | None = None,
        instead: Sequence[str] | None = None,
    ) -> None:
        self.plain = ImageFont.load_default(size)
        lines = [_line(text) for text in texts]
        others = [_escaped(line) for line in lines] if instead is None else instead
        found = fonts.choose(lines, size, font)
        self.chosen = {
            line: (other, self.plain) if one is None else (line, one)
            for line, other, one in zip(lines, others, found, strict=True)
        }

    def width(self, text: str) -> float:
        shown, font = self.chosen.get(_line(text), (text, self.plain))
        return font.getlength(shown)

    def write(
        self, draw: ImageDraw.ImageDraw, left: int, middle: int, text: str, width: float, ink: tuple[int, ...] = INK
    ) -> None:
        """The text, cut to that width; none if it is empty."""
        if text:
            shown, font = self.chosen.get(_line(text), (text, self.plain))
            draw.text((left, middle), _fit(shown, font, width), ink, font, anchor="lm")


def _line(text: str) -> str:
    """A text in one line, with accents in the form that most fonts have."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _escaped(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


def _fit(text: str, font: Font, width: float) -> str:
    """The text, cut with an ellipsis if it is wider."""
    if font.getlength(text) <= width:
        return text

    def cut(length: int) -> str:
        return text[:length].rstrip() + "…"

    return cut(bisect(range(1, len(text)), width, key=lambda length: font.getlength(cut(length))))


def _borders(labels: np.ndarray, width: int) -> np.ndarray:
    """(H, W) bool: pixels within `width` to the right of or below a pixel of another class."""
    found = np.zeros(labels.shape, dtype=bool)
    for offset in range(1, width + 1):
        found[:, offset:] |= labels[:, offset:] != labels[:, :-offset]
        found[offset:] |= labels[offset:] != labels[:-offset]
    return found


@lru_cache(maxsize=1)
def _spread_colours() -> np.ndarray:
    """(SPREAD, 3) uint8 colours, none nearly grey, each as far as possible in OKLab from those before it."""
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
