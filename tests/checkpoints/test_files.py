"""Files of every kind, whole, cut and foreign."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from checkpoints.common import STATE, assert_same, copy_of, refused
from ovseg_fast import checkpoints


def save_zip(path: Path) -> None:
    torch.save({"model": STATE}, path)


def save_legacy(path: Path) -> None:
    torch.save({"state_dict": STATE, "meta": {"epoch": 3}}, path, _use_new_zipfile_serialization=False)


def save_safetensors(path: Path) -> None:
    safetensors.torch.save_file(STATE, path)


WRITERS = pytest.mark.parametrize("writer", [save_zip, save_legacy, save_safetensors])


@WRITERS
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model"])
def test_read_recognises_files_by_content(tmp_path: Path, writer, name: str) -> None:
    writer(tmp_path / name)
    state, metadata = checkpoints.read(tmp_path / name)
    assert_same(state, STATE)
    assert metadata == {}
    assert_same(checkpoints.read(str(tmp_path / name))[0], STATE)


@WRITERS
def test_truncated_files(tmp_path: Path, writer, rng: torch.Generator) -> None:
    writer(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    few = torch.randint(1000, len(content), (20,), generator=rng).tolist()
    for length in [*range(1, 1000, 7), *few, len(content) - 100, len(content) - 1]:
        path = tmp_path / "cut.pth"
        path.write_bytes(content[:length])
        error = refused(checkpoints.read, path)
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
        assert "damaged" in str(error), length


def test_a_truncated_checkpoint_does_not_change_the_model(tmp_path: Path, model: nn.Module) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": checkpoints.to_upstream(model)}, path)
    os.truncate(path, path.stat().st_size * 3 // 4)
    before = copy_of(model.state_dict())
    assert "cut short" in str(refused(checkpoints.load, model, path))
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty"),
        (b"some text\nof several lines\n" * 100, "text file"),
        ("Gewichte für das Modell".encode(), "text file"),
        (b"<!DOCTYPE html>\n<html lang='en'><head><title>Sign in</title>", "web page"),
        (b"\xef\xbb\xbf\n <html>\n", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 617999127\n", "Git LFS"),
        (b'{"weights": []}', "text file"),
        (b"\x00" * 5000, "neither"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff\xfe", "neither"),
        (b"\x80\x04" + b"\xfe" * 50, "damaged"),
        (b"PK\x03\x04" + b"\x17" * 500, "damaged"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{not json at all", "damaged"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff{", "damaged"),
    ],
)
def test_files_that_are_not_checkpoints(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    error = refused(checkpoints.read, path)
    assert words in str(error) and str(path) in str(error) and len(str(error).splitlines()) == 1


def test_other_archives_pickles_and_contents(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.pth", "content")
    assert "zip archive" in str(refused(checkpoints.read, path))
    with zipfile.ZipFile(path, "w") as archive:  # the parts by which torch tells a TorchScript program
        for part in ("data.pkl", "constants.pkl", "version"):
            archive.writestr(f"ViT-B-16/{part}", "content")
    assert "TorchScript" in str(refused(checkpoints.read, path))
    path.write_bytes(pickle.dumps({"a": [1, 2]}, protocol=4))
    assert "damaged" in str(refused(checkpoints.read, path))
    torch.save([torch.zeros(2)], path)
    assert "got a list" in str(refused(checkpoints.read, path))
    torch.save({"net": STATE, "epoch": 3}, path)
    assert "'net' (dict), 'epoch' (int)" in str(refused(checkpoints.read, path))
    assert "folder" in str(refused(checkpoints.read, tmp_path))
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint file '.*nothing\.pth'"):
        checkpoints.read(tmp_path / "nothing.pth")


class Intruder:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / "model.pth", tmp_path / "was_run"
    torch.save({"model": STATE, "hook": Intruder(marker)}, path, _use_new_zipfile_serialization=zipped)
    error = refused(checkpoints.read, path)
    assert "Python objects" in str(error) and "mkdir" in str(error) and str(path) in str(error)
    assert not marker.exists()


def test_code_in_a_plain_pickle_is_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "model.pkl", tmp_path / "was_run"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Intruder(marker), protocol))
        refused(checkpoints.read, path)
    assert not marker.exists()
