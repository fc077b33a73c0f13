"""The classes of the procedural world, combinations of words, and which of them are unseen."""

from __future__ import annotations

from itertools import product

from .drawing import COLOURS, GROUND_COLOURS, MATERIALS, PATTERNS, SHAPES

OBJECTS = tuple(product(COLOURS, PATTERNS, SHAPES))
GROUNDS = tuple(product(GROUND_COLOURS, MATERIALS))
FIRST_GROUND = len(OBJECTS)  # class indices: objects first, then grounds
NAMES = tuple(" ".join(words) for words in (*OBJECTS, *GROUNDS))


def _unseen() -> tuple[int, ...]:
    """As in a Latin square: one combination of four, spread evenly over every word and over every pair of words."""
    lists = [list(words) for words in (COLOURS, PATTERNS, SHAPES, GROUND_COLOURS, MATERIALS)]
    chosen = []
    for index, name in enumerate((*OBJECTS, *GROUNDS)):
        kinds = lists[:3] if index < FIRST_GROUND else lists[3:]
        if sum(words.index(word) for words, word in zip(kinds, name, strict=True)) % 4 == 0:
            chosen.append(index)
    return tuple(chosen)


UNSEEN = _unseen()
