"""`ovseg-fast segment`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click

from . import options

ENDINGS = {"overlay": "overlay.png", "labels": "labels.png", "npz": "labels.npz"}


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
    type=click.Choice(list(ENDINGS)),
    multiple=True,
    default=("overlay", "labels"),
    show_default=True,
    help="What to write for each image; may be repeated. `labels` is a PNG of class indices.",
)
@click.option("--alpha", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Opacity of the colours.")
@click.option("--max-side", type=click.IntRange(min=1), help="Largest accepted side of an image.  [default: 16384]")
@options.quiet("No progress bar and no summary.")
def segment_command(
    inputs: tuple[Path, ...],
    classes: str | None,
    classes_file: Path | None,
    out: Path,
    mode: str,
    kinds: tuple[str, ...],
    alpha: float,
    max_side: int | None,
    quiet: bool,
    **model: Any,
) -> None:
    """Segment images, or all images of a folder, into the classes you name.

    \b
    ovseg-fast segment cat.jpg --classes "cat, grass, sky"
    ovseg-fast segment photos/ --classes-file words.txt --model catseg-vitl --out labels/

    A broken image is reported and skipped; the exit code is then 1.
    """
    # Heavy imports come late in all commands, so that --help and typos are reported at once.
    from tqdm import tqdm

    from ..images import MAX_SIDE, list_images
    from ..vocabulary import check_classes, parse_classes, read_classes

    with options.exit_on_error(options.BAD_INPUT):
        if (classes is None) == (classes_file is None):
            raise ValueError("give class names either by --classes or by --classes-file.")
        names = check_classes(parse_classes(classes) if classes is not None else read_classes(Path(str(classes_file))))
        images = list_images(inputs)
        options.check_folder(out)
        segmenter = options.load_model(**model, max_side=max_side or MAX_SIDE)
        segmenter.embed_text(names, progress=not quiet)

    failures = 0
    stems = _output_stems(images)
    bar = tqdm(images, unit="image", disable=True if quiet or len(images) == 1 else None)
    for path in bar:
        try:
            encoded = segmenter.encode(path, mode, progress=not quiet)
            result = encoded.segment(names, scores=False, progress=not quiet)
            out.mkdir(parents=True, exist_ok=True)
            written = {kind: out / f"{stems[path]}_{ENDINGS[kind]}" for kind in kinds}
            for kind, target in written.items():
                if kind == "labels":
                    result.save_labels(target)
                else:
                    result.save(target, alpha=alpha)
        except options.EXPECTED as error:
            failures += 1
            bar.write(options.message(error), file=sys.stderr)
            continue
        if not quiet:
            bar.write(f"{path}: {result.summary(4)} -> {', '.join(map(str, written.values()))}", file=sys.stdout)
    if failures:
        if len(images) > 1:
            click.echo(f"ovseg-fast: {failures} of {len(images)} images failed.", err=True)
        sys.exit(options.FAILED)


def _output_stems(images: list[Path]) -> dict[Path, str]:
    """A name for the results of each image: its stem, with the suffix or else a number if that is not unique."""
    counts = Counter(path.stem for path in images)
    stems = {path: path.stem if counts[path.stem] == 1 else path.name for path in images}
    repeated = Counter(stems.values())
    seen: Counter[str] = Counter()
    for path, stem in stems.items():
        seen[stem] += 1
        if repeated[stem] > 1:
            stems[path] = f"{stem}_{seen[stem]}"
    return stems
