"""What stops loading: a device, a package or weights that are not there; one sentence, before anything is built."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import ovseg_fast as ovs
from ovseg_fast import compat, segmenter, vocabulary
from ovseg_fast.cli import main


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmenter, "build", None)


@pytest.mark.parametrize(
    ("device", "error", "words"),
    [
        ("meta", ValueError, "one that computes"),
        ("tpu9", ValueError, "must be a PyTorch device"),
        ("", ValueError, "must be a PyTorch device"),
        (1.5, ValueError, "must be a PyTorch device"),
        ("hpu", RuntimeError, "one that PyTorch finds here"),
        ("vulkan", RuntimeError, "one that PyTorch finds here"),
        ("xpu:3", RuntimeError, "one that PyTorch finds here"),
        ("cuda:99", RuntimeError, "device must be"),
    ],
)
def test_devices_that_are_not_there(device: Any, error: type[Exception], words: str, nothing_built: None) -> None:
    with pytest.raises(error, match=words) as caught:
        ovs.load("catseg-tiny", device=device)
    assert str(device) in str(caught.value) and str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_more_gpus_than_there_are(nothing_built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, there in ((1, "'cuda:0' is the only GPU"), (2, "the GPUs are 'cuda:0' to 'cuda:1'")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(RuntimeError, match=rf"{there}, got 'cuda:7'\.$"):
            ovs.load("catseg-tiny", device="cuda:7")


@pytest.mark.parametrize("weights", [True, 3, b"model.pth", ["model.pth"], {"a": 1}])
def test_weights_of_another_type(weights: Any, nothing_built: None) -> None:
    with pytest.raises(TypeError, match="weights must be 'published', a file or None, got"):
        ovs.load("catseg-tiny", weights=weights)


def test_weights_that_are_no_file(tmp_path: Path, nothing_built: None) -> None:
    for weights in ("publishd", "", tmp_path, "random.pth"):
        with pytest.raises(FileNotFoundError, match="weights must be a checkpoint file, there is none at"):
            ovs.load("catseg-tiny", weights=weights)


@pytest.fixture
def no_tokenizer() -> Any:
    vocabulary._tokenizer.cache_clear()
    yield
    vocabulary._tokenizer.cache_clear()


@pytest.mark.parametrize("command", [["segment", __file__, "-c", "a, b"], ["demo"]])
@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("open_clip", "CLIP needs open_clip_torch: pip install open_clip_torch"),
        ("torchvision", "CLIP needs torchvision: pip install torchvision"),
    ],
)
def test_a_missing_package_is_named(
    module: str, sentence: str, command: list[str], no_tokenizer: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=sentence):
        ovs.load("catseg-tiny")
    with pytest.raises(ImportError, match=sentence):
        vocabulary.tokenize([["a cat"]])
    result = CliRunner().invoke(main, [*command, "-m", "catseg-tiny", "-o", str(tmp_path / "out")])
    assert (result.exit_code, result.output) == (2, f"ovseg-fast: {sentence}\n")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package open_clip that is found instead of the real one."""
    loaded = {key: module for key, module in sys.modules.items() if key.partition(".")[0] == "open_clip"}
    for key in loaded:
        del sys.modules[key]
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "version.py").write_text("__version__ = '2.20.0'")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "open_clip" / "__init__.py"
    for key in [key for key in sys.modules if key.partition(".")[0] == "open_clip"]:
        del sys.modules[key]
    sys.modules.update(loaded)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "CLIP needs open_clip_torch 2.29 or newer, got 2.20.0: pip install -U open_clip_torch"),
        ("raise AttributeError('no pool\\n in it.')", "which is here but cannot be imported: no pool in it."),
        (
            "import no_such_package",
            "CLIP needs no_such_package, which open_clip_torch uses: pip install no_such_package",
        ),
        ("from os import no_such_name", "which is here but cannot be imported: cannot import name 'no_such_name'"),
    ],
)
def test_a_package_that_is_old_or_broken(text: str, sentence: str, stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "ensure_importable", lambda: None)
    stub.write_text(text)
    with pytest.raises(ImportError) as caught:
        compat.open_clip()
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_torchvision_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(compat, "ensure_importable", fail)
    with pytest.raises(
        ImportError, match=r"torchvision, which is here but cannot be imported: libcudart\.so\.12: .*\.$"
    ):
        compat.open_clip()


def test_require_imports_what_is_there() -> None:
    assert isinstance(compat.require("json", "json", "this"), types.ModuleType)
    assert importlib.util.find_spec("no_such_package") is None
    with pytest.raises(ImportError, match=r"^this needs a-package: pip install a-package$"):
        compat.require("no_such_package.part", "a-package", "this")
