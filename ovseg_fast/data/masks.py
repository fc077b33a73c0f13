"""Mask files, in whatever convention a dataset keeps them, as label maps with -1 for "no class"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

NO_CLASS = -1
NO_CLASS_VALUES = (255, 65535)  # what files of 8 and of 16 bits say for it, unless a class has that index
_BEYOND = -2

# PIL spreads grey levels of fewer than 8 bits over 0..255, which would turn index 1 into 85 or 17.
_SPREAD = {"L;2": 85, "L;4": 17}


class DataError(ValueError):
    """A pair of image and mask cannot be used; the message is one sentence that names the file, `kind` is for code."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str]]:
        return type(self), (self.kind, str(self))  # loader processes send their errors pickled


def read_mask(path: Path) -> np.ndarray:
    """Indices out of a mask file as they stand there: greyscale of 1 to 16 bits, or a palette's indices.

    Returns:
        (H, W) int32.

    Raises:
        DataError: `missing-mask`: no such file; `unreadable-mask`: a folder, empty, damaged, truncated, or in colour.
    """
    if not path.exists():
        raise DataError("missing-mask", f"there is no mask file '{path}'.")
    if not path.is_file():
        raise DataError("unreadable-mask", f"mask '{path}' is not a plain file.")
    if path.stat().st_size == 0:
        raise DataError("unreadable-mask", f"mask '{path}' is empty (0 bytes).")
    try:
        with Image.open(path) as image:
            mode = image.mode
            layout = image.tile[0].args if image.tile else None
            values = np.asarray(image)
    except UnidentifiedImageError:
        raise DataError(
            "unreadable-mask", f"mask '{path}' is not in an image format that PIL reads, or its beginning is damaged."
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise whatever the format's reader happens to stumble over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            "unreadable-mask", f"mask '{path}' is damaged or truncated and cannot be decoded ({reason})."
        ) from error
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise DataError(
            "unreadable-mask", f"mask '{path}' is of PIL mode {mode}, expected one class index a pixel (greyscale)."
        )
    if isinstance(layout, (tuple, list)):
        layout = layout[0] if layout else None
    return values.astype(np.int32) // _SPREAD.get(str(layout), 1)


class MaskValues:
    """What the values in a dataset's mask files mean.

    Args:
        classes: the class of value 0, 1, 2, ...; -1 for a value that stands for no class. Of 255 and 65535 those that
            lie beyond this list stand for no class too.
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
            raise DataError(
                "label",
                f"mask '{path}' holds {'labels' if len(beyond) > 1 else 'label'} {listed}, beyond the list of classes; "
                f"expected 0..{self.count - 1}, or {' or '.join(map(str, self.no_class))} for no class.",
            )
        return labels
