"""`ovseg-fast check`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .options import BAD_INPUT, FAILED, fail


@click.command("check")
@click.argument("layout")
@click.argument("root", type=click.Path(path_type=Path))
@click.option("--split", default="val", show_default=True, help="Which part of the dataset.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
@click.pass_obj
def check_command(verbose: bool, layout: str, root: Path, split: str, quiet: bool) -> None:
    """Read every image and mask of a dataset and name what is broken or does not fit.

    \b
    ovseg-fast check ade20k-150 datasets/ --split train
    ovseg-fast check folder my_data/

    The exit code is 1 where something was found.
    """
    from ..data.check import check_dataset, report
    from ..data.datasets import open_dataset

    try:
        dataset = open_dataset(layout, root, split)
        problems = check_dataset(dataset, progress=not quiet)
    except (ValueError, TypeError, OSError) as error:
        fail(error, verbose, BAD_INPUT)
    click.echo(f"{len(dataset)} pairs: {report(problems)}")
    if problems:
        sys.exit(FAILED)
