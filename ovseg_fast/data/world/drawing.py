"""How the procedural world looks: patterns, shapes and materials, drawn from signed distances.

A pixel's coverage is its distance to the edge, clipped to half a pixel on both sides. Lengths are in pixels; `unit` is
one pixel of a 96 × 96 image, so that a larger image shows the same scene, larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .classes import COLOURS, GROUND_COLOURS

Field = NDArray[np.floating[Any]]
Random = np.random.Generator
Plane = Callable[[Field, Field, float], Field]

# ---- shapes: coordinates (u, v) from the centre, circumscribed radius r -> signed distance, negative inside ----


def _star(u: Field, v: Field, r: float) -> Field:
    fifth = 2 * np.pi / 5
    angle = np.abs((np.arctan2(v, u) + fifth / 2) % fifth - fifth / 2)
    radius = np.hypot(u, v)
    inner = 0.5 * r
    edge = np.array([inner * np.cos(fifth / 2) - r, inner * np.sin(fifth / 2)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (radius * np.cos(angle) - r) * normal[0] + radius * np.sin(angle) * normal[1]


def _cross(u: Field, v: Field, r: float) -> Field:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - 0.92 * r, np.minimum(u, v) - 0.34 * r)


SHAPE_DISTANCES: dict[str, Plane] = {
    "circle": lambda u, v, r: np.hypot(u, v) - 0.9 * r,
    "square": lambda u, v, r: np.maximum(np.abs(u), np.abs(v)) - 0.74 * r,
    "triangle": lambda u, v, r: np.maximum(0.5 * v + 0.8660254 * np.abs(u), -v) - 0.5 * r,
    "star": _star,
    "cross": _cross,
}

# ---- patterns: coordinates from the centre and a period -> share of the second tone, 0..1 ----

PATTERN_TONES: dict[str, Plane] = {
    "plain": lambda u, v, period: np.zeros_like(u),
    "striped": lambda u, v, period: _edge(np.cos(u * (2 * np.pi / period)) * (period / (2 * np.pi))),
    "dotted": lambda u, v, period: _edge(0.3 * period - np.hypot(u % period - period / 2, v % period - period / 2)),
    "checkered": lambda u, v, period: _edge(
        np.sin(u * (2 * np.pi / period)) * np.sin(v * (2 * np.pi / period)) * (period / (2 * np.pi))
    ),
}
PERIODS = {"plain": 1.0, "striped": 9.0, "dotted": 10.0, "checkered": 13.0}

# ---- materials: pixel coordinates and random numbers -> brightness around 1 ----


def _bricks(x: Field, y: Field, unit: float, rng: Random) -> Field:
    """Courses of bricks, every second one shifted by half a brick, with light mortar."""
    height, width = 8 * unit, 16 * unit
    course = np.floor(y / height)
    along = x + (course % 2) * (width / 2)
    shade = rng.uniform(-0.1, 0.1, (32, 32)).astype(np.float32)
    brick = shade[course.astype(np.int32) % 32, np.floor(along / width).astype(np.int32) % 32]
    joint = np.minimum(_to_line(y, height), _to_line(along, width))
    return 0.9 + brick + 0.4 * _edge(0.8 * unit - joint)


def _water(x: Field, y: Field, unit: float, rng: Random) -> Field:
    """Smooth horizontal waves."""
    bend = 2.2 * unit * np.sin(x / (rng.uniform(4, 6) * unit))
    return 1 + 0.26 * np.sin((y + bend) * (2 * np.pi / (9 * unit)))


MATERIAL_BRIGHTNESS: dict[str, Callable[[Field, Field, float, Random], Field]] = {
    # Short upright blades; grains and faint dunes; bricks; planks with dark gaps and a grain along them.
    "grass": lambda x, y, unit, rng: 1 + 0.2 * _noise(x.shape, (5 * unit, 1.3 * unit), rng),
    "sand": lambda x, y, unit, rng: (
        1 + 0.12 * _noise(x.shape, (unit, unit), rng) + 0.05 * np.sin((x + 2 * y) / (9 * unit))
    ),
    "brick wall": _bricks,
    "wooden floor": lambda x, y, unit, rng: (
        1 + 0.12 * _noise(x.shape, (1.2 * unit, 14 * unit), rng) - 0.5 * _edge(0.8 * unit - _to_line(y, 13 * unit))
    ),
    "water": _water,
}


def draw_ground(size: int, colour: str, material: str, unit: float, jitter: float, rng: Random) -> Field:
    """An image (size, size, 3) in 0..255 of one ground."""
    y, x = np.ogrid[:size, :size]
    shift = rng.uniform(0, 100, 2) * unit
    x, y = np.broadcast_arrays((x + shift[0]).astype(np.float32), (y + shift[1]).astype(np.float32))
    tone = _tone(GROUND_COLOURS[colour], jitter / 2, rng)
    brightness = MATERIAL_BRIGHTNESS[material](x, y, unit * rng.uniform(0.85, 1.15), rng)
    return brightness.astype(np.float32)[..., None] * tone


def draw_object(
    canvas: Field, centre: Sequence[float], radius: float, words: Sequence[str], unit: float, jitter: float, rng: Random
) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """Draw an object with these words (colour, pattern, shape) and circumscribed circle into an image (H, W, 3).

    Returns:
        The window (h, w) of the image that the object can reach, and the pixels in it that it covers by more than half.
    """
    colour, pattern, shape = words
    height, width = canvas.shape[:2]
    (left, top), (right, bottom) = (
        [max(0, int(c - radius) - 1) for c in centre],
        [min(side, int(c + radius) + 3) for c, side in zip(centre, (width, height), strict=True)],
    )
    window = (slice(top, bottom), slice(left, right))
    y, x = np.ogrid[top:bottom, left:right]
    x, y = (x - centre[0]).astype(np.float32), (y - centre[1]).astype(np.float32)
    u, v = _turn(x, y, rng.uniform(0, 2 * np.pi))
    cover = _edge(-SHAPE_DISTANCES[shape](u, v, radius))
    # The pattern has its own angle: a striped square is one whichever way the stripes run.
    u, v = _turn(x, y, rng.uniform(0, 2 * np.pi))
    period = PERIODS[pattern] * unit * rng.uniform(0.85, 1.15)
    offset = rng.uniform(0, period, 2).astype(np.float32)
    second = PATTERN_TONES[pattern](u + offset[0], v + offset[1], period)[..., None]
    first_tone = _tone(COLOURS[colour], jitter, rng)
    # The second tone is nearly white or black; on a light colour only the dark one stands out.
    dark = rng.random() < 0.5 or float(first_tone.mean()) > 150
    second_tone = 0.25 * first_tone + 0.75 * (25 if dark else 235)
    drawn = first_tone + second * (second_tone - first_tone)
    canvas[window] += cover[..., None] * (drawn - canvas[window])
    return window, cover > 0.5


def light(canvas: Field, lighting: float, noise: float, rng: Random, grain: Random) -> NDArray[np.uint8]:
    """The image (H, W, 3) in 0..255 under light that falls off to one side, with camera noise."""
    height, width = canvas.shape[:2]
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, lighting)
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    slope = (1 + strength * (np.cos(angle) * x + np.sin(angle) * y)).astype(np.float32)
    lit = canvas * slope[..., None]
    lit += rng.uniform(0, noise) * grain.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(lit + 0.5, 0, 255).astype(np.uint8)


def _tone(colour: tuple[int, int, int], jitter: float, rng: Random) -> Field:
    return (np.asarray(colour) + rng.uniform(-jitter, jitter, 3)).astype(np.float32)


def _turn(x: Field, y: Field, angle: float) -> tuple[Field, Field]:
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def _edge(inside: Field) -> Field:
    """Coverage of a pixel from its signed distance to an edge, positive inside."""
    return np.clip(inside + 0.5, 0, 1)


def _to_line(position: Field, spacing: float) -> Field:
    """Distance to the nearest of evenly spaced lines."""
    return np.abs((position + spacing / 2) % spacing - spacing / 2)


def _noise(shape: tuple[int, ...], grain: tuple[float, float], rng: Random) -> Field:
    """White noise of unit variance with grains of (height, width) pixels, at a random offset."""
    rows, columns = (
        ((np.arange(side) + rng.uniform(0, size)) / max(size, 1)).astype(np.int32)
        for side, size in zip(shape, grain, strict=True)
    )
    coarse = rng.standard_normal((rows[-1] + 1, columns[-1] + 1), dtype=np.float32)
    return coarse[rows[:, None], columns[None]]
