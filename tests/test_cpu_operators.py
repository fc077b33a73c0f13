"""The benchmark of the CPU kernels: it runs and reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "cpu_operators.py"


def test_it_times_every_form(tmp_path: Path) -> None:
    out = tmp_path / "operators.json"
    run = subprocess.run([sys.executable, SCRIPT, "--smoke", "--out", out], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text())
    assert {"cpu", "threads", "load_before", "torch", "commit", "instruction_set"} <= found["machine"].keys()
    assert found["product_gflops"].keys() == {"float32", "bfloat16"}
    rows = {name: row for name, row in found.items() if ", " in name}
    assert len(rows) == len(run.stdout.splitlines()) - 1 == 2
    assert found["many names"].keys() == {"100% shared", "50% shared", "0% shared"}
    for name, row in rows.items():
        literal = {"literal"} if name.endswith("float32") else set()
        assert row["seconds"].keys() == row["errors"].keys() == {"torch", "kernel"} | literal
        assert row["gain_over_torch"] > 0 < row["kernel_gflops"]
