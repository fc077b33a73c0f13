"""Makes ``import torchvision`` work where its compiled half does not load.

open_clip and timm import torchvision for its Python half (image transforms). A torchvision wheel that was
compiled against another torch build (a CUDA wheel next to a CPU torch, say) still installs, skips its
compiled half without a word, and then fails on import, because it describes the operators
``torchvision::nms`` and ``torchvision::qnms`` that this half would have defined.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# An operator lives as long as the library object that defined it.
_libraries: list[Any] = []


def ensure_importable() -> None:
    """Imports torchvision, with empty ``nms`` and ``qnms`` operators where its compiled half is missing.

    The plain import is tried first: defining an operator that the compiled half defines too would be an
    error. Safe to call any number of times.

    Raises:
        ImportError: when torchvision is not installed.
        RuntimeError: when torchvision fails for another reason than the missing operators.
    """
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise

    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + _SCHEMA)
    _libraries.append(library)
    # The failed import leaves its submodules behind; they must run again.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    importlib.import_module("torchvision")
