"""What is wrong with a checkpoint, in one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or belongs to another model.

    The first line of the message is one sentence; further lines name every key that does not fit.

    Attributes:
        missing, unexpected, mismatched: keys that the checkpoint lacks, that the model lacks, and of another shape.
    """

    def __init__(
        self, message: str, missing: Iterable[str] = (), unexpected: Iterable[str] = (), mismatched: Iterable[str] = ()
    ) -> None:
        super().__init__(message)
        self.missing, self.unexpected, self.mismatched = tuple(missing), tuple(unexpected), tuple(mismatched)


def damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"'{path}' ({path.stat().st_size:,} bytes) is damaged or cut short; download it again.")
