"""Files are written whole or not at all; folders, locks and text."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from ovseg_fast import files
from ovseg_fast.checkpoints.tensors import write_safetensors
from ovseg_fast.files import check_writable, held, read_text, write_whole


class Interrupted(BaseException):
    """As Ctrl-C: no Exception."""


def test_writes_the_file_and_nothing_else(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.bin", lambda file: file.write_bytes(b"new"))
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_path_may_be_a_string(tmp_path: Path) -> None:
    write_whole(str(tmp_path / "a.bin"), lambda file: file.write_bytes(b"new"))
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "a.npz"
    target.write_bytes(b"old")

    def writer(file: Path) -> None:
        file.write_bytes(b"ne")
        assert (file.parent, file.suffix) == (tmp_path, ".npz")
        assert target.read_bytes() == b"old"
        with open(file, "ab") as stream:
            stream.write(b"w")

    with open(target, "rb") as reader:
        write_whole(target, writer)
        assert reader.read() == b"old", "the old file was written over instead of replaced"
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("error", [ZeroDivisionError("cause"), Interrupted("cause")])
def test_failing_writer_changes_nothing_and_its_error_comes_through(tmp_path: Path, old, error) -> None:
    target = tmp_path / "a.bin"
    if old is not None:
        target.write_bytes(old)

    def writer(file: Path) -> None:
        file.write_bytes(b"half")
        raise error

    with pytest.raises(type(error), match="cause"):
        write_whole(target, writer)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({} if old is None else {"a.bin": old})


def test_full_disk_is_one_sentence_with_the_name_of_the_file(tmp_path: Path) -> None:
    def writer(file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(file))

    with pytest.raises(OSError) as caught:
        write_whole(tmp_path / "a.bin", writer)
    assert str(caught.value) == f"cannot write '{tmp_path / 'a.bin'}': No space left on device."
    assert list(tmp_path.iterdir()) == []


def test_writer_that_removes_its_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write '.*a\.bin'"):
        write_whole(tmp_path / "a.bin", lambda file: file.unlink())
    assert list(tmp_path.iterdir()) == []


def never(file: Path) -> None:
    pytest.fail("the writer must not run")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot write '.*a\.bin': the folder '.*no' does not exist"):
        write_whole(tmp_path / "no" / "a.bin", never)


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(NotADirectoryError, match=r"'.*file' is not a folder"):
        write_whole(tmp_path / "file" / "a.bin", never)


def test_target_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="it is a folder"):
        write_whole(tmp_path, never)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes, which this system lacks")
def test_target_that_is_no_plain_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is not a plain file"):
        write_whole(tmp_path / "pipe", never)
    assert (tmp_path / "pipe").is_fifo()


def test_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "a.bin")
    write_whole(tmp_path / "link", lambda file: file.write_bytes(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "a.bin").read_bytes() == b"new"


def test_same_permissions_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_whole(tmp_path / "whole", lambda file: file.write_bytes(b""))
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Full disks and other causes, whatever the library makes of them


PICTURE = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
WRITERS = {
    "png": ("a.png", lambda file: Image.fromarray(PICTURE).save(file)),
    "jpg": ("a.jpg", lambda file: Image.fromarray(PICTURE).save(file, quality=99)),
    "npz": ("a.npz", lambda file: np.savez_compressed(file, picture=PICTURE)),
    "torch": ("a.pt", lambda file: torch.save({"picture": torch.from_numpy(PICTURE)}, file)),
    "safetensors": ("a.safetensors", lambda file: write_safetensors(file, {"a": torch.from_numpy(PICTURE)}, {})),
    "json": ("a.json", lambda file: file.write_text(json.dumps(PICTURE.tolist()))),
}
EACH_WRITER = pytest.mark.parametrize(("name", "writer"), WRITERS.values(), ids=WRITERS)


@pytest.fixture
def largest_file() -> Iterator[None]:
    """Files cannot grow beyond 64 KiB, as on a disk that becomes full."""
    resource = pytest.importorskip("resource", reason="needs POSIX's limits of resources")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@EACH_WRITER
@pytest.mark.usefixtures("largest_file")
def test_a_disk_that_takes_no_more_is_told_with_the_name_of_the_target(tmp_path: Path, name: str, writer) -> None:
    with pytest.raises(OSError) as caught:
        write_whole(tmp_path / name, writer)
    assert str(caught.value) == f"cannot write '{tmp_path / name}': File too large."
    assert list(tmp_path.iterdir()) == []


@EACH_WRITER
@pytest.mark.skipif(os.name != "posix", reason="needs a file system that allows any bytes in names")
def test_paths_that_are_not_utf8(tmp_path: Path, name: str, writer) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    write_whole(folder / name, writer)
    assert [path.name for path in folder.iterdir()] == [name] and (folder / name).stat().st_size > 1000


@EACH_WRITER
def test_a_folder_that_vanishes_is_told_with_the_name_of_the_target(tmp_path: Path, name: str, writer) -> None:
    folder = tmp_path / "out"
    folder.mkdir()

    def vanishing(file: Path) -> None:
        file.unlink()
        folder.rmdir()
        writer(file)

    with pytest.raises(OSError) as caught:
        write_whole(folder / name, vanishing)
    assert str(caught.value) == f"cannot write '{folder / name}': No such file or directory."


def test_a_cause_hidden_behind_another_error_is_told(tmp_path: Path) -> None:
    def writer(file: Path) -> None:
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise ValueError("write to closed file")  # as zipfile does when it closes what it could not write

    with pytest.raises(OSError, match=r"a\.bin': No space left on device\.$"):
        write_whole(tmp_path / "a.bin", writer)


def test_file_systems_without_fsync_modes_and_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unsupported)
    monkeypatch.setattr(os, "chmod", unsupported)
    if sys.platform != "win32":
        monkeypatch.setattr("fcntl.flock", unsupported)
    write_whole(tmp_path / "a.bin", lambda file: file.write_bytes(b"new"))
    assert (tmp_path / "a.bin").read_bytes() == b"new"

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(tmp_path / "b.bin", lambda file: file.write_bytes(b"new"))
    assert not (tmp_path / "b.bin").exists()


def test_names_as_long_as_the_disk_takes(tmp_path: Path) -> None:
    limit = os.pathconf(tmp_path, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    for name in ("a" * limit, "a." + "b" * (limit - 2), "ü" * (limit // 2), "a" * (limit - 4) + ".npz"):
        write_whole(tmp_path / name, lambda file: file.write_bytes(b"new"))
        assert (tmp_path / name).read_bytes() == b"new"
    with pytest.raises(OSError, match=r"cannot write '.*aaa': File name too long\."):
        write_whole(tmp_path / ("a" * (limit + 1)), never)
    with pytest.raises(OSError, match=r"cannot write '.*': .*null"):
        write_whole(tmp_path / "a\0b", never)


# Temporary files of killed runs


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = [tmp_path / f".ovseg-{'0123456789abcdef'}{ending}" for ending in ("", ".png", ".safetensors")]
    others = [tmp_path / name for name in (".ovseg-mine.png", ".ovseg", "ovseg-0123456789abcdef.png", "a.png")]
    for path in (*left, *others):
        path.write_bytes(b"half")

    def writer(file: Path) -> None:
        file.write_bytes(b"in the middle of it")
        check_writable(tmp_path)
        assert file.exists() and not any(path.exists() for path in left)

    write_whole(tmp_path / "new.png", writer)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in others} | {"new.png"}


def test_own_files_are_kept_where_a_process_may_lock_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovseg_fast.files._lock", lambda descriptor: True)  # as on NFS

    def writer(file: Path) -> None:
        file.write_bytes(b"new")
        check_writable(tmp_path)

    write_whole(tmp_path / "a.bin", writer)
    assert (tmp_path / "a.bin").read_bytes() == b"new" and not files._own


def test_without_locks_only_old_files_are_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovseg_fast.files._lock", lambda descriptor: None)
    old, young = (tmp_path / f".ovseg-{digit * 16}.png" for digit in "01")
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == [young]


@pytest.mark.parametrize("fails", [False, True])
def test_an_interrupt_at_any_line_leaves_nothing_half_written(tmp_path: Path, monkeypatch, fails: bool) -> None:
    monkeypatch.setattr(files, "_own", set())  # what is left in it would be seen by other tests
    target = tmp_path / "labels.png"
    ended = False
    lines_passed = -1
    while not ended:
        lines_passed += 1
        target.write_text("old")
        ended = _write_interrupted(target, lines_passed, fails)
        assert target.read_text() in (("old",) if fails else ("old", "new"))
        files._remove_own()  # as Python does at the process's end
        assert os.listdir(tmp_path) == ["labels.png"]
    assert lines_passed > 30


def _write_interrupted(target: Path, after: int, fails: bool) -> bool:
    """Whether the file was written, or its writer failed, before so many lines of `files` had run.

    Else there is a KeyboardInterrupt.
    """
    left = after

    def trace(frame: FrameType, event: str, argument: object) -> Callable | None:
        nonlocal left
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line":
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    def writer(path: Path) -> None:
        path.write_text("new")
        if fails:
            raise ZeroDivisionError

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        files.write_whole(target, writer)
    except ZeroDivisionError:
        assert fails
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(before)
    return True


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """The code in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(files.__file__).parents[1])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, check=False)


def test_an_interrupted_process_removes_its_files_at_its_end(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from ovseg_fast.files import write_whole\n"
        "make = os.open\n"
        "def interrupted(*arguments):\n    make(*arguments)\n    raise KeyboardInterrupt('as soon as it is made')\n"
        "os.open = interrupted\n"
        "write_whole(Path(sys.argv[1], 'a.png'), Path.touch)"
    )
    assert b"as soon as it is made" in run_python(code, tmp_path).stderr
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_what_the_next_run_removes(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from ovseg_fast.files import write_whole\n"
        "def writer(file):\n    file.write_bytes(b'half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_whole(Path(sys.argv[1], 'a.png'), writer)"
    )
    run_python(code, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"]
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Folders and locks


def test_a_folder_is_made_and_kept_or_not(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "--out", keep=False)
    assert list(tmp_path.iterdir()) == []
    check_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    check_writable(tmp_path / "a" / "b" / "c", keep=False)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ValueError, match=r"^--out must be a folder, .*file is a file\.$"):
            check_writable(path, "--out")
    with pytest.raises(OSError, match=r"^--out: cannot write to '.*': File name too long\.$"):
        check_writable(tmp_path / ("a" * 300), "--out")
    monkeypatch.setattr("tempfile.TemporaryFile", mock.Mock(side_effect=OSError(30, "Read-only file system")))
    with pytest.raises(OSError, match=r"^out: cannot write to '.*new': Read-only file system\.$"):
        check_writable(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    sentence = rf"^a training run is under way in '{re.escape(str(tmp_path))}'; "
    with held(tmp_path / "lock", "a training run"), pytest.raises(ValueError, match=sentence):
        held(tmp_path / "lock", "a training run").__enter__()
    with held(tmp_path / "lock", "a training run"):
        pass


def test_locks_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^cannot write '.*lock': "):
        held(tmp_path / "file" / "lock", "a training run").__enter__()
    for error in (NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")):
        monkeypatch.setattr("filelock.FileLock.acquire", mock.Mock(side_effect=error))
        caplog.clear()
        with held(tmp_path / "lock", "a training run"):
            assert "cannot be locked" in caplog.text


# Text that a person wrote


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_in_any_encoding_that_says_what_it_is(tmp_path: Path, encoding: str, end: str) -> None:
    (tmp_path / "a.txt").write_bytes(f"Katze{end}猫{end}".encode(encoding))
    assert read_text(tmp_path / "a.txt") == "Katze\n猫\n"


def test_text_in_other_encodings_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("cat\nTür\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"^'.*a\.txt' is not UTF-8 \(line 2\); save the class list as UTF-8\.$"):
        read_text(path, "class list")
    path.write_bytes("cat\ndog\n".encode("utf-16") + b"\x00")
    with pytest.raises(ValueError, match=r"^'.*a\.txt' is not UTF-16 \(line 3\)"):
        read_text(path)
    path.write_bytes("cat\ndog\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match="UTF-16 without a byte order mark"):
        read_text(path)
    with pytest.raises(FileNotFoundError, match=r"^cannot read '.*nothing\.txt': No such file or directory\.$"):
        read_text(tmp_path / "nothing.txt")
