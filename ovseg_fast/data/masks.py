"""Mask files in any convention, as label maps with -1 for "no class"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..images import ImageError, MissingImageError, decoding, open_image

NO_CLASS = -1
NO_CLASS_VALUES = (255, 65535)  # in files of 8 and 16 bits, unless a class has that index
_BEYOND = -2

# PIL spreads grey levels of 2 and 4 bits over 0..255, which would turn index 1 into 85 or 17.
_SPREAD = {"L;2": 85, "L;4": 17}


class DataError(ValueError):
    """A pair of image and mask cannot be used; the message is one sentence that names the file, `kind` is for code."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str]]:
        return type(self), (self.kind, str(self))  # loader processes send their errors pickled


def read_mask(path: Path) -> np.ndarray:
    """The values (H, W) int32 in a mask file: grey levels of 1 to 16 bits, or the indices into a palette.

    Raises:
        DataError: `missing-mask`: no such file; `unreadable-mask`: a folder, empty, damaged, truncated, or in colour.
    """
    try:
        with open_image(str(path), "mask") as image:
            mode = image.mode
            packing = image.tile[0].args if image.tile else None
            with decoding(f"mask '{path}'"):
                values = np.asarray(image)
    except ImageError as error:
        kind = "missing-mask" if isinstance(error, MissingImageError) else "unreadable-mask"
        raise DataError(kind, str(error)) from error
    if values.ndim != 2 or values.dtype.kind not in "bui":
        expected = "expected one class index per pixel (greyscale)"
        raise DataError("unreadable-mask", f"mask '{path}' is of PIL mode {mode}, {expected}.")
    if isinstance(packing, (tuple, list)):
        packing = packing[0] if packing else None
    return values.astype(np.int32) // _SPREAD.get(str(packing), 1)


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
