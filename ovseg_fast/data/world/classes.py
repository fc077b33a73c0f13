"""The words of the procedural world and its captions, the classes that they combine into, and the unseen ones."""

from __future__ import annotations

from itertools import chain, product

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (245, 135, 20),
    "yellow": (240, 225, 50),
    "green": (40, 165, 60),
    "blue": (40, 80, 220),
    "purple": (145, 50, 185),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle", "star", "cross")
GROUND_COLOURS: dict[str, tuple[int, int, int]] = {  # muted, so that objects stand out
    "grey": (135, 135, 135),
    "brown": (125, 88, 58),
    "green": (92, 132, 84),
    "blue": (95, 122, 160),
}
MATERIALS = ("grass", "sand", "brick wall", "wooden floor", "water")

SYNONYMS: dict[str, tuple[str, ...]] = {
    "red": ("crimson", "scarlet"),
    "orange": ("tangerine",),
    "yellow": ("golden",),
    "green": ("emerald",),
    "blue": ("azure",),
    "purple": ("violet",),
    "grey": ("gray",),
    "plain": ("solid", "flat"),
    "striped": ("stripy", "banded"),
    "dotted": ("spotted", "speckled"),
    "checkered": ("chequered", "checked"),
    "circle": ("disc", "disk"),
    "square": ("box",),
    "triangle": ("wedge",),
    "cross": ("plus",),
    "grass": ("lawn", "meadow"),
    "brick wall": ("bricks", "brickwork"),
    "wooden floor": ("wood", "planks"),
    "water": ("waves",),
}
PREFIXES = ("", "", "", "a photo of ", "a picture of ", "there is ", "this is ", "an image of ")
SUFFIXES = ("", "", "", " in the scene", ".")
ON = ("on", "over", "in front of")
ARTICLES = ("a", "an")
CAPTION_PARTS = (  # everything that captions are made of
    *(*COLOURS, *GROUND_COLOURS, *PATTERNS, *SHAPES, *MATERIALS, *chain(*SYNONYMS.values())),
    *(*ARTICLES, *PREFIXES, *SUFFIXES, *ON, "and", "a, a"),
)

OBJECTS = tuple(product(COLOURS, PATTERNS, SHAPES))
GROUNDS = tuple(product(GROUND_COLOURS, MATERIALS))
FIRST_GROUND = len(OBJECTS)  # class indices: objects first, then grounds
CLASS_WORDS = (*OBJECTS, *GROUNDS)
NAMES = tuple(" ".join(words) for words in CLASS_WORDS)

# As in a Latin square: one combination in four, spread evenly over every word and every pair of words.
_PLACES = [
    places
    for lists in ((COLOURS, PATTERNS, SHAPES), (GROUND_COLOURS, MATERIALS))
    for places in product(*(range(len(words)) for words in lists))
]
UNSEEN = tuple(index for index, places in enumerate(_PLACES) if sum(places) % 4 == 0)
