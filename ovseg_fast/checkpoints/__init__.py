"""Checkpoints: reading files of any make, upstream's formats and this package's own, in both directions, strictly."""

from __future__ import annotations

from .errors import CheckpointError
from .files import read
from .storage import classes, download, load, load_upstream, save, to_upstream

__all__ = ["CheckpointError", "classes", "download", "load", "load_upstream", "read", "save", "to_upstream"]
