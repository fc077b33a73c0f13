"""How every command ends: what it cannot print, a signal, a full disk and a lack of memory are no traceback."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

import click

from ..compat import lacks_memory
from . import options

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # those that exist here end a command as Ctrl-C does
AGAIN = 10.0  # seconds after which an interrupt that was swallowed, as Python does in destructors, is raised again


class Commands(click.Group):
    """The group of all commands."""

    def main(self, *arguments: Any, **keywords: Any) -> Any:
        _prepare_streams()
        try:
            try:
                return super().main(*arguments, **keywords)
            finally:
                sys.stdout.flush()  # now, not at Python's own end
        except OSError as error:
            _discard_output()
            if error.errno == errno.EPIPE:  # the reader, such as `head`, has seen enough
                sys.exit(options.FAILED)
            if error.filename is None:
                error = OSError(f"cannot write the output: {error.strerror or error}.")
            options.fail(error, options.FAILED)

    def invoke(self, context: click.Context) -> Any:
        options.stopping.clear()
        with _signals_like_ctrl_c():
            try:
                return super().invoke(context)
            except KeyboardInterrupt:
                _stop()
            except (MemoryError, RuntimeError) as error:
                if not lacks_memory(error) and not isinstance(error, RecursionError):
                    raise
                options.fail(error, options.FAILED)


def _prepare_streams() -> None:
    """Letters that the terminal does not have are written as escapes, and closed streams swallow everything."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, for the rest of the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Python flushes stdout once more at its end; it must not fail there again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _no_alarm() -> None:
    if options.stopping.is_set() and hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


def _stop() -> NoReturn:
    _no_alarm()
    with suppress(ValueError):  # not in the main thread
        for name in SIGNALS[:2]:
            signal.signal(getattr(signal, name), signal.SIG_IGN)  # an impatient second Ctrl-C
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        click.echo("ovseg-fast: stopped.", err=True)
    sys.exit(options.STOPPED)


@contextmanager
def _signals_like_ctrl_c() -> Iterator[None]:
    """They raise KeyboardInterrupt, so that nothing stays half-written. Ignored ones (`nohup`) stay ignored."""
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner and number != signal.SIGINT:  # a worker process ends as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        options.stopping.set()
        if os.getpid() == owner and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report each worker that stops too
        if os.getpid() == owner and hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only the main thread may handle signals
    before = {number: signal.getsignal(number) for number in numbers}
    changed = [number for number, old in before.items() if old in (signal.SIG_DFL, signal.default_int_handler)]
    for number in changed:
        signal.signal(number, stop)
    try:
        yield
    finally:
        _no_alarm()
        for number in changed:
            signal.signal(number, before[number])
