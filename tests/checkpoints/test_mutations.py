"""Damaged files of every kind, at random: the small form of `make torture`."""

from __future__ import annotations

import random

import pytest
from torture import mutations


def test_damaged_files_are_refused_or_read_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutations.main(states=60, checkpoints=240, seed=random.randrange(2**31)) == 0, capsys.readouterr().out


def test_the_count_sees_what_is_read_as_other_numbers(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("ovseg_fast.checkpoints.pickles.check_archive", lambda path: None)
    assert mutations.main(states=0, checkpoints=200, seed=0) == 1
    zipped = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("PyTorch, zipped"))
    assert int(zipped.split()[-1]) > 0
