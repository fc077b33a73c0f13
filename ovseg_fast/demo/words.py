"""What a person means: their own words for the classes of the procedural world, and for a scene of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from ..data.vocabularies import WORLD
from ..data.world.classes import CLASS_WORDS, FIRST_GROUND, GROUNDS, OBJECTS, SYNONYMS
from ..data.world.scenes import ON
from ..vocabulary import check_classes, prompt_name

_ARTICLES = frozenset(("a", "an", "the"))
# Word by word, so that "brick wall" may come in any order too: "bricks" is {"brick", "wall"}.
_MEANS = {synonym: frozenset(word.split()) for word, synonyms in SYNONYMS.items() for synonym in synonyms}
_CLASS_WORDS = tuple(frozenset(name.split()) for name in WORLD.classes)


def matching(name: str) -> tuple[int, ...]:
    """Indices of the classes that have all the words of a name.

    Synonyms, articles, upper case and the order of the words make no difference: "a Spotted violet plus" is the class
    "purple dotted cross". A name that leaves words out means every class that fits: "water" is water of any colour.
    One with a word that the world does not know means none.
    """
    words = set(re.findall(r"\w+", prompt_name(name).casefold())) - _ARTICLES
    known = frozenset().union(*(_MEANS.get(word, {word}) for word in words))
    return tuple(index for index, own in enumerate(_CLASS_WORDS) if known <= own) if known else ()


def meanings(names: Sequence[str]) -> list[tuple[int, ...]]:
    """The classes that each name means, see `matching`; empty for a name that is of another world.

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
    """The right name for every pixel: the most exact one that its class has.

    Args:
        labels: (H, W) class indices of a scene. meant: the classes that each of T names means, see `meanings`.

    Returns:
        (H, W) int32 indices into the names; −1 where no name means the class.
    """
    table = np.full(len(WORLD.classes), -1, np.int32)
    for label in range(len(table)):
        fitting = [index for index, classes in enumerate(meant) if label in classes]
        if fitting:
            table[label] = min(fitting, key=lambda index: len(meant[index]))
    return table[labels]


def distractors(labels: Sequence[int], count: int, rng: np.random.Generator, known: Collection[int] = ()) -> list[int]:
    """Up to `count` classes, neither among `labels` nor `known`, each of which differs in a single word from one of
    `labels`; these take turns."""
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
    """What "a violet spotted plus and a red star on water" asks for.

    Things are separated by commas or "and"; the ground comes after "on", "over" or "in front of", or among the things.
    Where words are left out, as the pattern of the star and the colour of the water, combinations that are never
    trained on are preferred, and a ground of another colour than the objects. Without a ground any is taken.

    Returns:
        the names as they are written, without articles; the class index of each, and perhaps of a ground after them.

    Raises:
        ValueError: a thing is no class of the world or comes twice, there are two grounds, or no object.
    """
    separator = r",|;|\band\b|" + "|".join(rf"\b{word}\b" for word in ON)
    things = (
        re.sub(r"^(an?|the)\s+", "", thing.strip(" ."), flags=re.I) for thing in re.split(separator, text, flags=re.I)
    )
    names = check_classes([thing for thing in things if thing])
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
    ground = _choose(other or list(allowed), rng)
    labels = [chosen.get(name, ground) for name in names]
    return names, labels if grounds else [*labels, ground]


def _choose(labels: Sequence[int], rng: np.random.Generator) -> int:
    unseen = [label for label in labels if label in WORLD.unseen]
    options = unseen or list(labels)
    return options[int(rng.integers(len(options)))]
