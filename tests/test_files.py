"""Files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ovseg_fast.files import write_whole


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
