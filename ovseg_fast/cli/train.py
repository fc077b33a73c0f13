"""`ovseg-fast train`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import BAD_INPUT, FAILED, fail


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
    from ..training.config import read_config

    try:
        settings = read_config(config)
        from ..training.run import Run

        run = Run(settings, progress=not quiet)
        run.prepare(restart)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        fail(error, verbose, BAD_INPUT)
    try:
        path = run.go()
    except (ArithmeticError, ValueError, OSError, RuntimeError) as error:
        fail(error, verbose, FAILED)
    if run.accelerator.is_main_process and not quiet:
        click.echo(str(path))
