"""Several prompts for one evaluated class.

So the background of PASCAL VOC is measured (PAS-20b; CAT-Seg, Cho et al., CVPR 2024): no prompt describes "everything
else", hence a pixel counts as background when it is given to any of a list of further names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def prompts_of(
    classes: Sequence[str], groups: Mapping[str, Sequence[str]] | None = None
) -> tuple[list[str], np.ndarray]:
    """The names to prompt with, and which class each counts as.

    Args:
        classes: the C evaluated classes. groups: class -> the names that stand for it; a class that is not among them
            is prompted by its own name.

    Returns:
        (names, index): T names, and (T,) int64 indices into `classes`.

    Raises:
        ValueError: a group is of no class or empty, or two classes share a name.
    """
    groups = groups or {}
    for name, members in groups.items():
        if name not in classes:
            raise ValueError(f"groups must be keyed by evaluated classes, got {name!r}, which is none of them.")
        if isinstance(members, str) or not members:
            raise ValueError(f"groups[{name!r}] must be a list of at least one name, got {members!r}.")
    names: list[str] = []
    index: list[int] = []
    for position, name in enumerate(classes):
        members = groups.get(name, (name,))
        names += members
        index += [position] * len(members)
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"each name must stand for one class, {repeated!r} comes more than once.")
    return names, np.array(index, dtype=np.int64)
