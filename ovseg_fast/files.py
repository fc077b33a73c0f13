"""Files are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | os.PathLike[str], writer: Callable[[Path], object]) -> None:
    """Write a file so that nobody ever finds half of it. If anything fails, an earlier file stays as it was.

    Args:
        path: the file to write. A symbolic link is followed.
        writer: fills the empty, temporary file in the same folder whose path it is given; this then replaces `path`.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder of `path` does not exist or is not a folder.
        OSError: `path` is not a plain file, or cannot be written. Other errors of `writer` are passed on.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.exists():
        raise FileNotFoundError(f"cannot write '{path}': the folder '{target.parent}' does not exist.")
    if not target.parent.is_dir():
        raise NotADirectoryError(f"cannot write '{path}': '{target.parent}' is not a folder.")
    if target.exists() and not target.is_file():
        raise OSError(f"cannot write '{path}': it is {'a folder' if target.is_dir() else 'not a plain file'}.")
    # Not with tempfile, whose files only their owner may read.
    temporary = target.with_name(f".ovseg-{secrets.token_hex(8)}{target.suffix}")
    try:
        temporary.touch(exist_ok=False)
        writer(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(f"cannot write '{path}': {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
