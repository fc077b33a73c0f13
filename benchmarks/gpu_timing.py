"""Times work on a GPU: cold second-level cache, CUDA events, CUDA graphs. On a CPU, to try the script, a clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

SECONDS = 0.4  # of repetitions
LEAST, MOST = 10, 200  # repetitions
FLUSHED = 256 * 2**20  # bytes written between runs; more than any second-level cache


class Timer:
    """Repeats work and returns median and spread in microseconds."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.gpu = device == "cuda"
        self.flushed = torch.empty(FLUSHED if self.gpu else 1, dtype=torch.int8, device=device)

    def __call__(self, function: Callable[[], Any]) -> dict[str, Any]:
        """Median, 10th and 90th percentile of one run; on a GPU as a CUDA graph, so without the CPU's time."""
        for _ in range(3):
            function()
        note = {}
        if self.gpu:
            function, note = self._captured(function)
        first = self._once(function)
        rounds = max(LEAST, min(MOST, int(SECONDS * 1e6 / max(first, 1.0)))) if self.gpu else 2
        times = sorted(self._once(function) for _ in range(rounds))
        return {
            "us": round(statistics.median(times), 1),
            "p10": round(times[len(times) // 10], 1),
            "p90": round(times[-1 - len(times) // 10], 1),
            "runs": len(times),
            **note,
        }

    def _captured(self, function: Callable[[], Any]) -> tuple[Callable[[], Any], dict[str, str]]:
        graph = torch.cuda.CUDAGraph()
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                function()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                function()
        except RuntimeError as error:  # torch.compile's own graphs, for example: timed uncaptured, with a note
            torch.cuda.synchronize()
            return function, {"not_captured": str(error).splitlines()[0][:200]}
        return graph.replay, {}

    def _once(self, function: Callable[[], Any]) -> float:
        self.flushed.zero_()
        if not self.gpu:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def peak_memory(self, function: Callable[[], Any]) -> float | None:
        """Peak megabytes allocated by `function` above what was allocated before; None on a CPU."""
        if not self.gpu:
            return None
        function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def ceilings(timer: Timer) -> dict[str, float]:
    """What this GPU reaches: terabytes per second read and written by a copy, teraflops of a large bfloat16 product."""
    source = torch.empty((2**30 if timer.gpu else 2**20) // 2, dtype=torch.bfloat16, device=timer.device)
    target = torch.empty_like(source)
    copy = timer(lambda: target.copy_(source))["us"]
    side = 8192 if timer.gpu else 128
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=timer.device) for _ in range(2))
    product = timer(lambda: a @ b)["us"]
    return {
        "terabytes_per_second": float(f"{2 * source.numel() * 2 / copy / 1e6:.4g}"),
        "bfloat16_teraflops": float(f"{2 * side**3 / product / 1e6:.4g}"),
    }
