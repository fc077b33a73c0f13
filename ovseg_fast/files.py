"""Files are written whole or not at all; text is read in any encoding that says what it is."""

from __future__ import annotations

import atexit
import codecs
import errno
import logging
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

if sys.platform != "win32":
    import fcntl

TEMPORARY = re.compile(r"\.ovseg-[0-9a-f]{16}(\.\w{1,15})?", re.ASCII)
ABANDONED = 24 * 3600.0  # seconds after which a temporary file is nobody's, where locks do not tell
NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # some network and FUSE file systems
NO_LOCKS = NO_FSYNC | {errno.ENOLCK}

_own: set[Path] = set()  # temporary files of this process, which NFS would let it lock twice
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_own.clear)
logger = logging.getLogger(__name__)


def write_whole(path: str | os.PathLike[str], writer: Callable[[Path], object]) -> None:
    """Write a file so that nobody ever finds half of it. If anything fails, an earlier file stays as it was.

    Args:
        path: the file to write. A symbolic link is followed.
        writer: fills the empty, temporary file in the same folder whose path it is given; this then replaces `path`.
            It is to write into that file, not to put another one in its place.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder of `path` does not exist or is not a folder.
        OSError: `path` is not a plain file, or cannot be written (a full disk, whatever `writer` makes of it). Other
            errors of `writer` are passed on.
    """
    try:
        target = Path(os.path.realpath(path))
        kind = "" if not target.exists() or target.is_file() else "a folder" if target.is_dir() else "not a plain file"
        folder, is_folder = target.parent.exists(), target.parent.is_dir()
    except (OSError, ValueError) as error:  # a name that is too long, a null character
        raise OSError(f"cannot write '{path}': {_reason(error)}.") from error
    if not folder:
        raise FileNotFoundError(f"cannot write '{path}': the folder '{target.parent}' does not exist.")
    if not is_folder:
        raise NotADirectoryError(f"cannot write '{path}': '{target.parent}' is not a folder.")
    if kind:
        raise OSError(f"cannot write '{path}': it is {kind}.")
    try:
        temporary, held_file = _new_temporary(target)
    except OSError as error:
        raise OSError(f"cannot write '{path}': {_reason(error)}.") from error
    try:
        mode = temporary.stat().st_mode
        writer(temporary)
        if temporary.stat().st_mode != mode:
            with suppress(OSError):  # not every file system knows modes
                temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, target)
    except Exception as error:
        reason = _disk_reason(error, temporary)
        if reason is None:
            raise
        raise OSError(f"cannot write '{path}': {reason}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        os.close(held_file)
        _own.discard(temporary)


def _new_temporary(target: Path) -> tuple[Path, int]:
    """An empty file beside the target, and its open descriptor, which holds a lock: see `remove_abandoned`."""
    suffix = target.suffix if re.fullmatch(r"\.\w{1,15}", target.suffix, re.ASCII) else ""
    while True:
        # Not with tempfile, whose files only their owner may read.
        temporary = target.with_name(f".ovseg-{secrets.token_hex(8)}{suffix}")
        _own.add(temporary)  # first: a signal may come at any line from here on, see `_remove_own`
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError:
            _own.discard(temporary)
            raise
        if _lock(descriptor) is not False and temporary.exists():
            return temporary, descriptor
        os.close(descriptor)  # another process was just about to remove it as abandoned
        _own.discard(temporary)


@atexit.register
def _remove_own() -> None:
    """At the process's end: what a signal between two lines of `write_whole` kept it from removing."""
    for path in list(_own):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool | None:
    """Whether this file could be locked; None where the file system has no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # somebody holds it
        return False
    except OSError:
        return None
    return True


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of `write_whole` in a folder whose process was killed.

    A living process holds a lock on its own. Without locks, files are abandoned that are a day old.
    """
    try:
        found = [Path(entry.path) for entry in os.scandir(os.path.realpath(folder)) if TEMPORARY.fullmatch(entry.name)]
    except OSError:
        return
    for path in found:
        if path in _own:
            continue
        with suppress(OSError):  # it is gone, or somebody else's
            descriptor = os.open(path, os.O_RDWR)
            try:
                free = _lock(descriptor)
                if free or (free is None and time.time() - os.fstat(descriptor).st_mtime > ABANDONED):
                    path.unlink()
            finally:
                os.close(descriptor)


def _flush(path: Path) -> None:
    """Onto the disk, so that a power cut after the renaming does not leave an empty file."""
    with open(path, "rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in NO_FSYNC:
                raise


def _disk_reason(error: Exception, temporary: Path) -> str | None:
    """Why the disk did not take a file, or None if the error is about something else.

    Libraries hide it: torch.save raises RuntimeError, PIL "encoder error -2", zipfile "write to closed file".
    """
    if isinstance(error, OSError) and error.errno is not None:
        return _reason(error)
    try:
        if temporary.exists() or not temporary.parent.exists():
            with open(temporary, "rb+") as file:  # the same disk tells when asked again
                file.seek(0, os.SEEK_END)
                file.write(bytes(1 << 20))
            _flush(temporary)
    except OSError as found:
        return _reason(found)
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OSError) and cause.errno is not None:
        return _reason(cause)
    return _reason(error) if isinstance(error, OSError) else None


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def read_text(path: str | os.PathLike[str], what: str = "text") -> str:
    """A text file that a person wrote: UTF-8, or UTF-16 or UTF-32 with a byte order mark, with any line ends.

    Raises:
        ValueError: it is in another encoding; the sentence names the file. OSError: it cannot be read.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise type(error)(f"cannot read '{path}': {_reason(error)}.") from error
    marks = {"utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
    encoding = next((name for name, starts in marks.items() if content.startswith(starts)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        at = content[: error.start].decode(encoding, errors="ignore").count("\n") + 1
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"'{path}' is not {name} (line {at}); save the {what} as UTF-8.") from None
    if "\0" in text:
        raise ValueError(f"'{path}' is not text, or UTF-16 without a byte order mark; save the {what} as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_writable(folder: str | os.PathLike[str], what: str = "out", *, keep: bool = True) -> None:
    """Make the folder, if need be, and write a file in it; `what` names the argument in errors.

    What killed runs left there, half-written, is removed. Without `keep`, folders made here are removed again.

    Raises:
        ValueError: it, or a parent, is not a folder. OSError: it cannot be made or written to.
    """
    made: list[Path] = []
    try:
        folder = Path(folder)
        for path in (folder, *folder.absolute().parents):
            if path.exists():
                break
            made.append(path)
        if not path.is_dir():
            raise ValueError(f"{what} must be a folder, {path} is a file.")
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"full?")
    except OSError as error:
        keep = False
        raise OSError(f"{what}: cannot write to '{folder}': {_reason(error)}.") from error
    finally:
        if not keep:
            for path in made:
                with suppress(OSError):
                    path.rmdir()


@contextmanager
def held(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Hold the lock file `path` for this block; it is released when the process ends, however it ends.

    Where the file system has no locks, the block runs without one and a warning says so.

    Raises:
        ValueError: another process holds it: `what` (a noun, such as "a training run") is under way there.
        OSError: the lock file cannot be written.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        place = Path(path).parent
        raise ValueError(f"{what} is under way in '{place}'; wait for it, or choose another folder.") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise OSError(f"cannot write '{path}': {_reason(error)}.") from error
        logger.warning("'%s' cannot be locked: two runs in one folder would not notice each other.", path)
    try:
        yield
    finally:
        lock.release()
