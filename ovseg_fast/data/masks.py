"""Mask files in any convention, as label maps with -1 for "no class"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..images import (
    MAX_SIDE,
    ImageError,
    MissingImageError,
    TooLargeError,
    enough_memory,
    load_pixels,
    open_image,
    packing,
)

NO_CLASS = -1
NO_CLASS_VALUES = (255, 65535)  # in files of 8 and 16 bits, unless a class has that index
_BEYOND = -2

# How PIL packs grey levels: of 2 and 4 bits it spreads them over 0..255, which would turn index 1 into 85 or 17;
# with an I, where white is zero, it turns them round; with an R, the bits come in another order.
_PACKING = re.compile(r"(1|L)(?:;([24])?(I)?R?)?")
_SPREAD = {"2": 85, "4": 17}


class DataError(ValueError):
    """A pair of image and mask cannot be used; the message is one sentence that names the file, `kind` is for code."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str]]:
        return type(self), (self.kind, str(self))  # loader processes send their errors pickled


def read_mask(path: Path, max_side: int = MAX_SIDE) -> np.ndarray:
    """The values (H, W) int32 in a mask file as they are stored: grey levels of 1 to 16 bits, or indices of a palette.

    Raises:
        DataError: `missing-mask`: no such file; `unreadable-mask`: a folder, empty, damaged, truncated, in colour, or
            with a side beyond `max_side`; `memory`: there is not enough of it.
    """
    name = f"mask '{path}'"
    try:
        with open_image(str(path), "mask") as image, enough_memory(name):
            packed = packing(image)
            load_pixels(image, name, max_side)
            return _stored(image, *packed, name)
    except ImageError as error:
        kinds = {MissingImageError: "missing-mask", TooLargeError: "memory"}
        raise DataError(kinds.get(type(error), "unreadable-mask"), str(error)) from error


def _stored(image: Image.Image, decoder: str, raw_mode: str, argument: Any, name: str) -> np.ndarray:
    """What the file holds, of what PIL made of it; how the file is packed is from `packing`."""
    values = np.asarray(image)
    if values.ndim != 2 or values.dtype.kind not in "bui":
        expected = "expected one class index per pixel (greyscale)"
        raise DataError("unreadable-mask", f"{name} is of PIL mode {image.mode}, {expected}.")
    values = values.astype(np.int32)
    if decoder in ("ppm", "ppm_plain") and image.mode != "1":
        # A Netpbm file says which value is white; PIL scales that to 255 or 65535.
        white = 65535 if image.mode.startswith("I") else 255
        return ((values.astype(np.int64) * argument + white // 2) // white).astype(np.int32)
    if match := _PACKING.fullmatch(raw_mode):
        _, bits, inverted = match.groups()
        if inverted:
            values = (1 if image.mode == "1" else 255) - values
        values //= _SPREAD.get(bits, 1)
    return values


class MaskValues:
    """The meaning of the values in mask files: `classes` holds the class of value 0, 1, 2, ..., -1 for no class.

    255 and 65535 mean no class if they are beyond this list.
    """

    def __init__(self, classes: Sequence[int]) -> None:
        self.count = len(classes)
        self.no_class = tuple(value for value in NO_CLASS_VALUES if value >= self.count)
        self._table = np.full(2**16, _BEYOND, np.int32)
        self._table[: self.count] = classes
        self._table[list(self.no_class)] = NO_CLASS

    def labels(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Label map (H, W) int32 with -1 of the values (H, W) in the file `path`.

        Raises:
            DataError: `label`: a value is beyond the list of classes.
        """
        inside = (values >= 0) & (values < len(self._table))
        labels = np.where(inside, self._table[np.where(inside, values, 0)], _BEYOND).astype(np.int32)
        if labels.size and labels.min() == _BEYOND:
            beyond = np.unique(values[labels == _BEYOND])
            listed = ", ".join(map(str, beyond[:5])) + (", ..." if len(beyond) > 5 else "")
            what = f"{'labels' if len(beyond) > 1 else 'label'} {listed}, beyond the list of classes"
            expected = f"0..{self.count - 1}, or {' or '.join(map(str, self.no_class))} for no class"
            raise DataError("label", f"mask '{path}' holds {what}; expected {expected}.")
        return labels
