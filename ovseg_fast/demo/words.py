"""Typed words in terms of the procedural world: the classes that a name means, the scene that a sentence describes."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from ..data.vocabularies import WORLD
from ..data.world.classes import CLASS_WORDS, FIRST_GROUND, GROUNDS, OBJECTS, ON, SYNONYMS
from ..vocabulary import check_classes, prompt_name

_ARTICLES = frozenset(("a", "an", "the"))
# Word by word, because the order is free: "bricks" is {"brick", "wall"}.
_MEANS = {synonym: frozenset(word.split()) for word, synonyms in SYNONYMS.items() for synonym in synonyms}
_CLASS_WORDS = tuple(frozenset(name.split()) for name in WORLD.classes)


def matching(name: str) -> tuple[int, ...]:
    """Indices of the classes that have all words of a name; none if one of its words is unknown.

    Synonyms, articles, case and order do not matter: "a Spotted violet plus" is the class "purple dotted cross". Fewer
    words mean every class that fits: "water" is water of any colour.
    """
    words = set(re.findall(r"\w+", prompt_name(name).casefold())) - _ARTICLES
    known = frozenset().union(*(_MEANS.get(word, {word}) for word in words))
    return tuple(index for index, each in enumerate(_CLASS_WORDS) if known <= each) if known else ()


def meanings(names: Sequence[str]) -> list[tuple[int, ...]]:
    """The classes that each name means, see `matching`; empty for a name that is not of this world.

    Raises:
        ValueError: two names mean the same.
    """
    meant = [matching(name) for name in names]
    first: dict[tuple[int, ...], str] = {}
    for name, classes in zip(names, meant, strict=True):
        if classes and classes in first:
            raise ValueError(f"'{first[classes]}' and '{name}' mean the same thing; leave one of them out.")
        first[classes] = name
    return meant


def truth(labels: NDArray[np.int32], meant: Sequence[Collection[int]]) -> NDArray[np.int32]:
    """The right name for every pixel: the most specific one that means its class, of equals the first.

    Args:
        labels: (H, W) class indices of a scene. meant: the classes that each name means, see `meanings`.

    Returns:
        (H, W) int32 indices into the names; −1 where no name means the class.
    """
    table = np.full(len(WORLD.classes), -1, np.int32)
    for index in sorted(range(len(meant)), key=lambda index: (len(meant[index]), index), reverse=True):
        table[list(meant[index])] = index
    return table[labels]


def distractors(labels: Sequence[int], count: int, rng: np.random.Generator, known: Collection[int] = ()) -> list[int]:
    """Up to `count` classes outside `labels` and `known`, each one word away from one of `labels`, which take turns."""
    found: list[int] = []
    for turn in range(count):
        label = labels[turn % len(labels)]
        near = [
            index
            for index, other in enumerate(CLASS_WORDS)
            if index not in (*labels, *known, *found)
            and (index < FIRST_GROUND) == (label < FIRST_GROUND)
            and sum(a != b for a, b in zip(other, CLASS_WORDS[label], strict=False)) == 1
        ]
        if near:
            found.append(near[int(rng.integers(len(near)))])
    return found


def understand_scene(text: str, rng: np.random.Generator) -> tuple[list[str], list[int]]:
    """The classes that "a violet spotted plus and a red star on water" describes.

    Things are separated by commas or "and"; the ground follows "on", "over" or "in front of", or is one of the things.
    Missing words, such as the water's colour, and a missing ground are chosen: combinations that are never trained on,
    and a ground of another colour than the objects.

    Returns:
        the names as written, without articles; the class index of each, then that of a chosen ground.

    Raises:
        ValueError: a thing is not a class of the world or occurs twice, there are two grounds, or no object.
    """
    separator = r",|;|\band\b|" + "|".join(rf"\b{word}\b" for word in ON)
    things = (thing.strip(" .\t\n") for thing in re.split(separator, text, flags=re.I))
    names = check_classes([re.sub(r"^(an?|the)\s+", "", thing, flags=re.I) for thing in things if thing])
    meant = meanings(names)
    for name, classes in zip(names, meant, strict=True):
        if not classes:
            raise ValueError(
                f"'{name}' is nothing of this world: expected colour, pattern and shape as in '{WORLD.classes[7]}', or "
                f"colour and material as in '{WORLD.classes[FIRST_GROUND]}'."
            )
    grounds = [name for name, classes in zip(names, meant, strict=True) if classes[0] >= FIRST_GROUND]
    if len(grounds) > 1:
        raise ValueError(f"a scene has one ground, got '{grounds[0]}' and '{grounds[1]}'.")
    if len(grounds) == len(names):
        raise ValueError(f"a scene must show at least one object, got only the ground '{grounds[0]}'.")

    chosen: dict[str, int] = {}
    for name, classes in sorted(zip(names, meant, strict=True), key=lambda pair: len(pair[1])):
        objects = [label for label in classes if label < FIRST_GROUND and label not in chosen.values()]
        if name not in grounds:
            if not objects:
                raise ValueError(f"'{name}' and the other names mean the same things; leave one of them out.")
            chosen[name] = _choose(objects, rng)
    colours = {OBJECTS[label][0] for label in chosen.values()}
    allowed = meant[names.index(grounds[0])] if grounds else range(FIRST_GROUND, len(WORLD.classes))
    other = [label for label in allowed if GROUNDS[label - FIRST_GROUND][0] not in colours]
    ground = _choose(other or allowed, rng)
    labels = [chosen.get(name, ground) for name in names]
    return names, labels if grounds else [*labels, ground]


def _choose(labels: Sequence[int], rng: np.random.Generator) -> int:
    options = [label for label in labels if label in WORLD.unseen] or labels
    return options[int(rng.integers(len(options)))]
