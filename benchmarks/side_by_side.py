"""Two forms of one computation in one process: checked to be equal, then timed by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tolerances import REWRITE_FLOAT32, relative_error

Form = Callable[[], Tensor]


def speedup(benchmark: Any, literal: Form, rewritten: Form, rounds: int) -> float:
    """Time literal and rewritten by turns; returns the ratio of their medians."""
    literal_times: list[float] = []

    def time_literal() -> None:
        start = time.perf_counter()
        literal()
        literal_times.append(time.perf_counter() - start)

    with torch.inference_mode():
        error = relative_error(rewritten(), literal())
        assert error <= REWRITE_FLOAT32
        benchmark.pedantic(rewritten, setup=time_literal, rounds=rounds, warmup_rounds=1)
    literal_median = statistics.median(literal_times)
    ratio = literal_median / benchmark.stats["median"]
    benchmark.extra_info.update(
        literal_median=round(literal_median, 4),
        speedup=round(ratio, 2),
        relative_error=error,
        threads=torch.get_num_threads(),
    )
    return ratio
