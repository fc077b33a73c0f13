"""Images of any kind in, RGB images out, or one sentence that says why not."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

ImageSource: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray

MIN_SIDE = 2
MAX_SIDE = 16384
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
)

_NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_TURNS = {orientation: Image.Transpose[name] for orientation, name in enumerate(_NAMES.split(), 2)}  # from EXIF's 2..8

logger = logging.getLogger(__name__)


class ImageError(ValueError):
    """An image cannot be used; the message is one sentence that names it."""


class MissingImageError(ImageError, FileNotFoundError):
    """There is no such file or folder."""


def load_image(source: ImageSource, max_side: int = MAX_SIDE) -> Image.Image:
    """Read an image, of several pages the first, as RGB with eight bits a channel.

    Transparent parts become white, 16-bit grey levels are scaled to 0..255, and the EXIF orientation is applied.

    Args:
        source: a path, a PIL image, or a uint8 array (H, W, 3) of RGB; it is left as it is.
        max_side: largest accepted side in pixels; the smallest is 2.

    Raises:
        TypeError: `source` is of another type. ValueError: `max_side` is not a whole number of at least 2.
        MissingImageError: no such file.
        ImageError: a folder, an empty, damaged or truncated file, not an image, too small, too large, or of a kind
            without an agreed conversion to RGB.
    """
    if isinstance(max_side, bool) or not isinstance(max_side, int) or max_side < MIN_SIDE:
        raise ValueError(f"max_side must be a whole number of pixels, at least {MIN_SIDE}, got {max_side!r}.")
    if isinstance(source, Image.Image):
        path = getattr(source, "filename", "")
        return _decode(source, f"image '{path}'" if path else "the given PIL image", max_side)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            got = f"{source.dtype} of shape {source.shape}"
            raise ImageError(f"an image array must be uint8 of shape (H, W, 3), RGB, got {got}.")
        _check_size("the given array", source.shape[1], source.shape[0], max_side)
        return Image.fromarray(source)
    if isinstance(source, (str, os.PathLike)):
        with open_image(os.fsdecode(source)) as image:
            return _decode(image, f"image '{os.fsdecode(source)}'", max_side)
    raise TypeError(
        "an image must be a path, a PIL image or a uint8 array (H, W, 3), got "
        f"{type(source).__module__}.{type(source).__qualname__}."
    )


def list_images(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Expand files and folders into image files, without duplicates.

    A folder stands for the files directly in it with a usual image suffix, sorted by name, without hidden ones.

    Raises:
        MissingImageError: a path does not exist.
        ImageError: no path is given, or a folder holds no image.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise MissingImageError(f"there is no file or folder '{path}'.")
        for file in _images_in(path) if path.is_dir() else [path]:
            found.setdefault(os.path.abspath(file), file)
    if not found:
        raise ImageError("no image was given: expected at least one file or folder.")
    return list(found.values())


def _images_in(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ImageError(f"folder '{folder}' cannot be read: {error.strerror or error}.") from error
    named = [entry for entry in entries if entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".")]
    files = [entry for entry in named if not entry.is_dir()]  # not is_file: a broken link is reported as missing
    if not files:
        raise ImageError(f"folder '{folder}' holds no image, that is, no file named {', '.join(SUFFIXES)}.")
    return files


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
    with decoding(name):
        return Image.open(path)


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Raises `ImageError` for whatever PIL raises in this block, other than MemoryError."""
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not in an image format that PIL reads, or its beginning is damaged.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = _one_line(error).partition(",")[0]  # both the size and the limit
        cure = "cut it into tiles, shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS"
        raise ImageError(f"{name} was refused by PIL ({reason}): {cure}.") from error
    except Exception as error:  # damaged files raise anything: OSError, SyntaxError, struct.error, EOFError, ...
        if isinstance(error, OSError) and error.strerror:
            raise ImageError(f"{name} cannot be read: {error.strerror}.") from error
        raise ImageError(f"{name} is damaged or truncated and cannot be decoded ({_one_line(error)}).") from error


def _decode(image: Image.Image, name: str, max_side: int) -> Image.Image:
    _check_size(name, *image.size, max_side)  # known before any pixel is decoded
    with decoding(name):
        image.load()
    rgb = _to_rgb(_upright(image, name), name)
    rgb.info.clear()  # its EXIF data would turn the image a second time
    return rgb


def _upright(image: Image.Image, name: str) -> Image.Image:
    # Not ImageOps.exif_transpose: it rewrites the EXIF data, which fails if any other entry is damaged.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # the pixels are sound, so damaged EXIF data is no reason to refuse them
        logger.warning("%s: its EXIF data is damaged, so no rotation is applied (%s)", name, _one_line(error))
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point pixels, whose range is not known; expected 8 or 16 bits.")
    if image.mode == "I" or image.mode.startswith("I;"):
        return _from_16_bit(image, name)
    try:
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"{name} is of PIL mode {image.mode}, which has no conversion to RGB.") from error


def _from_16_bit(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name} holds grey levels {low}..{high}; expected 16 bits, 0..65535.")
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _check_size(name: str, width: int, height: int, max_side: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name} is {width} x {height} pixels; expected at least {MIN_SIDE} x {MIN_SIDE}.")
    if max(width, height) > max_side:
        size = f"{width} x {height} pixels, more than max_side = {max_side}"
        raise ImageError(f"{name} is {size}: cut it into tiles, shrink it, or raise max_side.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
