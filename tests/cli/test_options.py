"""What is known before a model is built."""

from __future__ import annotations

import pytest

import ovseg_fast as ovs
from ovseg_fast.cli import options


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovseg_fast.segmenter.load", lambda *arguments, **keywords: pytest.fail("a model was built"))


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize("device", ["warp", "mps", "meta", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_before_the_model_is_built(device: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=f"^device must be .*'{device}'"):
        options.load_model("catseg-tiny", "random", device)


@pytest.mark.usefixtures("unbuilt", "on_cpu")
def test_a_backend_that_cannot_run_is_refused_before_the_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ovs.backend("triton"), pytest.raises(RuntimeError, match="the triton backend was asked for but cannot run"):
        options.load_model("catseg-tiny", "random", None)
