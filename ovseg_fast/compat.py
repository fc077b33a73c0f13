"""Imports of other packages: what is missing, too old or broken is said in one sentence.

`import torchvision` is made to work if its compiled half does not load; open_clip and timm use its Python half. A wheel
that was compiled against another torch build silently skips its compiled half, and then fails on import, because it
describes the operators `torchvision::nms` and `torchvision::qnms` that this half would have defined.
"""

from __future__ import annotations

import importlib
import sys
import threading
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[Any] = []  # an operator lives as long as the library object that defined it
_lock = threading.Lock()
OLDEST_OPEN_CLIP = 2, 29  # also in pyproject.toml


def require(module: str, package: str, purpose: str) -> Any:
    """Import a module of another package.

    Raises:
        ImportError: it is missing, needs something that is missing, or fails; one sentence says which.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken package raises anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing == module.partition(".")[0]:
            raise ImportError(f"{purpose} needs {package}: pip install {package}", name=missing) from None
        if missing is not None:
            raise ImportError(f"{purpose} needs {missing}, which {package} uses: pip install {missing}") from error
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ImportError(f"{purpose} needs {package}, which is here but cannot be imported: {reason}.") from error


def open_clip() -> Any:
    """The package open_clip, imported.

    Raises:
        ImportError: it or torchvision is missing, too old or fails; one sentence says which.
    """
    with _lock:
        try:
            ensure_importable()
        except Exception as error:  # as in `require`
            if isinstance(error, ModuleNotFoundError) and error.name == "torchvision":
                raise ImportError("CLIP needs torchvision: pip install torchvision", name="torchvision") from None
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ImportError(f"CLIP needs torchvision, which is here but cannot be imported: {reason}.") from error
        module = require("open_clip", "open_clip_torch", "CLIP")
    version = importlib.import_module("open_clip.version").__version__  # older ones have it only there
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_OPEN_CLIP:
        oldest = ".".join(map(str, OLDEST_OPEN_CLIP))
        raise ImportError(
            f"CLIP needs open_clip_torch {oldest} or newer, got {version}: pip install -U open_clip_torch"
        )
    return module


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
