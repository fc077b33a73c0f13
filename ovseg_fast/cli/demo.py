"""`ovseg-fast demo`: a scene with things that no model was trained on, segmented by words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options


@click.command("demo")
@click.option("-c", "--classes", help='Your own words: "violet spotted plus, striped red square, planks".')
@click.option("--scene", "wish", help='What to show: "violet spotted plus and red star on water".')
@click.option("--seed", type=click.IntRange(min=0), default=2, show_default=True, help="Seed of the scene.")
@click.option("--size", type=click.IntRange(32, 1536), default=192, show_default=True, help="Side in pixels.")
@options.model("catseg-tiny")
@options.run_options
@options.out("out/demo")
def demo_command(
    classes: str | None, wish: str | None, seed: int, size: int, out: Path, mode: str, **model: Any
) -> None:
    """Draw a scene with things never trained on, segment it by words, and measure the result.

    \b
    ovseg-fast demo
    ovseg-fast demo --scene "violet spotted plus and red star on water"
    ovseg-fast demo --classes "purple dotted cross, striped red square, brown wooden floor"

    The scene comes from a small procedural world: objects of a colour, a pattern and a shape on a ground of a colour
    and a material. Without --scene it is the first one of the seed with at least two clearly visible objects whose
    combination of words is not in the training scenes. Without --classes the names are those of everything in the
    scene, and of some things that differ from them in one word.
    """
    from ..vocabulary import parse_classes

    with options.exit_on_error(options.BAD_INPUT):
        typed = None if classes is None else parse_classes(classes)
        options.check_folder(out)
        from ..demo.run import ask, run

        asked = ask(wish, typed, seed, size)
        segmenter = options.load_model(**model)
        segmenter.embed_text(asked.names)
    random = model["weights"] == "random"
    with options.exit_on_error(options.FAILED):
        name = model["preset"] + (" with random weights" if random else "")
        lines, files = run(segmenter, asked, mode, out, name)
    click.echo("\n".join([*lines, "", *map(str, files)]))
    if random:
        click.echo("The weights of this model are random: everything runs, but pictures and numbers mean nothing.")
