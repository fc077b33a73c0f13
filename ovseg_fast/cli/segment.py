"""`ovseg-fast segment`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click

from .options import BAD_INPUT, FAILED, device_option, fail, mode_option, sentence, weights_option


@click.command("segment")
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-c", "--classes", help='Class names, separated by commas: "cat, grass, sky".')
@click.option(
    "--classes-file",
    type=click.Path(path_type=Path),
    help="Class names from a text file, one a line, or a JSON array. Of synonyms on a line the first is used.",
)
@click.option("-m", "--model", "preset", default="catseg-vitb", show_default=True, help="A model; `info` lists them.")
@weights_option
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default="out", show_default=True, help="Folder for the results."
)
@mode_option
@click.option(
    "--save",
    "kinds",
    type=click.Choice(["overlay", "labels", "npz"]),
    multiple=True,
    default=("overlay", "labels"),
    show_default=True,
    help="What to write for each image; give it several times. `labels` is a PNG of class indices.",
)
@click.option("--alpha", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Opacity of the colours.")
@device_option
@click.option("--max-side", type=click.IntRange(min=1), help="Largest accepted side of an image.  [default: 16384]")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar and no summary.")
@click.pass_obj
def segment_command(
    verbose: bool,
    inputs: tuple[Path, ...],
    classes: str | None,
    classes_file: Path | None,
    preset: str,
    weights: str,
    out: Path,
    mode: str,
    kinds: tuple[str, ...],
    alpha: float,
    device: str | None,
    max_side: int | None,
    quiet: bool,
) -> None:
    """Segment images, or all images of a folder, into the classes you name.

    \b
    ovseg-fast segment cat.jpg --classes "cat, grass, sky"
    ovseg-fast segment photos/ --classes-file words.txt --model catseg-vitl --out labels/

    A broken image is reported and skipped; the exit code is then 1.
    """
    # Heavy imports wait until the arguments are known to be sound, so that a typing mistake is answered at once.
    from tqdm import tqdm

    from ..images import MAX_SIDE, list_images
    from ..vocabulary import check_classes, parse_classes, read_classes

    try:
        if (classes is None) == (classes_file is None):
            raise ValueError("give class names either by --classes or by --classes-file.")
        names = check_classes(parse_classes(classes) if classes is not None else read_classes(Path(str(classes_file))))
        images = list_images(inputs)
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out must be a folder, {out} is a file.")
        from .. import backends
        from ..segmenter import load

        segmenter = load(
            preset,
            weights=None if weights == "random" else weights,
            device=device,
            max_side=MAX_SIDE if max_side is None else max_side,
        )
        backends.check(segmenter.device)
        segmenter.embed_text(names, progress=not quiet)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        fail(error, verbose, BAD_INPUT)

    failures = 0
    stems = _output_stems(images)
    bar = tqdm(images, unit="image", disable=True if quiet or len(images) == 1 else None)
    for path in bar:
        try:
            result = segmenter.encode(path, mode, progress=not quiet).segment(names, progress=not quiet)
            written = _write(result, out, stems[path], kinds, alpha)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            failures += 1
            bar.write(f"ovseg-fast: {sentence(error, verbose)}", file=sys.stderr)
            continue
        if not quiet:
            bar.write(f"{path}: {result.summary(4)} -> {', '.join(map(str, written))}", file=sys.stdout)
    if failures:
        if len(images) > 1:
            click.echo(f"ovseg-fast: {failures} of {len(images)} images failed.", err=True)
        sys.exit(FAILED)


def _output_stems(images: list[Path]) -> dict[Path, str]:
    """A name for the results of each image; the suffix joins in where two images differ in nothing else."""
    counts = Counter(path.stem for path in images)
    stems = {path: path.stem if counts[path.stem] == 1 else path.name for path in images}
    repeated = Counter(stems.values())
    # Same names from several folders: number them rather than overwrite.
    seen: Counter[str] = Counter()
    for path, stem in stems.items():
        seen[stem] += 1
        if repeated[stem] > 1:
            stems[path] = f"{stem}_{seen[stem]}"
    return stems


def _write(result: Any, out: Path, stem: str, kinds: tuple[str, ...], alpha: float) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for kind in dict.fromkeys(kinds):
        path = out / f"{stem}_{'labels.npz' if kind == 'npz' else kind + '.png'}"
        if kind == "labels":
            result.save_labels(path)
        elif kind == "overlay":
            result.save(path, alpha=alpha)
        else:
            result.save(path)
        written.append(path)
    return written
