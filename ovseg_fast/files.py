"""Files are written whole or not at all; text is read in any encoding that says what it is."""

from __future__ import annotations

import codecs
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


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


def read_text(path: str | os.PathLike[str], what: str = "text") -> str:
    """A text file that a person wrote: UTF-8, or UTF-16 or UTF-32 with a byte order mark, with any line ends.

    Raises:
        ValueError: it is in another encoding; the sentence names the file. OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    marks = {"utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
    encoding = next((name for name, starts in marks.items() if content.startswith(starts)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        at = content.count(b"\n", 0, error.start) + 1
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"'{path}' is not {name} (line {at}); save the {what} as UTF-8.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_writable(folder: str | os.PathLike[str], what: str = "out") -> None:
    """Make the folder, if need be, and try to write a file in it; `what` names the argument in errors.

    Raises:
        ValueError: it, or a parent, is not a folder. OSError: it cannot be made or written to.
    """
    folder = Path(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{what} must be a folder, {existing} is a file.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{what}: cannot write to '{folder}': {error.strerror or error}.") from error


@contextmanager
def held(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Hold the lock file `path` for this block; it is released when the process ends, however it ends.

    Raises:
        ValueError: another process holds it: `what` (a noun, such as "a training run") is under way there.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        place = Path(path).parent
        raise ValueError(f"{what} is under way in '{place}'; wait for it, or choose another folder.") from None
    try:
        yield
    finally:
        lock.release()
