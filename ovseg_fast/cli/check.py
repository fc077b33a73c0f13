"""`ovseg-fast check`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from . import options


@click.command("check")
@click.argument("name", metavar="DATASET")
@click.argument("root", type=options.PATH)
@click.option("--split", default="val", show_default=True, help="Part of the dataset.")
@options.quiet()
def check_command(name: str, root: Path, split: str, quiet: bool) -> None:
    """Read every image and mask of a dataset and report what is broken or does not fit.

    \b
    ovseg-fast check ade20k-150 datasets/ --split train
    ovseg-fast check folder my_data/

    The exit code is 1 if a problem was found.
    """
    from ..data import check_dataset, open_dataset, report

    with options.exit_on_error(options.BAD_INPUT):
        dataset = open_dataset(name, root, split)
        problems = check_dataset(dataset, progress=not quiet)
    click.echo(f"{len(dataset)} pairs: {report(problems)}")
    if problems:
        sys.exit(options.FAILED)
