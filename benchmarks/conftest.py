"""Benchmarks: a seed for each, and results reduced to what a reader needs."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch

STATISTICS = ("median", "iqr", "min", "max", "rounds")


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Keep machine, versions, commit and times (seconds); drop host names and raw samples."""
    machine, commit = output_json["machine_info"], output_json["commit_info"]
    results = [
        {
            "name": benchmark["name"],
            "group": benchmark["group"],
            **{name: round(benchmark["stats"][name], 6) for name in STATISTICS},
            **benchmark["extra_info"],
        }
        for benchmark in output_json["benchmarks"]
    ]
    output_json.clear()
    output_json.update(
        machine={"cpu": machine["cpu"].get("brand_raw", machine["processor"]), "threads": torch.get_num_threads()},
        python=machine["python_version"],
        torch=torch.__version__,
        commit=commit["id"],
        uncommitted_changes=commit["dirty"],
        seconds=results,
    )
