"""Images of any kind in, RGB images out, or one sentence that says why not."""

from __future__ import annotations

import logging
import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from .compat import lacks_memory

ImageSource: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray

MIN_SIDE = 2
MAX_SIDE = 16384
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
)
HEIF_SUFFIXES = (".heic", ".heif", ".hif")  # read where pillow-heif is installed
RESULT_ENDINGS = {"overlay": "_overlay.png", "labels": "_labels.png", "npz": "_labels.npz"}  # of `ovseg-fast segment`

_NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_TURNS = {orientation: Image.Transpose[name] for orientation, name in enumerate(_NAMES.split(), 2)}  # from EXIF's 2..8
_INVERSE = {6: 8, 8: 6}  # all other turns undo themselves

logger = logging.getLogger(__name__)


class ImageError(ValueError):
    """An image cannot be used; the message is one sentence that names it."""


class MissingImageError(ImageError, FileNotFoundError):
    """There is no such file or folder."""


class TooLargeError(ImageError, MemoryError):
    """There is not enough memory for an image."""


def load_image(source: ImageSource, max_side: int = MAX_SIDE, *, upright: bool = True) -> Image.Image:
    """Read an image, of several pages the first, as RGB with eight bits a channel.

    Transparent parts become white, 16-bit grey levels are scaled to 0..255, and the EXIF orientation is applied. Of
    16-bit colours the upper 8 bits are kept.

    Args:
        source: a path, a PIL image, which threads may share, or a uint8 array (H, W, 3) of RGB; it is left as it is.
        max_side: largest accepted side in pixels; the smallest is 2. PIL's own limit on pixels does not apply.
        upright: apply the EXIF orientation; without it the pixels stay as they are stored.

    Raises:
        TypeError: `source` is of another type. ValueError: `max_side` is not a whole number of at least 2.
        MissingImageError: no such file. TooLargeError: there is not enough memory.
        ImageError: a folder, an empty, damaged or truncated file, not an image, too small, too large, or of a kind
            without an agreed conversion to RGB.
    """
    check_max_side(max_side)
    if isinstance(source, Image.Image):
        path = getattr(source, "filename", "")
        with _given_lock:
            return _decode(source, f"image '{path}'" if path else "the given PIL image", max_side, upright)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            got = f"{source.dtype} of shape {source.shape}"
            raise ImageError(f"an image array must be uint8 of shape (H, W, 3), RGB, got {got}.")
        check_size("the given array", source.shape[1], source.shape[0], max_side)
        return Image.fromarray(source)
    if isinstance(source, (str, os.PathLike)):
        with open_image(os.fsdecode(source)) as image:
            return _decode(image, f"image '{os.fsdecode(source)}'", max_side, upright)
    raise TypeError(
        "an image must be a path, a PIL image or a uint8 array (H, W, 3), got "
        f"{type(source).__module__}.{type(source).__qualname__}."
    )


def check_max_side(max_side: int) -> None:
    """Raises ValueError for anything but a whole number of pixels."""
    if isinstance(max_side, bool) or not isinstance(max_side, int) or max_side < MIN_SIDE:
        raise ValueError(f"max_side must be a whole number of pixels, at least {MIN_SIDE}, got {max_side!r}.")


def list_images(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Expand files and folders into image files, without duplicates.

    A folder stands for the files directly in it with a usual image suffix, sorted by name, without hidden ones and
    without what `ovseg-fast segment` wrote for one of the images (`passed_over` tells what else is left out).

    Raises:
        MissingImageError: a path does not exist.
        ImageError: no path is given, or a folder holds no image.
    """
    found: dict[str, Path] = {}
    named: set[str] = set()
    for path in _paths(paths):
        if not path.exists():
            raise MissingImageError(f"there is no file or folder '{path}'.")
        if not path.is_dir():
            named.add(os.path.abspath(path))
        for file in _images_in(path) if path.is_dir() else [path]:
            found.setdefault(os.path.abspath(file), file)
    if not found:
        raise ImageError("no image was given: expected at least one file or folder.")
    names = {name for file in found.values() for name in (file.stem, file.name)}
    return [file for key, file in found.items() if key in named or not _is_result(file.name, names)]


def passed_over(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], images: Iterable[Path] | None = None
) -> list[str]:
    """One sentence for each folder in which files other than `images` (by default, those of `list_images`) lie.

    Hidden files are not counted.
    """
    taken = {os.path.abspath(image) for image in (list_images(paths) if images is None else images)}
    sentences = []
    for folder in dict.fromkeys(path for path in _paths(paths) if path.is_dir()):
        kinds: Counter[str] = Counter()
        folders = 0
        for entry in _entries(folder):
            if entry.name.startswith(".") or os.path.abspath(entry) in taken:
                continue
            suffix = entry.suffix.lower()
            if entry.is_dir():
                folders += 1
            elif entry.name.endswith(tuple(RESULT_ENDINGS.values())):
                kinds["own results"] += 1
            else:
                kinds[suffix or "no suffix"] += 1
        parts = []
        if kinds:
            listed = ", ".join(f"{kind}: {count}" for kind, count in kinds.items())
            parts.append(f"{kinds.total()} file{'s' if kinds.total() > 1 else ''} ({listed})")
        if folders:
            parts.append(f"{folders} folder{'s' if folders > 1 else ''}")
        if parts:
            several = kinds.total() + folders > 1
            hint = "; install pillow-heif to read HEIC images" if kinds.keys() & set(HEIF_SUFFIXES) else ""
            sentences.append(f"{' and '.join(parts)} in '{folder}' {'were' if several else 'was'} passed over{hint}.")
    return sentences


def suffixes() -> tuple[str, ...]:
    """Endings of image files that can be read here."""
    return (*SUFFIXES, *HEIF_SUFFIXES) if find_spec("pillow_heif") else SUFFIXES


def _paths(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ImageError(f"folder '{folder}' cannot be read: {error.strerror or error}.") from error


def _images_in(folder: Path) -> list[Path]:
    entries, endings = _entries(folder), suffixes()
    named = [entry for entry in entries if entry.suffix.lower() in endings and not entry.name.startswith(".")]
    files = [entry for entry in named if not entry.is_dir()]  # not is_file: a broken link is reported as missing
    if not files:
        heic = sum(entry.suffix.lower() in HEIF_SUFFIXES for entry in entries)
        hint = f" ({heic} HEIC: install pillow-heif to read them)" if heic else ""
        raise ImageError(f"folder '{folder}' holds no image, that is, no file named {', '.join(SUFFIXES)}{hint}.")
    return files


def _is_result(name: str, images: set[str]) -> bool:
    """Whether a file of that name is what `ovseg-fast segment` wrote for an image of one of these names or stems."""
    ending = next((ending for ending in RESULT_ENDINGS.values() if name.endswith(ending)), None)
    if ending is None:
        return False
    base = name.removesuffix(ending)
    return base in images or re.sub(r"_\d+$", "", base) in images


def open_image(path: str, what: str = "image") -> ImageFile.ImageFile:
    """An image file, opened but not decoded; `what` it is called in errors, which are those of `load_image`."""
    name = f"{what} '{path}'"
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingImageError(f"there is no {what} file '{path}'.") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ImageError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{name} is a folder, expected a file.")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name} is not a plain file.")
    if status.st_size == 0:
        raise ImageError(f"{name} is empty (0 bytes).")
    with decoding(name), _any_number_of_pixels():
        try:
            return Image.open(path)
        except UnidentifiedImageError:
            if (kind := _heif_kind(path)) is None:
                raise
            if not _register_heif(kind):
                package = "pillow-heif" if kind == "HEIC" else "Pillow 11.3 or pillow-avif-plugin"
                raise ImageError(f"{name} is {kind}; install {package} to read it.") from None
            return Image.open(path)


@contextmanager
def enough_memory(name: str) -> Iterator[None]:
    """Raises `TooLargeError`, which names the image, if memory runs out in this block."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ImageError) or not lacks_memory(error):
            raise
        raise TooLargeError(f"{name} is too large for the memory.") from error


_given_lock = threading.Lock()  # PIL decodes an opened image at its first use, and not for two threads at once
_pixels_lock = threading.Lock()
_pixels_lifted = 0  # blocks in which PIL's limit is lifted
_pixels_limit: int | None = None


@contextmanager
def _any_number_of_pixels() -> Iterator[None]:
    """Lifts PIL's limit on pixels in this block: `max_side` guards against the same. Threads share PIL's limit."""
    global _pixels_lifted, _pixels_limit
    with _pixels_lock:
        if not _pixels_lifted:
            _pixels_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _pixels_lifted += 1
    try:
        yield
    finally:
        with _pixels_lock:
            _pixels_lifted -= 1
            if not _pixels_lifted:
                Image.MAX_IMAGE_PIXELS = _pixels_limit


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Raises `ImageError` for whatever PIL raises in this block."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not in an image format that PIL reads, or its beginning is damaged.") from None
    except Exception as error:  # damaged files raise anything: OSError, SyntaxError, struct.error, EOFError, ...
        if lacks_memory(error):
            raise TooLargeError(f"{name} is too large for the memory.") from error
        if isinstance(error, OSError) and error.strerror:
            raise ImageError(f"{name} cannot be read: {error.strerror}.") from error
        raise ImageError(f"{name} is damaged or truncated and cannot be decoded ({_one_line(error)}).") from error


def load_pixels(image: Image.Image, name: str, max_side: int) -> None:
    """Decode an image that `open_image` opened, if its sides are within `max_side`. Errors as `load_image`."""
    check_size(name, *image.size, max_side)
    path = getattr(image, "filename", "")
    if path and image.format == "TIFF" and _orientation(image, name) > 4:
        vars(image)["filename"] = ""  # else PIL 13 maps the file with the turned size, which scrambles the pixels
    try:
        with decoding(name), _any_number_of_pixels():
            image.load()
    finally:
        if path:
            vars(image)["filename"] = path


def upright(image: Image.Image, name: str) -> Image.Image:
    """A decoded image, turned as its EXIF data says."""
    left = _orientation(image, name)
    return image.transpose(_TURNS[left]) if left in _TURNS else image


def _decode(image: Image.Image, name: str, max_side: int, turn: bool) -> Image.Image:
    check_size(name, *image.size, max_side)  # known before any pixel is decoded
    # PIL turns TIFF images as it loads them, and forgets by how much; other formats may decode to find it.
    in_file = _orientation(image, name) if image.format == "TIFF" else 1
    negative, wide = _is_negative(image), packing(image)[1].startswith(("RGB;16", "RGBA;16", "RGBX;16", "LA;16"))
    load_pixels(image, name, max_side)
    with enough_memory(name):
        if turn:
            image = upright(image, name)
        elif in_file in _TURNS and _orientation(image, name) != in_file:
            image = image.transpose(_TURNS[_INVERSE.get(in_file, in_file)])
        rgb = _to_rgb(image, name, negative)
        if wide:
            _warn_if_dark(name, 257 * int(np.asarray(rgb).max()))
    rgb.info.clear()  # its EXIF data would turn the image a second time
    return rgb


def _orientation(image: Image.Image, name: str) -> int:
    # Not ImageOps.exif_transpose: it rewrites the EXIF data, which fails if any other entry is damaged.
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # the pixels are sound, so damaged EXIF data is no reason to refuse them
        _warn("%s: its EXIF data is damaged, so no rotation is applied (%s)", name, _one_line(error))
        return 1


def _is_negative(image: Image.Image) -> bool:
    """Whether white is stored as zero, in 16-bit TIFF images, which PIL leaves so."""
    return image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0


def packing(image: Image.Image) -> tuple[str, str, Any]:
    """How an opened file is packed, in PIL's words: the decoder, the raw mode and the last argument of the decoder."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return "", "", None
    decoder, arguments = tiles[0][0], tiles[0][3]  # by index: tiles had no names before Pillow 11
    arguments = tuple(arguments or [""]) if isinstance(arguments, (tuple, list)) else (arguments or "",)
    return decoder, str(arguments[0]), arguments[-1]


def _to_rgb(image: Image.Image, name: str, negative: bool) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point pixels, whose range is not known; expected 8 or 16 bits.")
    if image.mode == "I" or image.mode.startswith("I;"):
        return _from_16_bit(image, name, negative)
    try:
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"{name} is of PIL mode {image.mode}, which has no conversion to RGB.") from error


def _from_16_bit(image: Image.Image, name: str, negative: bool) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name} holds grey levels {low}..{high}; expected 16 bits, 0..65535.")
    _warn_if_dark(name, high)
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if negative:
        grey = 255 - grey
    if isinstance(image.info.get("transparency"), int):
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _warn_if_dark(name: str, high: int) -> None:
    """Camera and scanner data of fewer bits is often stored in 16 without being scaled."""
    bits = next((bits for bits in (8, 10, 12, 14) if 0 < high < 2**bits), None)
    if bits is not None:
        _warn("%s: no level is above %d of 65535, so it looks like %d bits in a file of 16 and will be dark; scale "
              "its levels to 16 bits", name, high, bits)  # fmt: skip


@lru_cache(maxsize=10_000)  # once for each image, however often it is read
def _warn(sentence: str, *values: object) -> None:
    logger.warning(sentence, *values)


def check_size(name: str, width: int, height: int, max_side: int) -> None:
    """Raises `ImageError` if a side is beyond the limits."""
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name} is {width} x {height} pixels; expected at least {MIN_SIDE} x {MIN_SIDE}.")
    if max(width, height) > max_side:
        size = f"{width} x {height} pixels, more than max_side = {max_side}"
        raise ImageError(f"{name} is {size}: cut it into tiles, shrink it, or raise max_side (--max-side).")


def _heif_kind(path: str) -> str | None:
    """HEIC or AVIF, by the beginning of the file; None for anything else."""
    with open(path, "rb") as file:
        start = file.read(12)
    if start[4:8] != b"ftyp":
        return None
    brand = start[8:12]
    if brand in (b"avif", b"avis"):
        return "AVIF"
    return "HEIC" if brand in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1") else None


def _register_heif(kind: str) -> bool:
    """Make PIL read HEIC or AVIF, if a package for it is installed."""
    try:
        if kind == "AVIF":
            import_module("pillow_avif")
        else:
            import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
