"""`ovseg-fast demo`: the scene, the names, the numbers that it prints and the pictures that it writes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import ovseg_fast as ovs
from ovseg_fast import checkpoints
from ovseg_fast.cli.main import main
from ovseg_fast.cli.options import BAD_INPUT, FAILED, exit_on_error, fail
from ovseg_fast.data.vocabularies import WORLD
from ovseg_fast.data.world.classes import FIRST_GROUND, GROUNDS, OBJECTS
from ovseg_fast.data.world.scenes import World
from ovseg_fast.demo import run

WORDS = [*OBJECTS, *GROUNDS]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    torch.manual_seed(7)
    checkpoints.save(ovs.build("catseg-tiny"), path)
    return path


@pytest.fixture
def demo(tmp_path, monkeypatch, weights):
    """Runs `ovseg-fast demo` in a folder of its own, on the CPU."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, of: str = "catseg-tiny", trained: object = weights):
        options = ("--model", of, "--weights", str(trained), "--device", "cpu", "--size", "64", "--mode", "whole")
        return CliRunner().invoke(main, ["demo", *options, *map(str, arguments)], catch_exceptions=False)

    return run


def refused(result, *words: str, code: int = BAD_INPUT) -> None:
    """The run ended with that code and one sentence that says these words."""
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("ovseg-fast: "), line
    for word in words:
        assert word in line
    assert result.stdout == ""


def table(output: str) -> dict[str, tuple[str, str, str]]:
    """name -> (split, IoU, remark)."""
    lines = output.split("\n\n")[1].splitlines()
    split, iou = lines[0].index("split"), lines[0].index("IoU") + 3
    return {
        line[:split].strip(): (line[split : split + 6].strip(), line[split + 6 : iou].strip(), line[iou:].strip())
        for line in lines[1:]
    }


def percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"


def iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    return float((predicted & truth).sum() / (predicted | truth).sum())


def read_labels(folder: str = "out/demo") -> np.ndarray:
    with Image.open(Path(folder, "demo_labels.png")) as image:
        return np.array(image)


def first_scene(seed: int) -> int:
    """The first test scene with two unseen objects that each cover a twenty-fifth of the picture."""
    for number in range(1000):
        labels = World(seed).scene(number, split="test").labels
        shares = np.bincount(labels.ravel(), minlength=len(WORLD.classes)) / labels.size
        if sum(shares[index] >= 0.04 for index in WORLD.unseen if index < FIRST_GROUND) >= 2:
            return number
    raise AssertionError("no such scene")


# What is printed and written


def test_alone_it_asks_for_everything_in_a_scene_with_unseen_things(demo, rng) -> None:
    seed = int(torch.randint(100, (), generator=rng))
    result = demo("--seed", seed, trained="random")
    assert result.exit_code == 0, result.output
    number = first_scene(seed)
    scene = World(seed).scene(number, 64, "test")
    assert result.stdout.startswith(f"Scene {number} of seed {seed}: ")
    rows = table(result.stdout)
    names = list(rows)
    shown = [WORLD.classes[index] for index in [*(region.label for region in scene.regions), scene.ground]]
    assert names[: len(shown)] == shown
    assert len(names) == len(shown) + 5
    for name in names[len(shown) :]:
        words = WORDS[WORLD.classes.index(name)]
        assert rows[name][1:] == ("-", "not in the scene")
        near = (WORDS[WORLD.classes.index(other)] for other in shown)
        assert any(len(words) == len(w) and sum(a != b for a, b in zip(words, w, strict=True)) == 1 for w in near)
    for name in names:
        assert rows[name][0] == ("unseen" if WORLD.classes.index(name) in WORLD.unseen else "seen")

    labels, truth = read_labels(), scene.labels
    counted = np.isin(truth, [WORLD.classes.index(name) for name in names])
    values = []
    for index, name in enumerate(shown):
        values.append(iou((labels == index) & counted, truth == WORLD.classes.index(name)))
        assert rows[name][1:] == (percent(values[-1]), "")
    unseen = [value for value, name in zip(values, shown, strict=True) if rows[name][0] == "unseen"]
    seen = [value for value, name in zip(values, shown, strict=True) if rows[name][0] == "seen"]
    means = f"mIoU {percent(float(np.mean(values)))}"
    if seen:
        means += f"  (unseen {percent(float(np.mean(unseen)))}, seen {percent(float(np.mean(seen)))})"
    assert means in result.stdout.splitlines()
    assert result.stdout.splitlines()[-1].startswith("The weights of this model are random")
    for name in ("demo", "demo_scene", "demo_overlay", "demo_labels"):
        assert str(Path("out/demo", f"{name}.png")) in result.stdout.splitlines()


def test_without_any_option_the_packaged_model_finds_unseen_things(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["demo"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "random" not in result.stdout
    unseen = [float(iou[:-2]) for split, iou, _ in table(result.stdout).values() if split == "unseen" and iou != "-"]
    assert len(unseen) >= 2 and np.mean(unseen) > 50


def test_files(demo) -> None:
    result = demo("--out", "deep/er", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "random" not in result.stdout
    files = sorted(path.name for path in Path("deep/er").iterdir())
    assert files == ["demo.png", "demo_labels.png", "demo_overlay.png", "demo_scene.png"]
    with Image.open("deep/er/demo_scene.png") as image:
        assert np.array_equal(np.asarray(image), World(3).scene(first_scene(3), 64, "test").image)
    with Image.open("deep/er/demo_overlay.png") as image:
        assert image.mode == "RGB" and image.height == 320  # with a legend, as `segment` makes it
    pictures = [Path("deep/er", name).read_bytes() for name in files]
    assert demo("--out", "deep/er", "--seed", 3).stdout == result.stdout
    assert [Path("deep/er", name).read_bytes() for name in files] == pictures


def test_own_words_count_as_what_they_mean(demo) -> None:
    scene = World(0).scene(first_scene(0), 64, "test")
    assert names_shown(scene) == {
        *("blue dotted circle", "blue dotted triangle", "orange plain square", "orange striped triangle"),
        "grey brick wall",
    }
    result = demo(
        "--seed", 0, "--classes", "cat, a tangerine box, the BRICKS, azure wedge, spotted azure disc, red plain star"
    )
    assert result.exit_code == 0, result.output
    rows, labels = table(result.stdout), read_labels()
    right = {
        "a tangerine box (orange plain square)": (1, "seen"),
        "the BRICKS (grey brick wall)": (2, "seen"),
        "azure wedge (blue dotted triangle)": (3, "unseen"),
        "spotted azure disc (blue dotted circle)": (4, "seen"),
    }
    counted = scene.labels != WORLD.classes.index("orange striped triangle")
    values = []
    for name, (index, split) in right.items():
        known = scene.labels == WORLD.classes.index(name[name.index("(") + 1 : -1])
        values.append(iou((labels == index) & counted, known))
        assert rows[name] == (split, percent(values[-1]), "")
    assert rows["cat"] == ("-", "-", "not of this world")
    assert rows["red plain star"][1:] == ("-", "not in the scene")
    assert len(rows) == 6
    assert f"mIoU {percent(float(np.mean(values)))}" in result.stdout
    share = percent(float((~counted).mean()))
    assert f"Not counted, because no name means it: orange striped triangle ({share} of the picture)." in result.stdout


def names_shown(scene) -> set[str]:
    return {WORLD.classes[index] for index in np.unique(scene.labels)}


def test_words_of_another_world_only(demo) -> None:
    result = demo("-c", "cat, dog")
    assert result.exit_code == 0, result.output
    assert "There is no mIoU: none of the names is in the scene." in result.stdout
    assert "(100.0 % of the picture)" in result.stdout and "mIoU -" not in result.stdout
    assert Path("out/demo/demo.png").is_file()


def test_a_scene_to_order(demo) -> None:
    result = demo("--scene", "violet spotted plus and a red star on water", "--seed", 5)
    assert result.exit_code == 0, result.output
    rows = list(table(result.stdout))
    assert rows[0] == "violet spotted plus (purple dotted cross)"
    assert rows[1].startswith("red star (red ") and rows[2].startswith("water (")
    assert len(rows) == 8
    assert "Not counted" not in result.stdout
    again = demo("--scene", "violet spotted plus and a red star on water", "--seed", 5, "-c", "star, cross, water")
    assert len(table(again.stdout)) == 3 and "Not counted" not in again.stdout


def test_a_ground_that_was_not_wished_for_is_asked_for_too(demo) -> None:
    rows = list(table(demo("--scene", "red plain star").stdout))
    assert rows[0] == "red plain star" and rows[1] in {" ".join(words) for words in GROUNDS}


def test_many_names(demo) -> None:
    names = [f"thing {number}" for number in range(21)]
    result = demo("--classes", ",".join(names))
    assert result.exit_code == 0, result.output
    assert "maps of 20 of the 21 names" in result.stdout
    with Image.open("out/demo/demo.png") as more:
        size = more.size
    assert "The picture shows" not in demo("--classes", ",".join(names[:20])).stdout
    with Image.open("out/demo/demo.png") as all_of_them:
        assert all_of_them.size == size


def test_cascade_clip(demo) -> None:
    result = demo("--mode", "slide", of="cascade-clip-tiny", trained="random")
    assert result.exit_code == 0, result.output
    assert len(list(Path("out/demo").iterdir())) == 4 and "mIoU" in result.stdout


def test_a_cascade_clip_of_this_world_is_told_by_meaning_what_it_was_trained_on(tmp_path, monkeypatch) -> None:
    segmenter = ovs.load("cascade-clip-tiny", weights=None, device="cpu")
    segmenter.model.config = replace(segmenter.model.config, training_classes="world")
    told = []
    original = ovs.EncodedImage.segment

    def segment(self, classes, *, seen=None):
        told.append(seen)
        return original(self, classes, seen=seen)

    monkeypatch.setattr(ovs.EncodedImage, "segment", segment)
    (unseen,) = [WORLD.classes[index] for index in WORLD.unseen if WORLD.classes[index].startswith("blue dotted tri")]
    names = ["azure spotted disc", unseen, "cat", "water"]
    run.run(segmenter, run.ask(None, names, 0, 64), "whole", tmp_path, "tiny")
    assert told == [["azure spotted disc", "water"]]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--classes", " , "), ("class", "empty name")),
        (("--classes", ""), ("at least one name",)),
        (("--classes", "cat, cat"), ("differ", "'cat'")),
        (("--classes", "violet plus, purple cross"), ("--classes", "'violet plus' and 'purple cross' mean the same")),
        (("--scene", "cat on water"), ("--scene", "'cat' is nothing of this world")),
        (("--scene", "red star on water, grass"), ("--scene", "one ground")),
        (("--scene", "water"), ("--scene", "at least one object")),
        (("--scene", ""), ("--scene", "at least one name")),
        (("--scene", ", ".join(" ".join(words) for words in OBJECTS[:20])), ("--scene", "too many to be seen")),
        (("--out", "file"), ("--out must be a folder", "file is a file")),
        (("--out", "file/deeper/still"), ("--out must be a folder", "file is a file")),
        (("--model", "resnet"), ("resnet", "catseg-tiny")),
        (("--weights", "missing.pth"), ("missing.pth",)),
        (("--device", "warp"), ("warp",)),
    ],
)
def test_bad_arguments_get_one_sentence_and_write_nothing(demo, arguments, words) -> None:
    Path("file").write_text("a file")
    refused(demo(*arguments), *words)
    assert [path.name for path in Path().iterdir()] == ["file"]


@pytest.mark.parametrize("option", [("--size", "31"), ("--seed", "-1"), ("--mode", "both")])
def test_options_out_of_range_are_refused(demo, option) -> None:
    result = demo(*option)
    assert result.exit_code == BAD_INPUT and option[0] in result.stderr
    assert not list(Path().iterdir())


def test_what_cannot_be_written_is_said_and_not_half_written(demo) -> None:
    Path("out/demo/demo.png").mkdir(parents=True)
    refused(demo(), "demo.png", "it is a folder", code=FAILED)
    assert [path.name for path in Path("out/demo").iterdir()] == ["demo.png"]


def test_a_seed_whose_scenes_show_nothing_unseen_is_named(monkeypatch) -> None:
    monkeypatch.setattr(run, "SEARCHED", 2)
    with pytest.raises(ValueError, match="--seed 0: none of its first 2 scenes shows two unseen objects"):
        run.ask(None, None, 0, 64)


# Light, and how commands end


def test_the_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from ovseg_fast.cli import main\n"
        "try: main(['demo', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'PIL', 'tqdm'} & set(sys.modules); assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "--scene" in result.stdout and "never trained on" in result.stdout


@pytest.mark.parametrize(("verbose", "expected"), [(None, "one\n"), (False, "one\n"), (True, "one\ntwo\n")])
def test_a_command_ends_with_one_sentence_or_all_when_asked(verbose, expected) -> None:
    @click.command()
    def command() -> None:
        with exit_on_error(FAILED):
            raise ValueError("one\ntwo")

    result = CliRunner().invoke(command, obj=verbose)
    assert (result.exit_code, result.stderr) == (FAILED, f"ovseg-fast: {expected}")


def test_an_error_without_words_is_named() -> None:
    with pytest.raises(SystemExit) as end:
        fail(MemoryError(), BAD_INPUT)
    assert end.value.code == BAD_INPUT


def test_an_unexpected_error_is_not_hidden() -> None:
    with pytest.raises(KeyError), exit_on_error(FAILED):
        raise KeyError("a bug")
