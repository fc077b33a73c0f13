"""How a method's upstream format follows from its rules, and whose checkpoint a file looks like.

A rule renames a parameter. In its left side `#` is a number, `*` is anything and `(a|b)` a choice; on its right side
`{0}`, `{1}`, ... are what these matched, `{next0}` is the number in `{0}` plus one. The first rule that matches a name
counts. Where more than the name differs:

- several of our tensors with one upstream name (q, k and v projections of Cascade-CLIP) are joined along dimension 0,
  in the model's order;
- `{row}` on the right side makes one upstream tensor of each row of ours (Cascade-CLIP's per-layer norms);
- `leading_ones` dimensions of size 1 stand before our shape (padding class, prompts).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..models import PRESETS, Rule


class Stored(NamedTuple):
    """How a checkpoint stores a tensor: `parts` are our tensors, or single rows of them, joined along dimension 0."""

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int | None], ...]


def own_format(shapes: Mapping[str, Sequence[int]]) -> dict[str, Stored]:
    """The format in which every tensor of a model is stored as it is."""
    return {name: Stored(tuple(shape), ((name, None),)) for name, shape in shapes.items()}


def upstream_format(rules: Iterable[Rule], shapes: Mapping[str, Sequence[int]]) -> dict[str, Stored]:
    """Upstream's format of a model.

    Args:
        rules: of the method. shapes: our names and shapes, in the order of the state dict.

    Raises:
        ValueError: no rule matches one of the names.
    """
    patterns = [(_pattern(rule.ours), rule) for rule in rules]
    stored: dict[str, Stored] = {}
    for name, shape in shapes.items():
        matches = ((pattern.fullmatch(name), rule) for pattern, rule in patterns)
        match, rule = next((found for found in matches if found[0]), (None, None))
        if match is None or rule is None:
            raise ValueError(f"the upstream format has no place for '{name}'.")
        groups = match.groups()
        following = {f"next{place}": int(group) + 1 for place, group in enumerate(groups) if group.isdigit()}
        by_row = "{row}" in rule.upstream
        for row in range(shape[0]) if by_row else (None,):
            upstream = rule.upstream.format(*groups, row=row, **following)
            size = (*[1] * rule.leading_ones, *(shape[1:] if by_row else shape))
            parts: tuple[tuple[str, int | None], ...] = ((name, row),)
            if upstream in stored:
                before = stored[upstream]
                size = (before.shape[0] + size[0], *size[1:])
                parts = (*before.parts, *parts)
            stored[upstream] = Stored(size, parts)
    return stored


def matches_any(patterns: Iterable[str], key: str) -> bool:
    """Whether a key fits one of the patterns, written as the left side of a rule."""
    return any(_pattern(pattern).fullmatch(key) for pattern in patterns)


def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace(".", r"\.").replace("#", "([0-9]+)").replace("*", "(.+)"))


class Look(NamedTuple):
    """What a checkpoint looks like, and what to do with it."""

    name: str
    advice: str


CLIPS = {  # names that only such a file has
    "OpenAI's CLIP": ("visual.conv1.weight", "token_embedding.weight"),
    "Hugging Face's CLIP": ("vision_model.embeddings.class_embedding",),
}


def recognise(shapes: Mapping[str, Sequence[int]]) -> Look | None:
    """What a checkpoint with these keys and shapes looks like, or None."""
    general = None
    for preset in PRESETS.values():
        mark, rules = preset.model.mark, preset.model.upstream_rules
        if mark is None:
            continue
        if rules:
            ((key, stored),) = upstream_format(rules, {mark: preset.mark_shape or ()}).items()
            if preset.mark_shape is not None and tuple(shapes.get(key, ())) == stored.shape:
                return Look(preset.name, "load it with that model")
            if key in shapes:
                general = Look(preset.model.method, "load it into a model of the same configuration")
        if mark in shapes:
            advice = "ovseg_fast.checkpoints.load reads it, into the model that it was saved from"
            general = Look(f"{preset.model.method} in ovseg-fast's own format", advice)
    if general is not None:
        return general
    advice = "it holds no segmentation head, get a checkpoint of the whole model"
    return next((Look(name, advice) for name, keys in CLIPS.items() if all(key in shapes for key in keys)), None)
