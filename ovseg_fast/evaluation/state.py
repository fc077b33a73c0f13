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
    """Counts so far.

    Attributes:
        fingerprint: everything that the numbers depend on, part by part; only a state with the same one is resumed.
        matrix: (C, C) int64, the confusion matrix. done: (N,) bool, the images that are in it.
        seconds: the time they took.
    """

    fingerprint: dict[str, str]
    matrix: np.ndarray
    done: np.ndarray
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write it whole or not at all. Raises OSError."""
        about = json.dumps({"fingerprint": self.fingerprint, "seconds": self.seconds})

        def write(file: Path) -> None:
            with open(file, "wb") as stream:
                np.savez_compressed(stream, about=np.array(about), matrix=self.matrix, done=self.done)

        write_whole(path, write)

    @classmethod
    def load(cls, path: Path, fingerprint: dict[str, str]) -> State | None:
        """The state in a file, or None if there is no file, or none of its images is done.

        Raises:
            StateError: it is damaged, or of an evaluation with another fingerprint.
        """
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
        if state.fingerprint != fingerprint:
            keys = [*fingerprint, *(key for key in state.fingerprint if key not in fingerprint)]
            other = [key for key in keys if state.fingerprint.get(key) != fingerprint.get(key)]
            raise StateError(
                f"'{path}' holds the state of an evaluation with other {', '.join(other)}; use the same, give another "
                f"file for the result, or {cure}"
            )
        return state


def fingerprint_of(model: SegmentationModel, parts: Mapping[str, Any]) -> dict[str, str]:
    """What the numbers depend on: the model, its weights, this package's version, and `parts` by name. Values other
    than strings are digested as JSON."""
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
