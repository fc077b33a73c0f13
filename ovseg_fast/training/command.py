"""`ovseg-fast train`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

FAILED = 1  # exit code: the run stopped
BAD_INPUT = 2  # exit code: nothing was begun, an argument does not fit


@click.command("train")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--restart", is_flag=True, help="Begin anew where the folder holds a run, instead of going on with it.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
@click.pass_obj
def train_command(verbose: bool | None, config: Path, restart: bool, quiet: bool) -> None:
    """Train a model as the TOML file CONFIG says.

    \b
    ovseg-fast train run.toml
    torchrun --nproc-per-node 4 -m ovseg_fast train run.toml

    A run that was stopped goes on where its last checkpoint was. `ovseg_fast/training/config.py` lists all keys.
    """
    from .config import read_config

    try:
        settings = read_config(config)
        from .loop import Run

        run = Run(settings, progress=not quiet)
        run.prepare(restart)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        _fail(error, bool(verbose), BAD_INPUT)
    try:
        path = run.go()
    except (ArithmeticError, ValueError, OSError, RuntimeError) as error:
        _fail(error, bool(verbose), FAILED)
    if run.accelerator.is_main_process and not quiet:
        click.echo(str(path))


def _fail(error: BaseException, verbose: bool, code: int) -> None:
    text = str(error) or type(error).__name__
    click.echo(f"ovseg-fast: {text if verbose else text.splitlines()[0]}", err=True)
    sys.exit(code)
