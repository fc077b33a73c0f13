"""What the commands share: options, loading a model, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from ..segmenter import Segmenter

FAILED = 1  # exit code: some or all of the work could not be done
BAD_INPUT = 2  # exit code: an argument does not fit, nothing was started
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError)  # errors reported in one line

PATH = click.Path(path_type=Path)

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


def check_folder(folder: Path) -> None:
    """Raises ValueError if the folder or a parent is a file."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--out must be a folder, {existing} is a file.")


def load_model(preset: str, weights: str, device: str | None, **options: Any) -> Segmenter:
    """The model, once its device is known to run the backend asked for. Imports PyTorch."""
    from .. import backends, checkpoints
    from ..segmenter import check_device, load

    check_device(device)
    path = checkpoints.download(preset, command_line=True) if weights == "published" else Path(weights)
    if weights != "random" and not path.is_file():
        raise FileNotFoundError(
            f"--weights must be a checkpoint file, `published` or `random`; there is no file '{path}'."
        )
    segmenter = load(preset, weights=None if weights == "random" else path, device=device, **options)
    backends.check(segmenter.device)
    return segmenter


def message(error: BaseException) -> str:
    """An error for stderr: its first line, or all of it with --verbose (checkpoints list every key)."""
    text = str(error) or type(error).__name__
    context = click.get_current_context(silent=True)
    return f"ovseg-fast: {text if context and context.obj else text.splitlines()[0]}"


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
        fail(error, code)
