"""The small token table of a model that knows few words."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..data.world.classes import CAPTION_PARTS
from ..vocabulary import tokenize
from .crops import TEMPLATES


class KnownTokens:
    """The few CLIP tokens that the world's captions are made of; see `models.token_table`.

    Attributes: `ids` (K,) int64, ascending, so that the end token is still the largest; row i + 1 of the small table
    belongs to `ids[i]`, row 0 to all others, the unknown token.
    """

    def __init__(self) -> None:
        words = [*CAPTION_PARTS, *(template.replace("{}", "") for template in TEMPLATES)]
        tokens = tokenize([[word] for word in words]).unique()
        self.ids = tokens[tokens > 0]  # zeros follow the end token

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, tokens: Tensor) -> Tensor:
        """Token ids (...) -> rows of the small table (...)."""
        position = torch.searchsorted(self.ids, tokens).clamp(max=len(self.ids) - 1)
        return torch.where(self.ids[position] == tokens, position + 1, 0)

    def encode(self, captions: list[str]) -> Tensor:
        """B captions -> rows (B, 77)."""
        return self.rows(tokenize([[caption] for caption in captions])[:, 0])

    def forget(self, rows: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
        """Replace words by the unknown one; the start and end tokens, the last two rows, stay."""
        forgotten = torch.from_numpy(rng.random(rows.shape) < probability)
        return rows.masked_fill(forgotten & (rows < len(self) - 1), 0)
