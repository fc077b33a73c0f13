"""Progress of an evaluation on disk, so that it can be resumed after it was stopped or killed."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..files import write_whole
from ..models import SegmentationModel


class StateError(ValueError):
    """A stored state cannot be resumed; the message is one sentence that says how to start over."""


@dataclass
class State:
    """The confusion matrix so far, (C, C) int64, of the images `done`, (N,) bool, which took `seconds`. Only a state
    with the same fingerprint, see `fingerprint_of`, is resumed."""

    fingerprint: dict[str, str]
    matrix: np.ndarray
    done: np.ndarray
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write it to an .npz file, whole or not at all. Raises OSError."""
        about = np.array(json.dumps({"fingerprint": self.fingerprint, "seconds": self.seconds}))
        write_whole(path, lambda file: np.savez_compressed(file, about=about, matrix=self.matrix, done=self.done))

    @classmethod
    def load(cls, path: Path, fingerprint: dict[str, str]) -> State | None:
        """The state in a file, or None if it does not exist or holds no image. Raises StateError if it is damaged or
        has another fingerprint."""
        if not path.exists():
            return None
        cure = "start over with restart=True (--restart), which discards it."
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                state = cls(dict(about["fingerprint"]), file["matrix"], file["done"], float(about["seconds"]))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise StateError(f"'{path}' is not the state of an evaluation, or is damaged; {cure}") from error
        if not state.done.any():
            return None
        keys = fingerprint | state.fingerprint
        other = [key for key in keys if state.fingerprint.get(key) != fingerprint.get(key)]
        if other:
            cure = f"use the same, give another file for the result, or {cure}"
            raise StateError(f"'{path}' holds the state of an evaluation with other {', '.join(other)}; {cure}")
        return state


def fingerprint_of(model: SegmentationModel, parts: Mapping[str, Any]) -> dict[str, str]:
    """What the numbers depend on: this package's version, the model, its weights, and `parts`, digested as JSON unless
    they are strings."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    fingerprint = {
        "ovseg-fast version": __version__,
        "model": f"{model.preset} {_digest(repr(model.config))}",
        "weights": weights.hexdigest()[:16],
    }
    return fingerprint | {name: part if isinstance(part, str) else _digest(part) for name, part in parts.items()}


def _digest(part: Any) -> str:
    return hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16]
