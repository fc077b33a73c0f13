"""Embeddings of prompts, computed once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..vocabulary import tokenize
from .base import SegmentationModel
from .clip import TEXT_BATCH
from .steady import autocast_dtype, digest, in_evaluation, parameters, refuse_overflow, undisturbed, versions

MOST = 50_000  # embeddings kept: 100 MB at 512 channels


class PromptCache:
    """Remembers the embedding of every prompt until the text encoder's weights change, in whatever way.

    Threads may share one. Embeddings made under autocast are kept apart, by its dtype.
    """

    def __init__(self) -> None:
        self.embeddings: dict[tuple[str, torch.dtype | None], Tensor] = {}
        self._weights: tuple[Any, ...] = ()
        self._lock = threading.RLock()

    def embed(
        self,
        model: SegmentationModel,
        prompts: Collection[str],
        batches: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
    ) -> dict[str, Tensor]:
        """Unit-length embeddings (E,) of different prompts, in the model's dtype; `batches` may show progress.

        Raises:
            ValueError: a prompt is too long. FloatingPointError: the text encoder gives NaN or infinite numbers.
        """
        device, dtype = model.pixel_mean.device, model.pixel_mean.dtype
        cast = autocast_dtype(device)
        with self._lock, undisturbed():
            tensors = parameters(model.text_encoder)
            weights = versions(tensors), digest(tensors)
            if weights != self._weights or len(self.embeddings) > MOST:
                self.embeddings.clear()
                self._weights = weights
            # From here on only `found` counts: whoever empties the cache meanwhile does no harm.
            known = {prompt: self.embeddings.get((prompt, cast)) for prompt in prompts}
            found = {prompt: embedding for prompt, embedding in known.items() if embedding is not None}
            missing = [prompt for prompt in prompts if prompt not in found]
            if missing:
                tokens = tokenize([[prompt] for prompt in missing]).to(device)
                encode = in_evaluation(model).encode_text
                embedded = torch.cat([encode(part)[:, 0] for part in batches(tokens.split(TEXT_BATCH))]).to(dtype)
                if not embedded.isfinite().all():
                    refuse_overflow(model, "text embeddings", cast or dtype)
                found.update(zip(missing, embedded, strict=True))
                self.embeddings.update({(prompt, cast): found[prompt] for prompt in missing})
        return found
