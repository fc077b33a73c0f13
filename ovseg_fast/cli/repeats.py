"""Warnings that come again for every image are shown once, with their number."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import click


class _First(logging.Handler):
    """Passes the first warning of each kind on, that is, of each sentence with open places, and counts the others."""

    def __init__(self, handlers: list[logging.Handler]) -> None:
        super().__init__()
        self.handlers = handlers
        self.first: dict[str, str] = {}
        self.more: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        kind = str(record.msg)
        if record.levelno == logging.WARNING and kind in self.first:
            self.more[kind] += 1
            return
        if record.levelno == logging.WARNING:
            self.first[kind] = record.getMessage()
        for handler in self.handlers:
            if record.levelno >= handler.level:
                handler.handle(record)


@contextmanager
def counted_warnings() -> Iterator[None]:
    """In this block the log shows the first warning of each kind; at its end, how many more there were.

    With --verbose all are shown. PIL's own warnings, about metadata, are not.
    """
    context = click.get_current_context(silent=True)
    root = logging.getLogger()
    handlers = root.handlers[:]
    first = _First(handlers)
    if not (context and context.obj):
        root.handlers[:] = [first]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    finally:
        root.handlers[:] = handlers
        for kind, count in first.more.items():
            click.echo(f"{count} more: {first.first[kind]}", err=True)
