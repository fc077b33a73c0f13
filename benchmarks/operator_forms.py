"""An operator and its literal form on one row of `tests/samples`: checked to be equal, then timed in one group."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from counterparts import counterpart, decoder_stage
from ovseg_fast import ops
from samples import Draw, Sample, arguments, tensors
from tolerances import ARGMAX_AGREEMENT, REWRITE_FLOAT32, relative_error

Forms = dict[str, Callable[[], Any]]
SECONDS = 1.0  # for all rounds of one form; at least three rounds


def compare(benchmark: Any, row: Sample, form: str) -> None:
    """Time one form of a row, after checking that both agree."""
    with torch.inference_mode():
        forms, seconds, error = checked_forms(row)
        rounds = max(3, min(50, int(SECONDS / seconds[form])))
        benchmark.group = row.id
        benchmark.extra_info.update(relative_error=error, threads=torch.get_num_threads())
        benchmark.pedantic(forms[form], rounds=rounds, warmup_rounds=1)


@lru_cache(maxsize=1)  # for the other form, which comes next
def checked_forms(row: Sample) -> tuple[Forms, dict[str, float], float]:
    """Both forms on the same float32 inputs, seconds of a first run of each, and their relative error."""
    draw = Draw(torch.Generator().manual_seed(zlib.crc32(row.id.encode())), torch.float32, "cpu")
    call = row.builder(draw)
    if row.function == "upsampling_decoder":
        forms, to_ours = decoder_forms(arguments(row.function, call), draw)
    else:
        literal = counterpart(row.function, call)
        forms, to_ours = {"literal": literal.run, "operator": lambda: row.run(call)}, literal.to_ours

    results, seconds = {}, {}
    for name, run in forms.items():
        start = time.perf_counter()
        results[name] = run()
        seconds[name] = time.perf_counter() - start
    expected = to_ours(results["literal"])
    if row.function == "label_map":
        error = float((results["operator"] != expected).float().mean())
        assert error <= 1 - ARGMAX_AGREEMENT
    else:
        pairs = zip(tensors(results["operator"]), tensors(expected), strict=True)
        error = max(relative_error(result, truth) for result, truth in pairs)
        assert error <= REWRITE_FLOAT32
    return forms, seconds, error


def decoder_forms(named: dict[str, Any], draw: Draw) -> tuple[Forms, Callable[[Any], Any]]:
    """A stage from projected guidance on; computing the guidance term is part of the work."""
    x, term, groups = named.pop("x"), named.pop("term"), named.pop("groups")
    up = named["up_weight"].shape[1]
    guidance = draw(*term.shape[:-1], named["conv1_weight"].shape[1] - up)
    up_bias = 0.1 * draw(up)
    literal = decoder_stage(x, guidance, up_bias=up_bias, **named)

    def operator() -> torch.Tensor:
        shared = ops.guidance_term(guidance, up_bias, named["conv1_weight"])
        return ops.upsampling_decoder(x, shared, **named, groups=groups)

    return {"literal": literal.run, "operator": operator}, literal.to_ours
