"""`ovseg-fast train`."""

from __future__ import annotations

from pathlib import Path

import click

from . import options
from .repeats import counted_warnings


@click.command("train")
@click.argument("config", type=options.PATH)
@click.option("--restart", is_flag=True, help="Start over if the folder holds a run, instead of resuming it.")
@options.quiet()
def train_command(config: Path, restart: bool, quiet: bool) -> None:
    """Train a model as configured in the TOML file CONFIG.

    \b
    ovseg-fast train run.toml
    torchrun --nproc-per-node 4 -m ovseg_fast train run.toml

    A stopped run resumes from its last checkpoint. `ovseg_fast/training/config.py` lists all keys.
    """
    from ..training.config import read_config

    with options.exit_on_error(options.BAD_INPUT):
        settings = read_config(config)
        from ..training.run import Run

        run = Run(settings, progress=not quiet)
        run.prepare(restart)
    with options.exit_on_error(options.FAILED), counted_warnings():
        path = run.go()
    if run.accelerator.is_main_process and not quiet:
        click.echo(str(path))
