"""`ovseg-fast demo`: a scene with things that no model was trained on, segmented by words."""

from __future__ import annotations

from pathlib import Path

import click

from .options import BAD_INPUT, FAILED, device_option, fail, mode_option, weights_option

MAX_SIZE = 1536  # pixels


@click.command("demo")
@click.option("-c", "--classes", help='Your own words: "violet spotted plus, striped red square, planks".')
@click.option("--scene", "wish", help='What to show: "violet spotted plus and red star on water".')
@click.option("--seed", type=click.IntRange(min=0), default=2, show_default=True, help="Another seed, another scene.")
@click.option(
    "--size", type=click.IntRange(32, MAX_SIZE), default=192, show_default=True, help="Side of the scene in pixels."
)
@click.option("-m", "--model", "preset", default="catseg-tiny", show_default=True, help="A model; `info` lists them.")
@weights_option
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default="out/demo",
    show_default=True,
    help="Folder for the results.",
)
@mode_option
@device_option
@click.pass_obj
def demo_command(
    verbose: bool | None,
    classes: str | None,
    wish: str | None,
    seed: int,
    size: int,
    preset: str,
    weights: str,
    out: Path,
    mode: str,
    device: str | None,
) -> None:
    """Make a scene with things never trained on, segment it by words, and measure how well.

    \b
    ovseg-fast demo
    ovseg-fast demo --scene "violet spotted plus and red star on water"
    ovseg-fast demo --classes "purple dotted cross, striped red square, brown wooden floor"

    The scene comes from a small procedural world: objects of a colour, a pattern and a shape on a ground of a colour
    and a material. Without --scene it is the first one of the seed with at least two well visible objects whose
    combination of words is not in the training scenes. Without --classes the names are those of everything in the
    scene, and of some things that differ from them in one word.
    """
    # Heavy imports wait until they are needed, so that the help comes at once.
    from ..vocabulary import parse_classes

    try:
        typed = None if classes is None else parse_classes(classes)
        folder = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not folder.is_dir():
            raise ValueError(f"--out must be a folder, {folder} is a file.")
        from .. import backends
        from ..demo.run import ask, run
        from ..models.presets import get_preset
        from ..segmenter import load

        get_preset(preset)
        asked = ask(wish, typed, seed, size)
        segmenter = load(preset, weights=None if weights == "random" else weights, device=device)
        backends.check(segmenter.device)
        segmenter.embed_text(asked.names)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        fail(error, verbose, BAD_INPUT)
    try:
        name = f"{preset} with random weights" if weights == "random" else preset
        lines, files = run(segmenter, asked, mode, out, name)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        fail(error, verbose, FAILED)
    click.echo("\n".join([*lines, "", *map(str, files)]))
    if weights == "random":
        click.echo("The weights of this model are random: everything runs, but pictures and numbers mean nothing.")
