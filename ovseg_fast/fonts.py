"""Fonts that have the letters of a text: PIL's own, one that is given, or one of the system."""

from __future__ import annotations

import logging
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from PIL import ImageFont, features

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

CHECK_SIZE = 24  # letters are drawn at this size to see whether a font has them
MOST_FONTS = 400  # of the system that are tried for one text
# Fonts with many scripts, the most usual first: names without spaces and dashes, in lower case.
_PREFERRED = (
    *("dejavusans.", "notosansregular", "notosanscjk", "notosans", "noto", "arialunicode", "arial.", "segoeui."),
    *("tahoma", "msyh", "simsun", "malgun", "meiryo", "yugoth", "nirmala", "pingfang", "hiragino", "stheiti"),
    *("applesdgothic", "geezapro", "kohinoor", "droidsans", "wqy", "sourcehan", "freesans", "liberationsans"),
)
_STYLES = ("bold", "italic", "oblique", "black", "thin", "light", "mono", "condensed")

logger = logging.getLogger(__name__)


def load(font: str | os.PathLike[str] | None, size: int) -> Font:
    """A font by its file, or by a name that PIL finds; PIL's own for None.

    Raises:
        ValueError: there is no such font, or the file is none.
    """
    if font is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(os.fspath(font), size)
    except OSError as error:
        kinds = "a TrueType or OpenType file (.ttf, .otf, .ttc)"
        raise ValueError(f"font must be {kinds}, got '{os.fspath(font)}' ({error}).") from None


def choose(texts: Sequence[str], size: int, font: str | os.PathLike[str] | None = None) -> list[Font | None]:
    """For each text the first font that has all its letters; None, with one warning for all, where there is none.

    Args:
        size: of the letters in pixels. font: tried first, then PIL's own and those of the system.

    Raises:
        ValueError: `font` is no font.
    """
    given = None if font is None else os.fspath(font)
    load(given, size)
    found: list[Font | None] = []
    missing = []
    for text in texts:
        source = _source(_letters(text), given)
        if source is None:
            missing.append(text)
        found.append(None if source is None else load(source or None, size))
    if missing:
        _warn_of_missing(missing[0], len(missing) - 1)
    if shaped := next((text for text in texts if _needs_shaping(text)), None):
        _warn_of_shaping(shaped)
    return found


@lru_cache(maxsize=1)
def system_fonts() -> list[str]:
    """Font files of the system, those with many scripts first."""
    home = Path.home()
    if sys.platform == "win32":
        places = [Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts")]
        places.append(Path(os.environ.get("LOCALAPPDATA", home), "Microsoft", "Windows", "Fonts"))
    elif sys.platform == "darwin":
        places = [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts"]
    else:
        data = os.environ.get("XDG_DATA_HOME") or home / ".local/share"
        shared = (os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":")
        places = [home / ".fonts", *(Path(place, "fonts") for place in (data, *shared))]
    matplotlib = find_spec("matplotlib")  # brings DejaVu
    if matplotlib and matplotlib.submodule_search_locations:
        places.append(Path(matplotlib.submodule_search_locations[0], "mpl-data", "fonts", "ttf"))
    files = {
        os.path.join(folder, name)
        for place in dict.fromkeys(places)
        for folder, _, names in os.walk(place)
        for name in names
        if name.lower().endswith((".ttf", ".otf", ".ttc")) and "lastresort" not in name.lower()  # has boxes for all
    }
    return sorted(files, key=_rank)


def _rank(file: str) -> tuple[bool, int, str]:
    name = os.path.basename(file).lower().translate(dict.fromkeys(map(ord, " -_")))
    place = next((place for place, start in enumerate(_PREFERRED) if name.startswith(start)), len(_PREFERRED))
    return any(style in name for style in _STYLES), place, file


@lru_cache(maxsize=10_000)
def _source(letters: frozenset[str], given: str | None) -> str | None:
    """A font with all these letters: its file, "" for PIL's own, None if there is none."""

    def candidates() -> Iterator[str]:
        if given is not None:
            yield given
        yield ""
        yield from system_fonts()[:MOST_FONTS]

    return next((source for source in candidates() if not _lacks(source, letters)), None)


def _letters(text: str) -> frozenset[str]:
    """The letters of a text that are to be seen."""
    hidden = ("Cf", "Cc", "Zs", "Zl", "Zp")
    return frozenset(
        letter for letter in text if unicodedata.category(letter) not in hidden and not "\ufe00" <= letter <= "\ufe0f"
    )


def _lacks(source: str, letters: frozenset[str]) -> bool:
    """Whether a font draws one of the letters as its box for missing ones, or not at all."""
    try:
        font, box = _checked(source)
        return any(_drawn(font, letter) in (box, b"") for letter in letters)
    except (OSError, ValueError):  # of one size only, as fonts of emoji are; damaged
        return True


@lru_cache(maxsize=64)
def _checked(source: str) -> tuple[Font, bytes]:
    """A font and its box for missing letters, without shaping, which would add to single marks."""
    if source:
        font: Font = ImageFont.truetype(source, CHECK_SIZE, layout_engine=ImageFont.Layout.BASIC)
    else:
        font = ImageFont.load_default(CHECK_SIZE)
    return font, _drawn(font, "\U0010ffff")


def _drawn(font: Font, letter: str) -> bytes:
    """The pixels of a letter; empty if none is set."""
    mask = font.getmask(letter)
    pixels = bytes(mask)
    return repr(mask.size).encode() + pixels if any(pixels) else b""


def _needs_shaping(text: str) -> bool:
    return not text.isascii() and any(
        unicodedata.bidirectional(letter) in ("R", "AL") or unicodedata.category(letter) in ("Mc", "Mn")
        for letter in unicodedata.normalize("NFC", text)
    )


@lru_cache(maxsize=1024)
def _warn_of_missing(first: str, more: int) -> None:
    others = f" and {more} more names" if more else ""
    logger.warning("no font here has the letters of %r%s; give one that has (font, --font)", first, others)


@lru_cache(maxsize=1)
def _warn_of_shaping(first: str) -> None:
    if not features.check("raqm"):
        logger.warning(
            "this Pillow comes without Raqm, so the letters of right-to-left and joining scripts, as in %r, are drawn "
            "one by one, from left to right",
            first,
        )
