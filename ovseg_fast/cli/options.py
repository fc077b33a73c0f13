"""What commands share: some options, and how they end."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

FAILED = 1  # exit code: some or all of the work could not be done
BAD_INPUT = 2  # exit code: nothing was begun, an argument does not fit

weights_option = click.option(
    "-w",
    "--weights",
    default="published",
    show_default=True,
    help="A checkpoint file (upstream's or this package's), `published` to download or, for the tiny models, out of "
    "this package, or `random`.",
)
mode_option = click.option(
    "--mode",
    type=click.Choice(["slide", "whole"]),
    default="slide",
    show_default=True,
    help="Sliding windows as published, or the resized image in one pass.",
)
device_option = click.option("--device", help="cpu, cuda, cuda:1, ...  [default: a GPU where there is one]")


def sentence(error: BaseException, verbose: bool | None) -> str:
    """An error in one line; checkpoints list every key on further lines, which only --verbose shows."""
    text = str(error) or type(error).__name__
    return text if verbose else text.splitlines()[0]


def fail(error: BaseException, verbose: bool | None, code: int) -> NoReturn:
    """Say on stderr what is wrong and end with that exit code. `verbose` is None for a command run by itself."""
    click.echo(f"ovseg-fast: {sentence(error, verbose)}", err=True)
    sys.exit(code)
