"""`ovseg-fast segment`."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from . import options
from .repeats import counted_warnings

KINDS = ("overlay", "labels", "npz")


@click.command("segment")
@click.argument("inputs", nargs=-1, required=True, type=options.PATH)
@click.option("-c", "--classes", help='Class names, separated by commas: "cat, grass, sky".')
@click.option(
    "--classes-file",
    type=options.PATH,
    help="Class names from a text file, one per line, or a JSON array. The first synonym on a line is used.",
)
@options.model("catseg-vitb")
@options.run_options
@options.out("out")
@click.option(
    "--save",
    "kinds",
    type=click.Choice(KINDS),
    multiple=True,
    default=("overlay", "labels"),
    show_default=True,
    help="What to write for each image; may be repeated. `labels` is a PNG of class indices.",
)
@click.option("--alpha", type=options.SHARE, default=0.5, show_default=True, help="Opacity of the colours.")
@click.option("--font", help="Font file for the legend's names.  [default: PIL's own or one of the system]")
@options.max_side
@options.quiet("No progress bar and no summary.")
def segment_command(
    inputs: tuple[Path, ...],
    classes: str | None,
    classes_file: Path | None,
    out: Path,
    mode: str,
    kinds: tuple[str, ...],
    alpha: float,
    font: str | None,
    max_side: int,
    quiet: bool,
    **model: Any,
) -> None:
    """Segment images, or all images of a folder, into the classes you name.

    \b
    ovseg-fast segment cat.jpg --classes "cat, grass, sky"
    ovseg-fast segment photos/ --classes-file words.txt --model catseg-vitl --out labels/

    A broken image, or one too large for the memory, is reported and skipped; the exit code is then 1. Results that an
    earlier run left in a folder of images are not segmented again.
    """
    # Heavy imports come late in all commands, so that --help and typos are reported at once.
    from tqdm import tqdm

    from .. import fonts
    from ..images import enough_memory, list_images, passed_over
    from ..vocabulary import check_classes, parse_classes, read_classes

    with options.exit_on_error(options.BAD_INPUT):
        if (classes is None) == (classes_file is None):
            raise ValueError("give class names either by --classes or by --classes-file.")
        names = check_classes(parse_classes(classes) if classes is not None else read_classes(Path(str(classes_file))))
        if font is not None:
            fonts.load(font, fonts.CHECK_SIZE)
        images = list_images(inputs)
        left_out = passed_over(inputs, [*images, out])
        targets = _targets(images, out, dict.fromkeys(kinds))
        options.check_folder(out)
        segmenter = options.load_model(**model, max_side=max_side)
        segmenter.check_mode(mode)
        segmenter.embed_text(names, progress=not quiet)

    failures = 0
    with counted_warnings():
        bar = tqdm(images, unit="image", disable=True if quiet or len(images) == 1 else None)
        for path in bar:
            try:
                with enough_memory(f"image '{path}'"):
                    encoded = segmenter.encode(path, mode, progress=not quiet)
                    result = encoded.segment(names, scores=False, progress=not quiet)
                    out.mkdir(parents=True, exist_ok=True)
                    for kind, target in targets[path].items():
                        if kind == "labels":
                            result.save_labels(target)
                        else:
                            result.save(target, alpha=alpha, font=font)
            except options.EXPECTED as error:
                failures += 1
                text = options.message(error)
                named = os.fspath(path) in text or any(os.fspath(target) in text for target in targets[path].values())
                bar.write(text if named else f"{text} (image '{path}')", file=sys.stderr)
                continue
            if not quiet:
                written = ", ".join(map(str, targets[path].values()))
                bar.write(f"{path}: {result.summary(4)} -> {written}", file=sys.stdout)
        bar.close()
    if not quiet:
        for sentence in left_out:
            click.echo(sentence, err=True)
    if failures:
        if len(images) > 1:
            click.echo(f"ovseg-fast: {failures} of {len(images)} images failed.", err=True)
        sys.exit(options.FAILED)


def _targets(images: list[Path], out: Path, kinds: Iterable[str]) -> dict[Path, dict[str, Path]]:
    """The files to write for each image, by kind.

    Raises:
        ValueError: a result would overwrite one of the images.
    """
    from ..images import RESULT_ENDINGS

    stems = _output_stems(images)
    targets = {path: {kind: out / f"{stems[path]}{RESULT_ENDINGS[kind]}" for kind in kinds} for path in images}
    inputs = {_identity(path) for path in images} - {None}
    for written in targets.values():
        for target in written.values():
            if _identity(target) in inputs:
                raise ValueError(f"--out {out}: the result '{target}' would overwrite an image; choose another folder.")
    return targets


def _identity(path: Path) -> tuple[int, int] | None:
    """The same for all names of one file; None if there is no file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _output_stems(images: list[Path]) -> dict[Path, str]:
    """A name for the results of each image: its stem, with the suffix or else a number if that is not unique."""
    counts = Counter(_spelling(path.stem) for path in images)
    stems = {path: path.stem if counts[_spelling(path.stem)] == 1 else path.name for path in images}
    repeated = Counter(map(_spelling, stems.values()))
    taken = {spelling for spelling, count in repeated.items() if count == 1}
    for path, stem in stems.items():
        if repeated[_spelling(stem)] > 1:
            number = 1
            while _spelling(f"{stem}_{number}") in taken:
                number += 1
            stems[path] = f"{stem}_{number}"
            taken.add(_spelling(stems[path]))
    return stems


def _spelling(name: str) -> str:
    """The same for names that some file systems take for one."""
    return unicodedata.normalize("NFC", name).casefold()
