"""The format of this package."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from checkpoints.common import TINY, assert_same, build_random, copy_of, refused
from ovseg_fast import checkpoints


def test_own_format_round_trip(tmp_path: Path, model: nn.Module, other: nn.Module) -> None:
    path, names = tmp_path / "model.safetensors", ["Katze", "grass, lawn", "空"]
    checkpoints.save(model, path, names)
    metadata = checkpoints.load(other, path)
    assert_same(other.state_dict(), model.state_dict())
    assert metadata["format"] == "ovseg-fast" and metadata["version"] == "1"
    assert metadata["preset"] == model.preset and json.loads(metadata["classes"]) == names
    assert checkpoints.classes(path) == names
    assert_same(safetensors.torch.load_file(path), model.state_dict())
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_own_format_without_classes_or_preset(tmp_path: Path, model: nn.Module, other: nn.Module) -> None:
    path, preset = tmp_path / "model.safetensors", model.preset
    model.preset = None
    checkpoints.save(model, path)
    assert checkpoints.classes(path) is None
    assert "preset" not in checkpoints.load(other, path)
    assert_same(other.state_dict(), model.state_dict())
    model.preset = preset
    checkpoints.save(model, path)
    other.preset = None
    assert checkpoints.load(other, path)["preset"] == preset


def test_own_format_keeps_dtype_layout_and_shared_tensors(tmp_path: Path, rng: torch.Generator) -> None:
    model, path = build_random("catseg-tiny", rng).to(torch.bfloat16), tmp_path / "model.safetensors"
    model.to(memory_format=torch.channels_last)
    model.aggregator.layers[1].classes.q.bias = model.aggregator.layers[1].classes.k.bias
    checkpoints.save(model, path)
    assert_same(checkpoints.read(path)[0], model.state_dict())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_load_reads_the_upstream_format_from_any_file(
    tmp_path: Path, model: nn.Module, other: nn.Module, suffix: str
) -> None:
    path, state = tmp_path / f"model{suffix}", checkpoints.to_upstream(model)
    if suffix == ".pth":
        torch.save({"model": state}, path)
    else:
        safetensors.torch.save_file(state, path, {"format": "pt"})
    checkpoints.load(other, path)
    assert_same(other.state_dict(), model.state_dict())
    assert checkpoints.classes(path) is None


def test_load_reads_a_plain_state_dict(tmp_path: Path, model: nn.Module, other: nn.Module) -> None:
    path = tmp_path / "epoch_3.pth"
    state = {f"_orig_mod.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"model": state, "optimizer": torch.optim.AdamW(model.parameters()).state_dict()}, path)
    assert checkpoints.load(other, path) == {}
    assert_same(other.state_dict(), model.state_dict())
    torch.save({key: tensor for key, tensor in model.state_dict().items() if "ln_post" not in key}, path)
    assert all("ln_post" in key for key in refused(checkpoints.load, other, path).missing)


def test_load_refuses_another_model(tmp_path: Path, rng: torch.Generator) -> None:
    catseg, cascade = (build_random(name, rng) for name in TINY)
    path = tmp_path / "model.safetensors"
    checkpoints.save(catseg, path)
    before = copy_of(cascade.state_dict())
    error = refused(checkpoints.load, cascade, path)
    assert f"'{path}' holds catseg-tiny, the model is cascade-clip-tiny" in str(error)
    catseg.preset = None
    checkpoints.save(catseg, path)
    error = refused(checkpoints.load, cascade, path)
    assert "cat-seg in ovseg-fast's own format" in str(error) and error.missing and error.unexpected
    torch.save({"model": checkpoints.to_upstream(catseg)}, path)
    error = refused(checkpoints.load, cascade, path)
    assert f"'{path}' does not fit cascade-clip-tiny" in str(error) and "checkpoint of cat-seg;" in str(error)
    assert_same(cascade.state_dict(), before)


def test_load_refuses_another_version_nan_and_damaged_class_lists(tmp_path: Path, model: nn.Module) -> None:
    path, state = tmp_path / "model.safetensors", copy_of(model.state_dict())
    safetensors.torch.save_file(state, path, {"format": "ovseg-fast", "version": "2"})
    assert "format version 2" in str(refused(checkpoints.load, model, path))
    for damaged in ("[", "3", '[""]', "[1]"):
        safetensors.torch.save_file(state, path, {"format": "ovseg-fast", "version": "1", "classes": damaged})
        assert "class list" in str(refused(checkpoints.classes, path))
    state[list(state)[-1]].view(-1)[0] = float("nan")
    safetensors.torch.save_file(state, path, {"format": "ovseg-fast", "version": "1"})
    assert "NaN" in str(refused(checkpoints.load, model, path))


def test_save_is_whole_or_not_at_all(tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    checkpoints.save(model, path, ["cat"])
    before = path.read_bytes()

    def fail_halfway(file, tensors, metadata):
        file.write_bytes(before[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ovseg_fast.checkpoints.storage.write_safetensors", fail_halfway)
    with pytest.raises(OSError, match=r"^cannot write '.*model\.safetensors': No space left on device\.$"):
        checkpoints.save(model, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_equal_models_give_equal_files(tmp_path: Path, model: nn.Module) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(5)]
    for path in paths:
        checkpoints.save(model, path, ["cat", "空"])
    assert len({path.read_bytes() for path in paths}) == 1
    with safetensors.safe_open(paths[0], framework="pt") as file:
        assert file.metadata()["format"] == "ovseg-fast"
    assert checkpoints.classes(paths[0]) == ["cat", "空"]


def test_altered_numbers_and_names_are_noticed(tmp_path: Path, model: nn.Module, rng: torch.Generator) -> None:
    path = tmp_path / "model.safetensors"
    checkpoints.save(model, path, ["cat"])
    content, before = bytearray(path.read_bytes()), copy_of(model.state_dict())
    start = 8 + int.from_bytes(content[:8], "little")
    for at in (start, len(content) - 1, *torch.randint(start, len(content), (10,), generator=rng).tolist()):
        altered = bytearray(content)
        altered[at] ^= 1
        path.write_bytes(altered)
        assert "has another checksum" in str(refused(checkpoints.load, model, path))
    path.write_bytes(content.replace(b'[\\"cat\\"]', b'[\\"cut\\"]'))
    assert "has another checksum" in str(refused(checkpoints.load, model, path))
    assert_same(model.state_dict(), before)
    path.write_bytes(content)
    checkpoints.load(model, path)


def test_files_without_a_checksum_still_load(tmp_path: Path, model: nn.Module, other: nn.Module) -> None:
    metadata = {"format": "ovseg-fast", "version": "1", "preset": model.preset}
    safetensors.torch.save_file(copy_of(model.state_dict()), tmp_path / "model.safetensors", metadata)
    assert checkpoints.load(other, tmp_path / "model.safetensors") == metadata
    assert_same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", TINY)
def test_packaged_weights_have_a_checksum(name: str) -> None:
    assert "crc32" in checkpoints.read(checkpoints.download(name))[1]


def test_metadata_that_is_damaged_deep_or_huge(tmp_path: Path, model: nn.Module) -> None:
    path = tmp_path / "model.safetensors"
    state = copy_of(model.state_dict())
    for classes in ("[" * 100_000, "9" * 100_000, '["' + "x" * 100_000, "{" * 3):
        safetensors.torch.save_file(state, path, {"format": "ovseg-fast", "version": "1", "classes": classes})
        assert str(path) in str(refused(checkpoints.classes, path))
    for header in (b"[" * 100_000, b'{"a":' * 50_000, b"{\xff", b'{"a":{"dtype":"F32","shape":[1e400]}}', b"{" * 9):
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
        assert str(path) in str(refused(checkpoints.read, path))
        assert str(path) in str(refused(checkpoints.classes, path))


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_saved_files_have_the_usual_mode(tmp_path: Path, model: nn.Module) -> None:
    checkpoints.save(model, tmp_path / "model.safetensors")
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.iterdir()}
    assert len(modes) == 1


def test_save_refuses_bad_arguments(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got '.*model\.pth'"):
        checkpoints.save(model, tmp_path / "model.pth")
    with pytest.raises(TypeError, match="classes must be a list of names"):
        checkpoints.save(model, tmp_path / "model.safetensors", "cat")
    with pytest.raises(ValueError, match="at least one name"):
        checkpoints.save(model, tmp_path / "model.safetensors", [])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoints.save(model, tmp_path / "nowhere" / "model.safetensors")
    assert not list(tmp_path.iterdir())
