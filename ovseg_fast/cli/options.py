"""What the commands share: options, loading a model, and how they end."""

from __future__ import annotations

import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ..compat import lacks_memory
from ..files import check_writable

if TYPE_CHECKING:
    from ..segmenter import Segmenter

FAILED, BAD_INPUT, STOPPED = 1, 2, 130
EXIT_CODES = {
    0: "all was done",
    FAILED: "some or all of the work could not be done",
    BAD_INPUT: "an argument does not fit, nothing was begun",
    STOPPED: "stopped by Ctrl-C or a signal",
}
# Errors reported in one line; of others, which are faults of this package, Python shows where they arose.
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError, MemoryError)

stopping = threading.Event()  # set once a signal asked the command to end

PATH = click.Path(path_type=Path)


class _Share(click.FloatRange):
    """A number in 0..1, which NaN, unlike for click, is not."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is not in the range 0<=x<=1.", param, ctx)
        return number


SHARE = _Share()  # the type of every option that is no whole number

_weights = click.option(
    "-w",
    "--weights",
    default="published",
    show_default=True,
    help="A checkpoint file, upstream's or ours; `published` (downloaded; the tiny ones are packaged); or `random`.",
)
_mode = click.option(
    "--mode",
    type=click.Choice(["slide", "whole"]),
    default="slide",
    show_default=True,
    help="Sliding windows as published, or the resized image in one pass.",
)
_device = click.option("--device", help="cpu, cuda, cuda:1, ...  [default: the GPU if there is one]")


def run_options(command: Any) -> Any:
    """How a model runs: --weights, --mode and --device."""
    return _weights(_mode(_device(command)))


def model(default: str) -> Any:
    return click.option("-m", "--model", "preset", default=default, show_default=True, help="A model, see `info`.")


def out(default: str) -> Any:
    return click.option("-o", "--out", type=PATH, default=default, show_default=True, help="Folder for the results.")


def quiet(help: str = "No progress bar.") -> Any:
    return click.option("-q", "--quiet", is_flag=True, help=help)


max_side = click.option(
    "--max-side",
    type=click.IntRange(min=2),
    default=16384,
    show_default=True,
    help="Largest accepted side of an image in pixels.",
)


def check_folder(folder: Path) -> None:
    """Raises ValueError or OSError if results cannot be written there; leaves no folder behind."""
    check_writable(folder, "--out", keep=False)


def load_model(preset: str, weights: str, device: str | None, **options: Any) -> Segmenter:
    """The model, once its device is known to exist and to run the backend asked for. Imports PyTorch."""
    from .. import backends, checkpoints
    from ..segmenter import check_device, load

    target = check_device(device)
    backends.check(target)
    path = checkpoints.download(preset, command_line=True) if weights == "published" else Path(weights)
    if weights != "random" and not path.is_file():
        raise FileNotFoundError(
            f"--weights must be a checkpoint file, `published` or `random`; there is no file '{path}'."
        )
    return load(preset, weights=None if weights == "random" else path, device=target, **options)


def message(error: BaseException) -> str:
    """An error for stderr: one sentence, or all of it with --verbose (checkpoints list every key)."""
    context = click.get_current_context(silent=True)
    return f"ovseg-fast: {str(error) if context and context.obj and str(error) else sentence(error)}"


def sentence(error: BaseException) -> str:
    """What an error says, whichever library raised it, in one line."""
    text = str(error).strip()
    if "Original Traceback" in text:  # PyTorch's, of a worker: the last line is what it is about
        text = re.sub(r"^[\w.]+: ", "", text.splitlines()[-1])
    lack = re.search(r"(?:tried to allocate|unable to (?:allocate|mmap)) ([\d.]+) (\w+)", text, re.IGNORECASE)
    if lack and lacks_memory(error):
        where = " on the GPU" if type(error).__name__ == "OutOfMemoryError" else ""
        number = f"{int(lack[1]):,}" if lack[1].isdigit() else lack[1]
        return f"there is not enough memory{where} for another {number} {lack[2]}."
    if isinstance(error, MemoryError) and not text:
        return "there is not enough memory."
    if isinstance(error, RecursionError):
        return "something is nested too deeply to be read."
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: '{os.fsdecode(error.filename)}'."
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].endswith(":") and len(lines) > 1:
        return f"{lines[0]} {lines[1]}"
    return lines[0]


def fail(error: BaseException, code: int) -> NoReturn:
    """Print the error and exit with that code."""
    click.echo(message(error), err=True)
    sys.exit(code)


@contextmanager
def exit_on_error(code: int) -> Iterator[None]:
    """An expected error in this block ends the command with one line and that exit code."""
    try:
        yield
    except EXPECTED as error:
        if stopping.is_set():  # its consequence: a worker process got the signal too
            raise KeyboardInterrupt from error
        fail(error, FAILED if lacks_memory(error) else code)
