"""Downloads with and without a network, and weights made up for upstream."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants

import ovseg_fast as ovs
from checkpoints.common import STATE, assert_same, build_empty
from ovseg_fast import checkpoints, compat
from ovseg_fast.cli import main
from parity import make_weights


def run_download(home: Path, **environment: str) -> str:
    """What `download("catseg-vitb")` gives in a fresh process, whose hub settings are read at import."""
    code = """
        import logging, time
        logging.basicConfig()  # as many programs do: the hub's own lines would come twice
        time.sleep = None  # nothing is tried again later
        from ovseg_fast import checkpoints
        try:
            print("path", checkpoints.download("catseg-vitb"))
        except OSError as error:
            print(type(error).__name__, error)
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    kept = {key: value for key, value in kept.items() if not key.lower().endswith("_proxy")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=kept | {"HF_HOME": str(home)} | environment,
        cwd=tempfile.gettempdir(),  # from the repository root, Python would import its folders
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout.strip()


OFFLINE = {"HF_HUB_OFFLINE": "1"}
NO_NETWORK = {"HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.mark.parametrize("environment", [OFFLINE, NO_NETWORK], ids=["offline", "no network"])
def test_download_without_network_says_so_in_one_sentence(tmp_path: Path, environment: dict[str, str]) -> None:
    output = run_download(tmp_path, **environment)
    assert len(output.splitlines()) == 1
    assert output.startswith("ConnectionError cannot download model_base.pth, the weights of catseg-vitb")
    assert "https://huggingface.co/spaces/hamacojr/CAT-Seg-weights" in output
    assert 'weights="model_base.pth"' in output
    assert ("HF_HUB_OFFLINE is set" in output) == (environment is OFFLINE)


@pytest.mark.parametrize("environment", [OFFLINE, NO_NETWORK], ids=["offline", "no network"])
def test_download_uses_the_cached_file_without_network(tmp_path: Path, environment: dict[str, str]) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "spaces--hamacojr--CAT-Seg-weights"
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    blob, pointer = repository / "blobs" / "abc", repository / "snapshots" / commit / "model_base.pth"
    torch.save({"model": STATE}, blob)
    pointer.symlink_to(Path("../../blobs/abc"))
    kind, _, path = run_download(tmp_path, **environment).partition(" ")
    assert kind == "path" and Path(path) == pointer
    assert_same(checkpoints.read(path)[0], STATE)


def test_the_advice_is_of_the_interface_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(ConnectionError, match=r'and weights="model_base\.pth" loads a copy on disk\.$'):
        ovs.load("catseg-vitb")
    result = CliRunner().invoke(main, ["segment", __file__, "-c", "a, b", "-m", "catseg-vitb"])
    assert result.exit_code == 2
    assert "and --weights model_base.pth loads a copy on disk." in result.output
    assert result.output.count("\n") == 1
    for weights, words in (
        ("published", "--weights FILE loads a file, --weights random gives random weights."),
        ("publishd", "--weights must be a checkpoint file, `published` or `random`; there is no file 'publishd'."),
    ):
        arguments = ["segment", __file__, "-c", "a, b", "-m", "cascade-clip-vitb", "-w", weights]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2 and words in result.output and result.output.count("\n") == 1
    with pytest.raises(ValueError, match=r'weights="FILE" loads a file, weights=None gives random weights\.$'):
        ovs.load("cascade-clip-vitb")


@pytest.mark.parametrize("status", [403, 500, None])
def test_the_hub_is_asked_once_and_its_first_answer_is_given(
    status: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compat.open_clip()  # it keeps its own hf_hub_download
    asked: list[float] = []

    def ask(url: str, *, timeout: float) -> None:
        asked.append(timeout)
        error = OSError("the proxy says no\nand more")
        error.response = status and SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(ConnectionError, match=r"weights of catseg-vitb \(the proxy says no\); they are"):
        checkpoints.download("catseg-vitb")
    assert asked == [5.0]
    with pytest.raises(ConnectionError, match=r"CLIP's weights 'openai' \(the proxy says no\); a file of the same"):
        ovs.build("catseg-vitb", clip_pretrained="openai")
    assert asked == [5.0, 5.0]
    with pytest.raises(ValueError, match=r"clip_pretrained must be a file or one of openai, .*, got 'opnai'"):
        ovs.build("catseg-vitb", clip_pretrained="opnai")


def test_presets_without_published_weights() -> None:
    with pytest.raises(ValueError, match=r"no weights of cascade-clip-vitb \(its authors share weights elsewhere\)"):
        checkpoints.download("cascade-clip-vitb")
    with pytest.raises(ValueError, match="no weights of cascade-clip-vitb-voc"):
        checkpoints.download("cascade-clip-vitb-voc")
    with pytest.raises(ValueError, match="name must be one of catseg-vitb"):
        checkpoints.download("catseg-vits")


@pytest.mark.slow
def test_make_weights_writes_what_upstream_would(tmp_path: Path) -> None:
    path = tmp_path / "made_up.pth"
    command = [sys.executable, make_weights.__file__, "catseg-vitb", str(path), "--seed-salt", "Z"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tempfile.gettempdir())
    assert "MADE-UP" in result.stdout
    content = torch.load(path, weights_only=True, mmap=True)
    assert list(content) == ["model"]
    assert {key: tuple(tensor.shape) for key, tensor in content["model"].items()} == make_weights.shapes("catseg-vitb")
    assert not torch.equal(content["model"]["upsample1.bias"], make_weights.state_dict("catseg-vitb")["upsample1.bias"])
    checkpoints.load(build_empty("catseg-vitb"), path)


def test_make_weights_refuses_an_unknown_folder_and_preset(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(make_weights, "state_dict", lambda preset, salt: STATE)
    for arguments in (["catseg-vitx", "a.pth"], ["catseg-vitb", str(tmp_path / "nowhere" / "a.pth")]):
        monkeypatch.setattr(sys, "argv", ["make_weights.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            make_weights.main()
        assert caught.value.code == 2
    assert "cannot write" in capsys.readouterr().err
