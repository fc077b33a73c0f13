"""`ovseg-fast segment`: which files, where to, and what is said; in this process, with a model that needs no time."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from ovseg_fast import images
from ovseg_fast.cli import main, options
from ovseg_fast.cli.repeats import counted_warnings
from ovseg_fast.cli.segment import _output_stems
from ovseg_fast.segmentation import Segmentation

FONT = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


class Stub:
    """Reads images as a segmenter does, and finds the first class in the left half, the last one in the right."""

    fail: dict[str, Exception] = {}  # noqa: RUF012, set anew by each test

    def __init__(self, preset, weights, device, max_side) -> None:
        self.max_side = max_side

    def check_mode(self, mode: str) -> None:
        pass

    def embed_text(self, names, progress: bool) -> None:
        pass

    def encode(self, path: Path, mode: str, progress: bool) -> Stub:
        self.image = images.load_image(path, self.max_side)
        if error := self.fail.get(path.name):
            raise error
        logging.getLogger("ovseg_fast.stub").warning("images under %d pixels are small", 96)
        return self

    def segment(self, names, scores: bool, progress: bool) -> Segmentation:
        labels = np.zeros((self.image.height, self.image.width), int)
        labels[:, self.image.width // 2 :] = len(names) - 1
        return Segmentation(self.image, names, labels)


class Ended:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def segment(tmp_path: Path, monkeypatch, capsys):
    """Runs the command in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Stub, "fail", {})
    monkeypatch.setattr(options, "load_model", lambda **arguments: Stub(**arguments))

    def run(*arguments: object, classes: str = "cat, dog") -> Ended:
        with pytest.raises(SystemExit) as ended:
            main.main(["segment", *map(str, arguments), "-c", classes], prog_name="ovseg-fast")
        return Ended(ended.value.code or 0, *capsys.readouterr())

    return run


def photo(path: Path | str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.randint(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return path


def names(folder: Path | str) -> list[str]:
    return sorted(entry.name for entry in Path(folder).iterdir())


# Which files


def test_own_results_are_not_segmented_again(segment) -> None:
    photo("photos/a.png")
    expected = ["a.png", "a_labels.npz", "a_labels.png", "a_overlay.png"]
    for _ in range(3):
        kinds = ("--save", "overlay", "--save", "labels", "--save", "npz")
        assert segment("photos", "-o", "photos", *kinds).code == 0
        assert names("photos") == expected


def test_what_is_passed_over_is_one_line(segment, monkeypatch) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    photo("mix/a.png")
    photo("mix/sub/f.png")
    for name in ("b.heic", "c.HEIF", "e", "g.dng"):
        Path("mix", name).write_bytes(b"x")
    ended = segment("mix")
    assert ended.code == 0 and names("out") == ["a_labels.png", "a_overlay.png"]
    assert ended.err.splitlines() == [
        "4 files (.heic: 1, .heif: 1, no suffix: 1, .dng: 1) and 1 folder in 'mix' were passed over; install "
        "pillow-heif to read HEIC images."
    ]
    assert segment("mix", "-q").err == "" and segment("mix/a.png").err == ""


def test_the_folder_of_results_is_not_called_passed_over(segment) -> None:
    photo("a.png")
    for _ in range(2):
        assert segment(".").err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of any bytes, which Linux has")
def test_names_that_are_not_utf8_are_read_and_written(segment) -> None:
    for name in (b"caf\xe9.png", b"\xff\xfe.jpg"):
        photo(os.fsdecode(name))
    ended = segment(*sorted(map(os.fsdecode, (b"caf\xe9.png", b"\xff\xfe.jpg"))), "-q")
    assert ended.code == 0 and {os.fsencode(name) for name in names("out")} == {
        b"caf\xe9_overlay.png",
        b"caf\xe9_labels.png",
        b"\xff\xfe_overlay.png",
        b"\xff\xfe_labels.png",
    }


# Where to


@pytest.mark.parametrize("kind", ["overlay", "labels"])
@pytest.mark.parametrize("link", [False, True])
def test_no_result_overwrites_an_image(segment, kind: str, link: bool) -> None:
    photo("a.png")
    original = photo("b.png" if link else f"a_{kind}.png")
    if link:
        Path(f"a_{kind}.png").symlink_to("b.png")
    before = original.read_bytes()
    ended = segment("a.png", original, "-o", ".")
    assert ended.code == 2 and original.read_bytes() == before
    assert (
        ended.err
        == f"ovseg-fast: --out .: the result 'a_{kind}.png' would overwrite an image; choose another folder.\n"
    )
    assert segment("a.png", "-o", ".").code == 0 or link


@pytest.mark.parametrize(
    "given",
    [
        ["a.png", "a.jpg", "b.png"],
        ["x/a.png", "y/a.png", "y/a.jpg"],
        ["x/a.png", "y/a.png", "a.png_1.jpg"],
        ["a.png", "a.jpg", "a.png.webp"],
        ["x/a.png", "y/a.png", "z/a.png", "a.png_2.jpg", "a.png_1.webp"],
        ["A.png", "a.jpg"],
        ["x/caf\u00e9.png", "y/cafe\u0301.png"],
    ],
)
def test_each_image_has_results_of_its_own(given: list[str]) -> None:
    for order in (given, given[::-1]):
        stems = _output_stems([Path(name) for name in order])
        assert list(stems) == [Path(name) for name in order]
        assert len({stem.casefold().replace("e\u0301", "\u00e9") for stem in stems.values()}) == len(given)


def test_stems_stay_short_where_they_can() -> None:
    stems = _output_stems([Path("x/a.png"), Path("x/b.png"), Path("x/b.jpg"), Path("y/c.png"), Path("z/c.png")])
    assert list(stems.values()) == ["a", "b.png", "b.jpg", "c.png_1", "c.png_2"]


# What is said


def test_one_image_that_fails_does_not_end_the_folder(segment) -> None:
    for name in "abcdefg":
        photo(f"photos/{name}.png")
    Path("photos/c.png").write_bytes(b"broken")
    Stub.fail = {
        "a.png": MemoryError(),
        "b.png": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        "d.png": RuntimeError("something else"),
        "e.png": np.exceptions.AxisError("axis") if hasattr(np, "exceptions") else ValueError("axis"),
    }
    ended = segment("photos")
    assert ended.code == 1 and names("out") == [f"{n}_{kind}.png" for n in "fg" for kind in ("labels", "overlay")]
    lines = ended.err.splitlines()
    assert lines[:2] == [f"ovseg-fast: image '{Path('photos', n)}.png' is too large for the memory." for n in "ab"]
    assert lines[-1] == "ovseg-fast: 5 of 7 images failed." and "Traceback" not in ended.err
    assert all(f"{name}.png" in line for name, line in zip("abcde", lines, strict=False))


def test_a_warning_for_every_image_comes_once_with_its_number(segment, caplog) -> None:
    for index in range(30):
        photo(f"photos/{index:02}.png")
    ended = segment("photos", "-q", "--save", "labels")
    assert [record.getMessage() for record in caplog.records] == ["images under 96 pixels are small"]
    assert ended.err == "29 more: images under 96 pixels are small\n"


def test_warnings_that_count_themselves_or_name_what_is_left_out_are_all_shown(caplog, capsys) -> None:
    with counted_warnings():
        for count in (1, 10):
            logging.getLogger("ovseg_fast.models").warning("%d small images so far", count)
            logging.getLogger("ovseg_fast.evaluation.evaluate").warning("%s is left out", count)
            logging.getLogger("other").warning("plain")
            logging.getLogger("other").error("%s failed", count)
    assert [record.getMessage() for record in caplog.records] == [
        *("1 small images so far", "1 is left out", "plain", "1 failed"),
        *("10 small images so far", "10 is left out", "10 failed"),
    ]
    assert capsys.readouterr().err.splitlines()[-1] == "1 more: plain"


def test_with_verbose_every_warning_is_shown(segment, caplog, capsys) -> None:
    for index in range(3):
        photo(f"photos/{index}.png")
    with pytest.raises(SystemExit):
        main.main(["-v", "segment", "photos", "-c", "cat, dog", "-q"], prog_name="ovseg-fast")
    assert len(caplog.records) == 3 and capsys.readouterr().err == ""


def test_dark_and_damaged_images_of_a_folder_are_two_warnings(segment, caplog) -> None:
    images._warn.cache_clear()
    Path("photos").mkdir()
    for index in range(10):
        Image.fromarray(np.full((20, 30), 4000, np.uint16)).save(f"photos/{index}.png")
    ended = segment("photos", "-q", "--save", "labels")
    dark = [record for record in caplog.records if "looks like 12 bits" in record.getMessage()]
    assert len(dark) == 1 and "9 more: image 'photos/0.png': no level is above 4000" in ended.err.replace("\\", "/")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--font", "gone.ttf"), "font must be a TrueType or OpenType file"),
        (("--font", "a.png"), "font must be a TrueType or OpenType file"),
        (("--max-side", "1"), "--max-side"),
        (("--save", "scores"), "--save"),
        (("-o", "a.png"), "--out must be a folder"),
        (("-o", "a.png/deeper"), "--out must be a folder"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(segment, monkeypatch, arguments, words) -> None:
    photo("a.png")
    monkeypatch.setattr(options, "load_model", lambda **_: pytest.fail("the model was loaded"))
    ended = segment("a.png", *arguments)
    assert ended.code == 2 and words in ended.err and not Path("out").exists()


def test_a_font_is_used_for_the_legend(segment, monkeypatch) -> None:
    from ovseg_fast import fonts

    monkeypatch.setattr(fonts, "system_fonts", list)
    fonts._source.cache_clear()
    photo("a.png")
    segment("a.png", "-o", "without", classes="лес, море")
    segment("a.png", "-o", "with", "--font", FONT, classes="лес, море")
    fonts._source.cache_clear()
    assert Path("with/a_overlay.png").read_bytes() != Path("without/a_overlay.png").read_bytes()
    assert Path("with/a_labels.png").read_bytes() == Path("without/a_labels.png").read_bytes()


def test_a_side_beyond_the_limit_says_how_to_raise_it(segment) -> None:
    Image.new("L", (17_000, 4)).save("a.png")
    ended = segment("a.png")
    assert ended.code == 1 and "17000 x 4 pixels" in ended.err and "--max-side" in ended.err
    assert segment("a.png", "--max-side", 17_000, "--save", "labels").code == 0
