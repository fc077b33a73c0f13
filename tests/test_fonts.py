"""Legends in any script, whatever fonts the machine has: DejaVu, which matplotlib brings, stands in."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageFont

from ovseg_fast import fonts
from ovseg_fast.visualize import Panel, key, overlay, panels
from test_visualize import Written, photograph, regions, written

__all__ = ["written"]  # a fixture

FOLDER = Path(matplotlib.get_data_path(), "fonts", "ttf")
DEJAVU, CODES = str(FOLDER / "DejaVuSans.ttf"), str(FOLDER / "cmr10.ttf")
CYRILLIC, CHINESE, HEBREW, PLAIN = "зелёная трава", "猫", "שלום", "green grass"


@pytest.fixture
def system(monkeypatch, caplog) -> Callable[..., None]:
    """Sets the fonts that the system has; at first none."""

    def has(*files: str) -> None:
        monkeypatch.setattr(fonts, "system_fonts", lambda: list(files))
        for function in (fonts._source, fonts._warn_of_missing, fonts._warn_of_shaping):
            function.cache_clear()

    has()
    caplog.set_level(logging.WARNING, logger="ovseg_fast")
    yield has
    fonts._source.cache_clear()


def path(font: object) -> str | None:
    return font.path if isinstance(font.path, str) else None  # PIL's own comes from memory


def test_a_font_of_the_system_is_taken_if_it_has_the_letters(system, caplog) -> None:
    system(CODES, DEJAVU)
    found = fonts.choose([CYRILLIC, HEBREW, PLAIN, "", "a b"], 20)
    assert [path(font) for font in found] == [DEJAVU, DEJAVU, None, None, None]
    assert fonts.choose([CHINESE], 20) == [None]
    assert caplog.text.count("no font here has the letters of '猫'") == 1


def test_all_letters_of_a_name_come_from_one_font(system) -> None:
    system(DEJAVU)
    assert fonts.choose([f"{CYRILLIC} {CHINESE}", f"cat {CYRILLIC}"], 20)[0] is None
    assert path(fonts.choose([f"cat {CYRILLIC}"], 20)[0]) == DEJAVU


def test_without_a_font_one_warning_counts_the_names(system, caplog) -> None:
    for _ in range(3):
        assert fonts.choose([CYRILLIC, PLAIN, CHINESE, HEBREW], 20).count(None) == 3
    (record,) = caplog.records
    assert record.getMessage().startswith(f"no font here has the letters of '{CYRILLIC}' and 2 more names; ")


def test_what_cannot_be_seen_needs_no_font(system, caplog) -> None:
    assert None not in fonts.choose(["cat\ufe0f", "ca\u200dt", "\u200c", "cat dog"], 20)
    assert not caplog.records


def test_a_damaged_font_of_the_system_is_passed_over(system, tmp_path: Path) -> None:
    (tmp_path / "noto.ttf").write_bytes(b"no font")
    system(str(tmp_path / "noto.ttf"), str(tmp_path / "gone.ttf"), DEJAVU)
    assert path(fonts.choose([CYRILLIC], 20)[0]) == DEJAVU


def test_the_given_font_comes_first_and_may_lack_letters(system) -> None:
    system(DEJAVU)
    found = fonts.choose([PLAIN, CYRILLIC], 20, CODES)
    assert [path(font) for font in found] == [CODES, DEJAVU]
    assert path(fonts.choose([PLAIN], 20, Path(DEJAVU))[0]) == DEJAVU


@pytest.mark.parametrize("name", ["gone.ttf", "text.ttf", "folder", "empty.otf"])
def test_a_given_font_that_is_none_is_refused(system, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.ttf").write_text("no font")
    (tmp_path / "empty.otf").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=rf"^font must be a TrueType or OpenType file .* got '.*{name}' \("):
        fonts.choose([PLAIN], 20, tmp_path / name)
    with pytest.raises(ValueError, match="font must be"):
        overlay(photograph(40, 30), regions(40, 30, 2), ["a", "b"], font=tmp_path / name)


def test_fonts_of_the_system_are_sorted_by_their_scripts(monkeypatch, tmp_path: Path) -> None:
    names = ["Zapfino.ttf", "NotoSans-Regular.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc"]
    (tmp_path / "fonts/deep").mkdir(parents=True)
    for name in [*names, "LastResort.otf", "readme.txt"]:
        (tmp_path / "fonts/deep" / name).touch()
    monkeypatch.setattr(fonts.sys, "platform", "linux")
    monkeypatch.setattr(fonts, "find_spec", lambda name: None)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path))
    monkeypatch.setattr(fonts.Path, "home", lambda: tmp_path / "home")
    found = [Path(file).name for file in fonts.system_fonts.__wrapped__()]
    order = ["DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Zapfino.ttf", "DejaVuSans-Bold.ttf"]
    assert found == order


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems_have_other_folders(monkeypatch, tmp_path: Path, platform: str) -> None:
    (tmp_path / "Fonts").mkdir()
    (tmp_path / "Fonts/arial.ttf").touch()
    (tmp_path / "Library/Fonts").mkdir(parents=True)
    (tmp_path / "Library/Fonts/arial.ttf").touch()
    monkeypatch.setattr(fonts.sys, "platform", platform)
    monkeypatch.setenv("WINDIR", str(tmp_path))
    monkeypatch.setattr(fonts.Path, "home", lambda: tmp_path)
    expected = tmp_path / ("Fonts" if platform == "win32" else "Library/Fonts") / "arial.ttf"
    assert str(expected) in fonts.system_fonts.__wrapped__()


@pytest.mark.parametrize("raqm", [True, False])
@pytest.mark.parametrize("name", [HEBREW, "عربي", "नमस्ते", PLAIN, CYRILLIC, "Cafe\u0301"])
def test_without_raqm_shaped_scripts_are_said_once(system, caplog, monkeypatch, raqm: bool, name: str) -> None:
    monkeypatch.setattr(fonts.features, "check", lambda feature: raqm)
    for _ in range(2):
        fonts.choose([name], 20)
    said = sum("without Raqm" in record.getMessage() for record in caplog.records)
    assert said == (not raqm and name in (HEBREW, "عربي", "नमस्ते"))


# Pictures


def test_names_are_drawn_in_their_letters_or_as_their_index(system, written: Written) -> None:
    system(DEJAVU)
    image, labels = Image.new("RGB", (320, 320), "white"), np.zeros((320, 320), int)
    labels[:100], labels[100:110] = 2, 1
    overlay(image, labels, [CYRILLIC, CHINESE, PLAIN])
    assert written.rows() == [(CYRILLIC, "65.6 %"), (PLAIN, "31.2 %"), ("class 1", "3.1 %")]
    left, _, right, _ = written.texts[0][1]
    assert abs((right - left) - ImageFont.truetype(DEJAVU, 13).getlength(CYRILLIC)) < 3, "not in that font"
    system()
    written.texts.clear()
    overlay(image, labels, [CYRILLIC, CHINESE, PLAIN])
    assert [name for name, _ in written.rows()] == ["class 0", PLAIN, "class 1"]
    written.texts.clear()
    overlay(image, labels, [CYRILLIC, CHINESE, PLAIN], font=DEJAVU)
    assert [name for name, _ in written.rows()] == [CYRILLIC, PLAIN, "class 1"]


def test_pages_and_keys_hold_any_script(system, written: Written) -> None:
    for files, cyrillic in (((DEJAVU,), "лес"), ((), "\\u043b\\u0435\\u0441")):
        system(*files)
        written.texts.clear()
        panels([[Panel(photograph(60, 50), "лес", "猫", "note")]], HEBREW, "лес", side=900)
        texts = [text for text, _ in written.texts]
        assert texts.count(cyrillic) == 2 and "\\u732b" in texts and "note" in texts
        written.texts.clear()
        key([((1, 2, 3), "лес"), ((1, 2, 3), CHINESE)], 900, 900)
        assert [text for text, _ in written.texts] == [cyrillic, "\\u732b"]


def test_decomposed_accents_are_composed_before_they_are_drawn(system, written: Written) -> None:
    system(DEJAVU)
    overlay(photograph(60, 50), np.zeros((50, 60), int), ["Cafe\u0301"])
    assert written.rows() == [("Caf\u00e9", "100.0 %")]
