"""Makes `import torchvision` work if its compiled half does not load. open_clip and timm use its Python half.

A wheel that was compiled against another torch build silently skips its compiled half, and then fails on import,
because it describes the operators `torchvision::nms` and `torchvision::qnms` that this half would have defined.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[Any] = []  # an operator lives as long as the library object that defined it


def ensure_importable() -> None:
    """Import torchvision, with empty `nms` and `qnms` operators if its compiled half is missing.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: torchvision fails for another reason than the missing operators.
    """
    try:  # first as it is: defining an operator that the compiled half defines too is an error
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
    # The failed import left its submodules behind; they must run again.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    importlib.import_module("torchvision")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that the memory did not suffice. For a CPU, PyTorch has no type of its own for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "not enough memory", "cannot allocate memory", "bad_alloc", "out of memory")
    return isinstance(error, (RuntimeError, OSError)) and any(word in str(error).lower() for word in words)
