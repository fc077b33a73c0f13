"""The CUDA C++ kernels under NVIDIA's tools, if installed: compute-sanitizer and Nsight Compute.

python benchmarks/gpu_checks.py OPERATOR     runs the operator once at its published size, to be profiled
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 240  # limit for one run of a tool
LARGEST = ("spatial_aggregation", "class_aggregation")
METRICS = {
    "duration": "gpu__time_duration.sum",
    "tensor_core_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "memory_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "shared_percent": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}


def sanitize_kernels() -> dict[str, str]:
    """Run memcheck and racecheck on the small rows of every operator with CUDA C++ kernels: tool -> its last line."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return {"not run": "compute-sanitizer is not on PATH"}
    found = {}
    for tool in ("memcheck", "racecheck"):
        output = _output(
            sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x",
            "tests/test_kernels.py", "-k", "follows and cuda and small",
        )  # fmt: skip
        summary = re.findall(r"=+ (ERROR SUMMARY.*|RACECHECK SUMMARY.*)", output)
        found[tool] = summary[-1] if summary else output.strip()[-300:]
    return found


def profile_kernels() -> dict[str, Any]:
    """Nsight Compute's measurements of the largest kernels: operator -> metric -> value as printed."""
    profiler = shutil.which("ncu")
    if profiler is None:
        return {"not run": "ncu is not on PATH"}
    found: dict[str, Any] = {}
    for operator in LARGEST:
        output = _output(
            profiler, "--csv", "--kernel-name", f"regex:.*{operator}.*", "--launch-count", "1",
            "--metrics", ",".join(METRICS.values()), sys.executable, __file__, operator,
        )  # fmt: skip
        values = {
            name: re.search(rf'"{re.escape(metric)}","[^"]*","([^"]*)"', output) for name, metric in METRICS.items()
        }
        found[operator] = {name: match[1] for name, match in values.items() if match} or output.strip()[-300:]
    return found


def _output(*command: str) -> str:
    try:
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS,
            env={**os.environ, "OVSEG_BACKEND": "auto"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"stopped after {SECONDS} seconds"
    return run.stdout + run.stderr


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    import ovseg_fast as ovs
    from samples import select

    row = next(row for row in select("bench", operator=sys.argv[1]) if "171" in row.name)
    arguments, keywords = row.build(torch.Generator().manual_seed(0), torch.bfloat16, "cuda")
    with torch.no_grad(), ovs.backend("cuda"):
        getattr(ovs.ops, row.function)(*arguments, **keywords)
    torch.cuda.synchronize()
