"""The benchmark beside a busy process: it runs, reports, and leaves no process behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from busy_neighbour import busy_neighbour

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no process can be bound to a core here")
SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "busy_neighbour.py"


def test_it_measures_every_work_and_form(tmp_path: Path) -> None:
    out = tmp_path / "busy.json"
    run = subprocess.run([sys.executable, SCRIPT, "--smoke", "--out", out], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 4
    found = json.loads(out.read_text())
    assert {"cpu", "threads", "load_before", "torch", "commit"} <= found["machine"].keys()
    for work in ("head", "model"):
        for form in ("torch", "cpu"):
            row = found["3 classes"][work][form]
            assert row["alone"]["median"] > 0 < row["disturbed"]["median"] and row["times_slower"] > 0


def test_the_neighbour_is_busy_and_always_ended() -> None:
    with pytest.raises(ZeroDivisionError), busy_neighbour() as process:
        assert process.poll() is None
        assert os.sched_getaffinity(process.pid) == {min(os.sched_getaffinity(0))}
        raise ZeroDivisionError
    assert process.returncode is not None


def test_a_neighbour_whose_parent_is_killed_ends_by_itself() -> None:
    script = "from busy_neighbour import busy_neighbour; import os\nwith busy_neighbour(): os.abort()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parent.parent)])}
    # It shares the standard error, which is read to its end: until the neighbour, too, has ended.
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, timeout=60, check=False
    )
    assert run.returncode < 0
