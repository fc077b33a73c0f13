"""The machine on which a figure was measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import ovseg_fast as ovs
from ovseg_fast import native

ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """The machine and what else it has to do, versions and commit."""
    models = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "instruction_set": None if native.problem("cpu") else native.isa(),
        "kernels": [name for name, choice in ovs.explain("cpu").choices.items() if choice == "cpu"],
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": bool(_git("status", "--porcelain")),
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
