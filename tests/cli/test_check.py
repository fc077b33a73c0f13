"""`ovseg-fast check`: problems end it with 1, notes do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovseg_fast.cli import main
from ovseg_fast.images import MAX_SIDE


@pytest.fixture
def check(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in ("images", "masks"):
        Path("ds", part).mkdir(parents=True)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main.main(["check", "folder", "ds", *map(str, arguments)], prog_name="ovseg-fast")
        return (ended.value.code or 0, *capsys.readouterr())

    return run


def pair(name: str, *values: int) -> None:
    Image.new("RGB", (8, 6)).save(f"ds/images/{name}.png")
    Image.fromarray(np.resize(np.array(values, np.uint8), (6, 8))).save(f"ds/masks/{name}.png")


def test_notes_go_to_stderr_and_leave_the_exit_code(check) -> None:
    Path("ds/classes.txt").write_text("background\nobject\n")
    pair("a", 0, 255)
    code, out, err = check()
    assert (code, out) == (0, "1 pairs: no problem found.\n")
    assert err.splitlines() == [
        "note: 1 of 1 masks hold 0 and 255 alone; 0 is class 0, 'background', and 255 is no class: write 1 for "
        "class 1, 'object'.",
        "note: no pixel of the split shows 1 of the 2 classes: object.",
    ]


def test_problems_end_it_with_1(check) -> None:
    Path("ds/classes.txt").write_text("background\nobject\n")
    pair("a", 0, 1)
    pair("b", 0, 2)
    code, out, err = check()
    assert code == 1 and "b: mask 'ds/masks/b.png' holds label 2" in out.replace("\\", "/") and err == ""


def test_pils_own_warnings_are_not_shown(check, recwarn) -> None:
    Path("ds/classes.txt").write_text("background\nobject\n")
    pair("a", 0, 1)
    tags = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x02"  # cut short
    Image.new("RGB", (8, 6)).save("ds/images/a.png", exif=b"Exif\0\0" + tags)
    code, _, err = check()
    assert code == 0 and err == "" and not [w for w in recwarn if "PIL" in w.filename]


def test_a_split_that_is_not_there_is_2(check) -> None:
    Path("ds/classes.txt").write_text("background\nobject\n")
    pair("a", 0, 1)
    code, out, err = check("--split", "test")
    assert (code, out) == (2, "") and "split 'test'" in err


def test_the_limit_on_sides_can_be_raised(check) -> None:
    Path("ds/classes.txt").write_text("background\n")
    for part in ("images", "masks"):
        Image.new("L", (17_000, 4)).save(f"ds/{part}/a.png")
    code, out, _ = check()
    assert code == 1 and out.count("--max-side") == 2
    assert check("--max-side", 17_000)[0] == 0


@pytest.mark.parametrize("command", ["segment", "check", "evaluate"])
def test_every_command_that_reads_images_has_the_limit_on_sides(command: str) -> None:
    assert [option.default for option in main.commands[command].params if option.name == "max_side"] == [MAX_SIDE]
