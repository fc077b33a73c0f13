"""Pieces of one call on several threads, one thread to each piece.

Inside an operation PyTorch splits the work among its threads, which meet at its end. A call of thousands of operations
meets as often, and every meeting waits for the thread that another process has pushed off its core. Here the threads
meet once a call: each takes the next piece when it is done with one, and runs the piece's operations by itself.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ... import backends

Piece = TypeVar("Piece")
Result = TypeVar("Result")

MOST_THREADS = 256  # of all calls together


def threads_for(*tensors: Tensor) -> int:
    """On how many threads pieces of a call that reads these tensors run: `torch.get_num_threads()`, or 1 where only the
    calling thread may see the operations or the tensors are not ordinary ones on the CPU."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return 1
    if any(tensor.device.type != "cpu" or type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors):
        return 1
    watched = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    watched = watched or torch._C._len_torch_dispatch_stack() > 0 or torch._C._len_torch_function_stack() > 0
    watched = watched or torch._C._is_tracing() or torch._C._autograd._profiler_enabled()
    return 1 if watched else torch.get_num_threads()


def run_pieces(function: Callable[[Piece], Result], pieces: Sequence[Piece], threads: int) -> list[Result]:
    """`[function(piece) for piece in pieces]` on so many threads, in the grad and inference mode, the autocast state
    and under the backend of the caller.

    The function may expect neither the caller's thread nor an order. After an error no further piece is begun; of
    several, that of the first piece is raised.
    """
    runners = min(threads, len(pieces))
    if runners < 2 or not _can_split():
        return [function(piece) for piece in pieces]
    results: list[Any] = [None] * len(pieces)
    errors: dict[int, BaseException] = {}
    order = iter(range(len(pieces)))  # threads may take the next of it at once
    state, stopped = _state(), False

    def run() -> None:
        with state():
            for index in order:
                if stopped or errors:
                    return
                try:
                    results[index] = function(pieces[index])
                except BaseException as error:
                    errors[index] = error

    running: list[Future[None]] = []
    try:
        try:
            for _ in range(runners):
                running.append(_pool().submit(run))
        except RuntimeError:  # no further thread can be started: the limit is reached, or the interpreter is ending
            run()
        for runner in running:
            runner.result()
    finally:
        stopped = True  # after Ctrl-C nothing that this call began goes on behind its back
        for runner in running:
            if not runner.cancel():
                runner.exception()
    if errors:
        raise errors[min(errors)]
    return results


def _state() -> Callable[[], Any]:
    """What is set for the calling thread alone, as a context for others."""
    inference, forced, autocast = torch.is_inference_mode_enabled(), backends.requested(), _autocast()

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.no_grad())
            stack.enter_context(backends.backend(forced))
            # Not torch.autocast: at its end it would empty the cache of weights that all threads share.
            stack.callback(_set_autocast, *_autocast())
            _set_autocast(*autocast)
            yield

    return entered


def _autocast() -> tuple[bool, torch.dtype, bool]:
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()


def _set_autocast(enabled: bool, dtype: torch.dtype, cache_enabled: bool) -> None:
    torch.set_autocast_enabled("cpu", enabled)
    torch.set_autocast_dtype("cpu", dtype)
    torch.set_autocast_cache_enabled(cache_enabled)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="ovseg", initializer=_run_alone)


@cache
def _can_split() -> bool:
    """Whether a thread can be kept from splitting its operations without a change to the process's own setting."""
    try:
        return _pool().submit(_run_alone).result()
    except RuntimeError:  # no thread can be started
        return False


def _run_alone() -> bool:
    """Let operations of this thread run on it alone; returns whether that is so now.

    Not torch.set_num_threads(1): it also becomes the setting of threads that start later, the user's among them.
    """
    torch.get_num_threads()  # a thread's first call takes over the process's setting
    for library in _libraries():
        if hasattr(library, "omp_set_num_threads"):
            library.omp_set_num_threads(1)
        if hasattr(library, "MKL_Set_Num_Threads_Local"):
            library.MKL_Set_Num_Threads_Local(1)
    return torch.get_num_threads() == 1


@cache
def _libraries() -> list[ctypes.CDLL]:
    """Where PyTorch's OpenMP and MKL may be found: among what the process sees, and in PyTorch's own library."""
    if os.name != "posix":
        return []
    core = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    return [ctypes.CDLL(None), *([ctypes.CDLL(core)] if os.path.exists(core) else [])]


def _forget_pool() -> None:
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # a child has none of its parent's threads
