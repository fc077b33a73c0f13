"""Pieces of a call on several threads: the same results, state and errors, and no trace in the caller's settings."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

import ovseg_fast as ovs
from ovseg_fast import backends
from ovseg_fast.layers.cost_aggregator import CostAggregator
from ovseg_fast.ops import Placement, label_map, score_map, top_labels
from ovseg_fast.ops.common.threads import run_pieces, threads_for
from tolerances import REWRITE_FLOAT32, relative_error


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with torch.no_grad(), ovs.backend("torch"):
        yield
    torch.set_num_threads(before)


def in_a_new_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def thread_counts() -> set[str]:
    """What PyTorch, OpenMP and MKL each take for the threads of this thread's operations."""
    return set(re.findall(r"(?:get_num_threads|max_threads)\(\) : (\d+)", torch.__config__.parallel_info()))


def test_each_piece_has_one_thread_and_the_callers_setting_stays() -> None:
    together = threading.Barrier(3)

    def piece(_: int) -> tuple[int, set[str], int]:
        together.wait(30)
        return threading.get_ident(), thread_counts(), in_a_new_thread(torch.get_num_threads)

    found = run_pieces(piece, range(3), 3)
    assert len({ident for ident, *_ in found} - {threading.get_ident()}) == 3
    assert all(counts == {"1"} for _, counts, _ in found)
    assert all(new == 3 for *_, new in found)
    assert thread_counts() == {"3"} == in_a_new_thread(thread_counts)


def test_the_callers_state_is_that_of_the_pieces() -> None:
    def state(_: int) -> tuple:
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, backends.requested()

    def all_states() -> set[tuple]:
        return set(run_pieces(state, range(8), 3))

    plain = (False, False, False, torch.bfloat16, "torch")
    assert all_states() == {plain}
    with torch.inference_mode(), torch.autocast("cpu", torch.float16), ovs.backend("auto"):
        assert all_states() == {(False, True, True, torch.float16, "auto")}
    assert all_states() == {plain}  # nothing of it stays


def test_results_come_in_order_and_errors_as_they_are() -> None:
    assert run_pieces(lambda index: index * index, range(50), 3) == [index * index for index in range(50)]
    error, begun = KeyError("own"), []

    def fail(index: int) -> None:
        begun.append(index)
        if index == 1:
            raise error
        time.sleep(0.01)

    with pytest.raises(KeyError) as caught:
        run_pieces(fail, range(1000), 3)
    assert caught.value is error
    assert len(begun) < 20
    assert run_pieces(abs, [-1, -2], 3) == [1, 2]  # the threads live on


def test_ctrl_c_ends_the_call_and_all_that_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    begun: list[int] = []

    def piece(index: int) -> None:
        begun.append(index)
        if index == 5:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    try:
        with pytest.raises(KeyboardInterrupt):
            run_pieces(piece, range(10_000), 3)
    finally:
        signal.signal(signal.SIGINT, before)
    count = len(begun)
    time.sleep(0.1)
    assert len(begun) == count < 1000


def test_where_only_the_callers_thread_will_do() -> None:
    x = torch.rand(3)
    assert threads_for(x) == 3
    with torch.enable_grad():
        assert threads_for(x) == 1
    with torch.overrides.BaseTorchFunctionMode():
        assert threads_for(x) == 1
    with torch.autograd.profiler.profile():
        assert threads_for(x) == 1
    assert threads_for(x, x.to("meta")) == 1
    counts: list[int] = []

    def seen(row: torch.Tensor) -> torch.Tensor:
        counts.append(threads_for(row))
        return row + 1

    torch.vmap(seen)(x.view(1, 3))
    torch.jit.trace(seen, x, check_trace=False)
    assert counts and set(counts) == {1}
    assert run_pieces(lambda _: threads_for(x), range(4), 3) == [1] * 4  # no threads within threads


SIZES: dict[str, Any] = {"channels": 32, "guidance": 16, "heads": 2, "window": 6, "pad_length": 64, "layers": 2}
DECODER: dict[str, Any] = {"decoder_appearance": (8, 8), "decoder_guidance": (8, 4), "decoder_channels": (32, 16)}


def head(classes: int = 23) -> tuple[CostAggregator, tuple[Any, ...]]:
    aggregator = CostAggregator(embed_dim=12, prompts=1, **SIZES, **DECODER).eval()
    inputs = torch.randn(1, 12, 12, 12), torch.randn(classes, 1, 12)
    return aggregator, (*inputs, [torch.randn(1, 24, 24, 8), torch.randn(1, 48, 48, 8)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_the_same_bit_by_bit(dtype: torch.dtype) -> None:
    aggregator, (image, text, appearance, pooling) = head()
    arguments = image.to(dtype), text.to(dtype), [maps.to(dtype) for maps in appearance], pooling
    aggregator.to(dtype)
    several = [aggregator(*arguments) for _ in range(2)]
    torch.set_num_threads(2)
    several.append(aggregator(*arguments))
    torch.set_num_threads(1)
    alone = aggregator(*arguments)
    assert all(torch.equal(alone, logits) for logits in several)


def test_hooks_run_in_the_callers_thread_and_in_order() -> None:
    aggregator, arguments = head()
    seen: list[tuple[int, int]] = []
    expected = aggregator(*arguments)
    stage = aggregator.decoder.stages[0]
    stage.register_forward_hook(lambda _, inputs, __: seen.append((threading.get_ident(), inputs[0].shape[1])))
    assert relative_error(aggregator(*arguments), expected) <= REWRITE_FLOAT32  # other bits: its operations split
    assert {ident for ident, _ in seen} == {threading.get_ident()} and len(seen) > 1


@pytest.mark.parametrize("k", [0, 1, 3])
def test_labels_are_the_same_bit_by_bit(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("ovseg_fast.ops.label_map"), "CHUNK_ELEMENTS", 1000)  # two classes
    logits = torch.randn(2, 21, 6, 6).mul(2).round()  # with ties
    logits[0, 4, 2], logits[1, 9, 1], logits[1, 12] = torch.nan, torch.inf, torch.nan
    place = Placement([(0, 0), (0, 4)], (12, 12), (12, 16), (15, 20))
    whole, offset = torch.randn(1, 21, 6, 6).round(), torch.zeros(21)
    given = {"whole": whole, "offset": offset}

    def call() -> list[torch.Tensor]:
        if k == 0:
            return [score_map(logits, place, **given), label_map(logits, place)]
        return [*top_labels(logits, place, k=k, **given), label_map(logits, place)]

    several = call()
    torch.set_num_threads(1)
    for found, expected in zip(several, call(), strict=True):
        assert torch.equal(found.nan_to_num(123), expected.nan_to_num(123))
        assert torch.equal(found.isnan(), expected.isnan())


def test_calls_from_several_threads_at_once() -> None:
    aggregator, arguments = head()
    expected = aggregator(*arguments)
    found: list[torch.Tensor] = []

    def work() -> None:
        with torch.no_grad(), ovs.backend("torch"):
            found.extend(aggregator(*arguments) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30 and all(torch.equal(logits, expected) for logits in found)


SCRIPT = """
import atexit, os, signal, torch
from ovseg_fast.ops.common.threads import run_pieces
torch.set_num_threads(2)
square = lambda index: index * index
expected = [square(index) for index in range(9)]
if {first}:
    assert run_pieces(square, range(9), 2) == expected
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(run_pieces(square, range(9), 2) != expected)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
atexit.register(lambda: print(run_pieces(square, range(9), 2) == expected))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("first", [True, False])
def test_in_a_fork_and_as_the_interpreter_ends(first: bool) -> None:
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", SCRIPT.format(first=first)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout) == (0, "True\n"), run.stderr
