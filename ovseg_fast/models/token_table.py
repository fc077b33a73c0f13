"""Token tables in which most rows are the same, stored without the repetition.

The tiny models know a few of CLIP's 49,408 tokens; all others share one row. Stored whole, the table would be ten times
the size of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CLIP_TOKENS = 49408  # of CLIP's tokenizer
NAME = "token_embedding."
TABLE, ROWS, IDS = NAME + "weight", NAME + "known_rows", NAME + "known_ids"


def expand_embedding(ids: Tensor, rows: Tensor) -> Tensor:
    """(K,) token ids and (1 + K, D) rows, the first for all other tokens -> the whole table (49408, D)."""
    table = rows[0].repeat(CLIP_TOKENS, 1)
    table[ids.long()] = rows[1:]
    return table


def compact_embedding(table: Tensor) -> tuple[Tensor, Tensor]:
    """The reverse of `expand_embedding`, exactly: (49408, D) -> ids (K,) and rows (1 + K, D)."""
    values, counts = table.unique(dim=0, return_counts=True)
    rest = values[counts.argmax()]
    ids = (table != rest).any(1).nonzero()[:, 0]
    return ids, torch.cat([rest[None], table[ids]])


def compact(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with a compact form of token tables in which most rows are the same."""
    compacted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        # The first row, of "!", is that of all tokens that a tiny model does not know.
        if name.endswith(TABLE) and len(tensor) == CLIP_TOKENS and (tensor == tensor[0]).all(1).float().mean() > 0.5:
            stem = name.removesuffix(TABLE)
            ids, rows = compact_embedding(tensor)
            compacted |= {stem + IDS: ids.int(), stem + ROWS: rows}
        else:
            compacted[name] = tensor
    return compacted


def expand(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `compact`.

    Raises:
        ValueError: a compact table is damaged.
    """
    expanded = dict(state)
    for name in state:
        if not name.endswith(IDS):
            continue
        stem = name.removesuffix(IDS)
        ids, rows = expanded.pop(name), expanded.pop(stem + ROWS, None)
        if rows is None or rows.dim() != 2 or tuple(rows.shape[:1]) != (len(ids) + 1,) or not _are_tokens(ids):
            raise ValueError(f"'{name}' must hold the ids of tokens, and '{stem + ROWS}' a row for each and one more.")
        expanded[stem + TABLE] = expand_embedding(ids, rows)
    return expanded


def _are_tokens(ids: Tensor) -> bool:
    whole = ids.dim() == 1 and not ids.is_floating_point() and ids.dtype != torch.bool
    return whole and bool(((ids >= 0) & (ids < CLIP_TOKENS)).all())
