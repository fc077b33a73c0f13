"""The command line: `ovseg-fast segment`, `train`, `evaluate`, `demo`, `check` and `info`."""

from __future__ import annotations

import logging
import sys

import click

from .. import __version__
from . import options
from .check import check_command
from .demo import demo_command
from .ending import Commands
from .evaluate import evaluate_command
from .segment import segment_command
from .train import train_command


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: " + "; ".join(f"{code}: {meaning}" for code, meaning in options.EXIT_CODES.items()) + ".",
)
@click.version_option(__version__, prog_name="ovseg-fast")
@click.option("-v", "--verbose", is_flag=True, help="Log what the package decides, and full error messages.")
@click.pass_context
def main(context: click.Context, verbose: bool) -> None:
    """Open-vocabulary semantic segmentation: name the classes, get a label for every pixel."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)
    context.obj = verbose


@main.command()
def info() -> None:
    """Show versions, devices, models, and what runs the operators and why."""
    from .info import report

    click.echo(report())


for command in (segment_command, train_command, evaluate_command, demo_command, check_command):
    main.add_command(command)
