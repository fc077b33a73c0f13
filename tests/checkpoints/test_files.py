"""Files of every kind, whole, cut and foreign."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import functools
import os
import pathlib
import pickle
import re
import sys
import types
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
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
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff\xfe", "an image"),
        (b"\x89HDF\r\n\x1a\n\x00\xff\xfe", "HDF5"),
        (b"\x93NUMPY\x01\x00v\x00", "a numpy array"),
        (b"\x1f\x8b\x08\x00\xff\xfe", "gzip"),
        (b"GGUF\x03\x00\x00\x00\xff\xfe", "GGUF"),
        (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xff\xfe", "ONNX"),
        (b"model.pth".ljust(257, b"\x00") + b"ustar\x0000" + bytes(250), "a tar archive; unpack it"),
        (b"sys_info".ljust(257, b"\x00") + b"ustar\x0000" + bytes(250), "as PyTorch 0.1 wrote"),
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


@pytest.mark.filterwarnings("ignore:.*quantize.*")
def test_other_archives_pickles_and_contents(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.pth", "content")
    assert "zip archive" in str(refused(checkpoints.read, path))
    with zipfile.ZipFile(path, "w") as archive:  # the parts by which torch tells a TorchScript program
        for part in ("data.pkl", "constants.pkl", "version"):
            archive.writestr(f"ViT-B-16/{part}", "content")
    assert "TorchScript" in str(refused(checkpoints.read, path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("models/net.pth", "content")
    assert "unpack it and use 'models/net.pth'" in str(refused(checkpoints.read, path))
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    assert "numpy arrays (.npz)" in str(refused(checkpoints.read, tmp_path / "arrays.npz"))
    path.write_bytes(pickle.dumps({"a": [1, 2]}, protocol=4))
    assert "a pickle that torch.save did not write" in str(refused(checkpoints.read, path))
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"model": {"a": np.ones(3)}, "__author__": "x"}, protocol))
        assert "pickle of numpy arrays, as detectron2's model zoo" in str(refused(checkpoints.read, path))
        torch.save({"model": STATE}, path, pickle_protocol=protocol)
        if protocol > 3:
            assert f"pickle protocol {protocol}" in str(refused(checkpoints.read, path))
    torch.save([torch.zeros(2)], path)
    assert "got a list" in str(refused(checkpoints.read, path))
    torch.save({"net": STATE, "epoch": 3}, path)
    assert "'net' (dict), 'epoch' (int)" in str(refused(checkpoints.read, path))
    sparse, empty = torch.eye(3).to_sparse(), torch.ones(3, device="meta")
    torch.save(
        {"model": {"a": sparse, "b": empty, "c": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)}}, path
    )
    error = refused(checkpoints.read, path)
    assert "'a' (torch.sparse_coo), 'b' (without values), 'c' (quantized)" in str(error)
    assert "folder" in str(refused(checkpoints.read, tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "in several files" in str(refused(checkpoints.read, tmp_path / "model.safetensors.index.json"))
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
        checkpoints.read(tmp_path / "a\0b")
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


# What training frameworks put beside the tensors


def made_up(monkeypatch: pytest.MonkeyPatch, module: str, name: str, base: type = object) -> type:
    """A class of a package that is not installed here, for this test to write."""
    made = type(name, (base,), {"__module__": module, "__qualname__": name})
    parts = module.split(".")
    for end in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: end + 1]), types.ModuleType(module))
    setattr(sys.modules[module], name, made)
    return made


def numpy_data(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    numbers = (np.float64(0.41), np.int64(79999), np.bool_(True), np.str_("x"), np.float16(2), np.complex64(1j))
    arrays = [np.zeros((2, 3), kind) for kind in ("f4", "i8", "u1", "?", "U3", "S2", "O", "M8[s]")]
    records, masked = np.zeros(3, [("a", "f4"), ("b", "i4")]), np.ma.array([1, 2], mask=[0, 1])
    return [*numbers, *arrays, records, masked, np.dtype(">f4"), np.random.get_state(), np.random.default_rng(0)]


def framework_data(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    history = made_up(monkeypatch, "mmengine.logging.history_buffer", "HistoryBuffer")()
    history.log, history.methods = np.arange(3.0), {"mean": argparse.Namespace.__init__}
    config = made_up(monkeypatch, "mmengine.config.config", "ConfigDict", dict)(lr=1, nested=[{}])
    frozen = made_up(monkeypatch, "yacs.config", "CfgNode", dict)(a=1)
    frozen.__dict__["__immutable__"] = True
    return [history, {"cfg": config}, frozen]


def plain_data(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    lists = collections.defaultdict(list, a=[1])
    parameter = torch.nn.Parameter(torch.ones(1))
    schedule = torch.optim.lr_scheduler.OneCycleLR(torch.optim.SGD([parameter], 1.0), 1.0, total_steps=3)
    return [
        *(lists, collections.deque([1, 2], 5), collections.Counter("ab"), collections.OrderedDict(a=1)),
        *(
            argparse.Namespace(lr=1),
            types.SimpleNamespace(a=1),
            pathlib.PurePosixPath("x"),
            datetime.datetime(2026, 1, 1),
        ),
        *({1, 2}, frozenset([1]), slice(1, 2), range(3), complex(1, 2), b"bytes", bytearray(b"x"), decimal.Decimal(1)),
        *(torch.Size([1]), torch.device("cpu"), torch.float16, torch.__version__, schedule.state_dict(), parameter),
    ]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("data", [numpy_data, framework_data, plain_data])
def test_harmless_data_beside_the_tensors_is_ignored(tmp_path: Path, data, zipped: bool, monkeypatch) -> None:
    for extra in data(monkeypatch):
        torch.save({"state_dict": STATE, "meta": extra}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        assert_same(checkpoints.read(tmp_path / "a.pth")[0], STATE)
    assert "StandIn" not in repr(torch.serialization.get_safe_globals())


def test_names_of_both_numpys(tmp_path: Path) -> None:
    """numpy 1 writes `numpy.core`, numpy 2 `numpy._core`; as does an archive that a zip program packed again."""
    torch.save({"model": STATE, "iteration": np.int64(3)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for core in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        with zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in parts.items():
                archive.writestr(name, re.sub(rb"numpy\._?core\.multiarray", core, content))
        assert_same(checkpoints.read(tmp_path / "b.pth")[0], STATE)


def test_numpy_in_the_place_of_tensors_is_named(tmp_path: Path) -> None:
    torch.save({"model": STATE | {"iteration": np.int64(3), "mean": np.ones(2)}}, tmp_path / "a.pth")
    error = refused(checkpoints.read, tmp_path / "a.pth")
    assert "'iteration' (numpy number), 'mean' (numpy array)" in str(error)


class Caller:
    """Calls something when it is read."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def test_names_that_look_harmless_run_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "was_run"
    for caller in (
        Caller(functools.partial(os.mkdir, str(marker))),
        Caller(getattr, Caller(os.mkdir, str(marker)), "x"),
    ):
        torch.save({"model": STATE, "hook": caller}, tmp_path / "a.pth")
        assert "mkdir" in str(refused(checkpoints.read, tmp_path / "a.pth"))
    torch.save({"model": STATE, "hook": Caller(pathlib.Path.cwd)}, tmp_path / "a.pth")
    assert_same(checkpoints.read(tmp_path / "a.pth")[0], STATE)
    assert not marker.exists()


def test_flipped_bits_are_not_read_as_other_numbers(tmp_path: Path, rng: torch.Generator) -> None:
    path = tmp_path / "a.pth"
    save_zip(path)
    content = path.read_bytes()
    numbers = content.index(STATE["layer.weight"].numpy().tobytes())
    everywhere = torch.randint(len(content), (40,), generator=rng).tolist()
    for at in (numbers, numbers + 7999, *everywhere):
        altered = bytearray(content)
        altered[at] ^= 1 << int(torch.randint(8, (), generator=rng))
        path.write_bytes(altered)
        try:
            state, _ = checkpoints.read(path)
        except checkpoints.CheckpointError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
        else:
            assert_same(state, STATE)  # it hit what nobody reads, such as padding
            assert at not in (numbers, numbers + 7999)


def test_an_entry_that_became_a_folder_by_one_bit_is_damage(tmp_path: Path) -> None:
    """torch.load leaves its tensor as it was made; the folders of an archive that was packed again are no damage."""
    save_zip(tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    for as_folder in (True, False):
        with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
            archive.writestr(entries[0][0].filename.partition("/")[0] + "/", b"")
            for entry, content in entries:
                copy = zipfile.ZipInfo(entry.filename)
                copy.external_attr = 0x10 * (as_folder and entry.filename.endswith("data/0"))
                archive.writestr(copy, content)
        if as_folder:
            assert "damaged" in str(refused(checkpoints.read, tmp_path / "b.pth"))
        else:
            assert_same(checkpoints.read(tmp_path / "b.pth")[0], STATE)


def test_a_disk_that_fails_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_zip(tmp_path / "a.pth")
    monkeypatch.setattr(zipfile.ZipExtFile, "read", mock.Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(OSError, match=r"^cannot read '.*a\.pth': Input/output error\.$"):
        checkpoints.read(tmp_path / "a.pth")


def test_files_whose_checksums_were_left_out(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        save_zip(tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(checkpoints.read(tmp_path / "a.pth")[0], STATE)


@WRITERS
@pytest.mark.skipif(os.name != "posix", reason="needs a file system that allows any bytes in names")
def test_paths_that_are_not_utf8(tmp_path: Path, writer) -> None:
    writer(tmp_path / "a.pth")
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.pth"))
    (tmp_path / "a.pth").rename(path)
    assert_same(checkpoints.read(path)[0], STATE)


@WRITERS
def test_a_lack_of_memory_is_not_called_damage(tmp_path: Path, writer, monkeypatch: pytest.MonkeyPatch) -> None:
    writer(tmp_path / "a.pth")
    text = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    error = MemoryError() if writer is save_safetensors else RuntimeError(f"{text} allocate 16000 bytes. Error code 12")
    module = "tensors.safe_open" if writer is save_safetensors else "pickles.torch.load"
    monkeypatch.setattr(f"ovseg_fast.checkpoints.{module}", mock.Mock(side_effect=error))
    with pytest.raises(MemoryError, match=r"^there is not enough memory to read '.*a\.pth'"):
        checkpoints.read(tmp_path / "a.pth")
