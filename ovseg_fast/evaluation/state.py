"""Progress of an evaluation on disk, so that it can be resumed after it was stopped or killed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..files import write_whole
from ..models import SegmentationModel
from .environment import tell_changes

FORMAT = "4"  # of the file
CURE = "start over with restart=True (--restart), which discards it."


class StateError(ValueError):
    """A stored state cannot be resumed; the message is one sentence that says how to start over."""


@dataclass
class State:
    """The confusion matrix so far, (C, C) int64, of the images `done`, (N,) bool, which took `seconds`; `stamps`,
    (N, 4) int64, of the files of each image when it was read, see `stamp`; and the backends that ran the `operators`.
    Only a state with the same fingerprint, see `fingerprint_of`, is resumed, and only if those files are as they were;
    another `environment` is told."""

    fingerprint: dict[str, str]
    matrix: np.ndarray
    done: np.ndarray
    stamps: np.ndarray
    seconds: float = 0.0
    environment: Mapping[str, Any] = field(default_factory=dict)
    operators: dict[str, str] = field(default_factory=dict)

    @classmethod
    def new(cls, fingerprint: dict[str, str], classes: int, images: int) -> State:
        """Nothing is done yet."""
        matrix, done = np.zeros((classes, classes), np.int64), np.zeros(images, bool)
        return cls(fingerprint, matrix, done, np.zeros((images, 4), np.int64))

    def save(self, path: Path) -> None:
        """Write it to an .npz file, whole or not at all. Raises OSError."""
        arrays = {"matrix": self.matrix, "done": self.done, "stamps": self.stamps}
        about = {"fingerprint": self.fingerprint, "seconds": self.seconds, "environment": dict(self.environment)}
        about["operators"] = self.operators
        text = json.dumps(about | {"digest": _digest_of(about, arrays)})
        content: dict[str, Any] = {"about": np.array(text), **arrays}
        write_whole(path, lambda file: np.savez_compressed(file, **content))

    @classmethod
    def load(
        cls,
        path: Path,
        fingerprint: dict[str, str],
        names: Sequence[str],
        stamps: np.ndarray,
        environment: Mapping[str, Any] | None = None,
    ) -> State | None:
        """The state in a file, or None if it does not exist or holds no image.

        Args:
            names: of the N images. stamps: (N, 4), of their files as they are now.
            environment: as it is now.

        Raises:
            StateError: it is damaged, has another fingerprint, or an image that is done has changed since.
        """
        if not path.exists():
            return None
        state = cls._read(path)
        if not state.done.any():
            return None
        keys = fingerprint | state.fingerprint
        other = [key for key in keys if state.fingerprint.get(key) != fingerprint.get(key)]
        if other:
            cure = f"use the same, give another file for the result, or {CURE}"
            raise StateError(f"'{path}' holds the state of an evaluation with other {', '.join(other)}; {cure}")
        changed = np.flatnonzero(state.done & (state.stamps != stamps).any(1))
        if len(changed):
            more = f" and {len(changed) - 1} more have" if len(changed) > 1 else " has"
            what = f"image or mask of {names[changed[0]]}{more} changed since it was evaluated"
            raise StateError(f"'{path}' cannot be resumed: {what}; {CURE}")
        tell_changes(state.environment, environment or {})
        return state

    @classmethod
    def _read(cls, path: Path) -> State:
        try:
            with zipfile.ZipFile(path) as archive:  # numpy does not look at every checksum
                if (broken := archive.testzip()) is not None:
                    raise ValueError(f"checksum of {broken}")
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                fingerprint = dict(about["fingerprint"])
                if fingerprint.get("state format") != FORMAT:  # nothing else is known of it
                    some = np.ones(1)
                    return cls(fingerprint, matrix=some, done=some, stamps=some)
                arrays = {name: file[name] for name in ("matrix", "done", "stamps")}
            digest, seconds = about.pop("digest"), float(about["seconds"])
            if digest != _digest_of(about, arrays):
                raise ValueError("digest")
            if not 0 <= seconds < math.inf:
                raise ValueError(f"{seconds} seconds")
        # A damaged archive can fail as anything.
        except Exception as error:
            raise StateError(f"'{path}' is not the state of an evaluation, or is damaged; {CURE}") from error
        return cls(
            fingerprint,
            **arrays,
            environment=dict(about["environment"]),
            operators=dict(about["operators"]),
            seconds=seconds,
        )


def stamp(pair: Any) -> list[int]:
    """Size and time of change (ns) of the image and the mask of a pair; -1 for a file that is not there, or if the pair
    has no files."""
    facts = []
    for file in (getattr(pair, "image", None), getattr(pair, "mask", None)):
        try:
            status = os.stat(file) if isinstance(file, (str, os.PathLike)) else None
        except OSError:
            status = None
        facts += [-1, -1] if status is None else [status.st_size, status.st_mtime_ns]
    return facts


def fingerprint_of(model: SegmentationModel, parts: Mapping[str, Any]) -> dict[str, str]:
    """What the numbers depend on: this package's version, the model, its weights, and `parts`, digested as JSON unless
    they are strings."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    fingerprint = {
        "state format": FORMAT,
        "ovseg-fast version": __version__,
        "model": f"{model.preset} {_digest(repr(model.config))}",
        "weights": weights.hexdigest()[:16],
    }
    return fingerprint | {name: part if isinstance(part, str) else _digest(part) for name, part in parts.items()}


def _digest(part: Any) -> str:
    return hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16]


def _digest_of(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Of everything in a file: changed in whatever way, it is not read as other numbers."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
