"""PyTorch's own files: tensors are taken out of their pickles, everything else in them stays inert.

Training frameworks put much beside the tensors: numpy's numbers and arrays (mmcv, mmengine, detectron2),
configurations, histories, paths, dates. With `weights_only=True`, `torch.load` refuses all names but a few. Here, names
known to be harmless get a stand-in that takes any arguments and keeps none: no code of theirs runs either.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..compat import lacks_memory
from .errors import CheckpointError, damaged

LEGACY_START, LEGACY = b"\x80\x02", b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e"  # before torch 1.6
HARMLESS = re.compile(
    r"(numpy|mmcv|mmengine|detectron2|fvcore|iopath|yacs|addict|omegaconf|easydict|ml_collections|datetime|pathlib"
    r"|argparse|collections|functools|copyreg|enum|uuid|decimal|fractions|typing"
    r"|pytorch_lightning|lightning|lightning_fabric|torch\.torch_version|torch\.optim\.lr_scheduler)(\.\w+)+"
    # `getattr` is how methods are named, such as those in mmengine's HistoryBuffer.
    r"|types\.SimpleNamespace|(builtins\.)?(getattr|slice|range|frozenset|dict|list|tuple|int|float|str|bool|bytes|object)"
)
PLAIN = {"scalar": "numpy number", "_reconstruct": "numpy array"}  # what people call them
MAPPINGS, LISTS = ("dict", "Dict", "CfgNode"), ("list", "deque")  # endings of names
_LOADING = threading.Lock()  # torch's list of allowed names is one for all threads


def read_torch(path: Path, zipped: bool) -> object:
    """The content of a torch.save file: tensors in plain containers, with stand-ins for harmless other things.

    Raises:
        CheckpointError: it is damaged, or holds other objects. MemoryError: it does not fit into the memory.
    """
    if zipped:
        check_archive(path)
    allowed: dict[str, Any] = {}
    while True:
        try:
            return _load(path, zipped, allowed)
        except Exception as error:  # a damaged pickle can fail as anything
            name = _refused_name(error)
            if name is None or name in allowed or not HARMLESS.fullmatch(name):
                raise _error(path, zipped, error, name) from error
            allowed[name] = stand_in(name)


def _load(path: Path, zipped: bool, allowed: dict[str, Any]) -> object:
    names = [name if "." in name else f"builtins.{name}" for name in allowed]
    pairs: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [*zip(allowed.values(), names, strict=True)]
    with _LOADING, warnings.catch_warnings(), torch.serialization.safe_globals(pairs):
        warnings.simplefilter("ignore")  # about old pickles; the sentences below say what matters
        # Mapping saves a second copy in memory. It needs a zipped file that is not packed, a name that it can encode,
        # and the name of another format misleads it.
        if zipped and path.suffix != ".safetensors" and not _is_packed(path) and _is_utf8(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)


def stand_in(name: str) -> type:
    """A class in place of the one of this name. Like a container it can be filled; nothing else comes of it."""
    made: type | None = OrderedDict if name.endswith(MAPPINGS) else list if name.endswith(LISTS) else None

    class StandIn:
        def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
            if name == "getattr":  # of a class; what comes of it may be called, and gives the same again
                return cls
            return super().__new__(cls) if made is None else made()

        def __init__(self, *arguments: Any, **keywords: Any) -> None: ...

        def __setstate__(self, state: Any) -> None: ...

    StandIn.__name__ = PLAIN.get(name.rpartition(".")[2], name)
    return StandIn


def _refused_name(error: Exception) -> str | None:
    """The full name that torch.load stopped at, if that is why it failed; `builtins.` is left out."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return None if found is None else found[1].rstrip(".")


def _error(path: Path, zipped: bool, error: Exception, name: str | None) -> Exception:
    """What torch.load's error means. An archive whose checksums are right is not damaged, whatever it holds."""
    text = str(error)
    if lacks_memory(error):
        asked = re.search(r"allocate (\d+) bytes", text)
        if asked is None or int(asked[1]) <= path.stat().st_size:
            return MemoryError(f"there is not enough memory to read '{path}' ({path.stat().st_size:,} bytes).")
        return damaged(path)
    if name is not None and not (not zipped and _ends_within(path, name)):
        return CheckpointError(
            f"'{path}' holds Python objects ({name}), which are not loaded because a file can run code through "
            "them; if you trust it, save its state dict alone to another file."
        )
    protocol = _protocol(path, zipped)
    if not zipped and protocol not in (4, 5):
        return damaged(path)
    if protocol not in (2, 3):
        return CheckpointError(
            f"'{path}' was saved with pickle protocol {protocol}, which PyTorch does not read safely; save it again "
            "with torch.save's default, pickle_protocol=2."
        )
    reason = text.rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0].rstrip(".")
    return CheckpointError(
        f"'{path}' holds something that PyTorch does not read safely ({reason or type(error).__name__})."
    )


def _ends_within(path: Path, name: str) -> bool:
    """Whether a pickle was cut off within this name, which then only looks foreign."""
    stem = name.encode()
    with open(path, "rb") as file:
        file.seek(-min(len(stem) + 2, path.stat().st_size), os.SEEK_END)  # its reader drops the last character
        return stem in file.read().replace(b"\n", b".")


def _protocol(path: Path, zipped: bool) -> int:
    """Of the pickle; 0 for the oldest, which do not say."""
    if zipped:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            head = archive.read(name)[:2]
    else:
        with open(path, "rb") as file:
            head = file.read(2)
    return head[1] if len(head) == 2 and head[0] == 0x80 else 0


def _is_packed(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_archive(path: Path) -> None:
    """Refuse zip archives that torch.load cannot read, or would read as something else.

    It does not compare their checksums itself, so that a damaged file gives other numbers without a word.

    Raises:
        CheckpointError: the archive is damaged, or torch.save did not write it. OSError: the disk fails.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_kind(path, archive.namelist())
            _check_sums(archive.infolist(), archive)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive can fail as anything
        if lacks_memory(error):
            raise MemoryError(f"there is not enough memory to read '{path}'.") from error
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # this one is a seek to before the beginning
            raise OSError(f"cannot read '{path}': {error.strerror or error}.") from error
        raise damaged(path) from error


def _check_kind(path: Path, names: list[str]) -> None:
    parts = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in parts:
        what = "a TorchScript program, as OpenAI publishes CLIP, not a checkpoint of a segmentation model"
    elif any(name.endswith(".npy") for name in names):
        what = "an archive of numpy arrays (.npz), not a checkpoint; save its arrays as tensors with torch.save"
    elif "archive_format" in parts:
        what = "an exported PyTorch program (.pt2), not a checkpoint; save the model's state dict"
    elif "model.weights.h5" in parts:
        what = "a Keras model, not a checkpoint of PyTorch"
    elif "data.pkl" not in parts:
        inside = next((name for name in names if name.endswith((".safetensors", ".pth", ".pt", ".bin", ".ckpt"))), None)
        unpack = "unpack it first" if inside is None else f"unpack it and use '{inside}' in it"
        what = f"a zip archive that torch.save did not write; {unpack}"
    else:
        return
    raise CheckpointError(f"'{path}' is {what}.")


def _check_sums(entries: list[zipfile.ZipInfo], archive: zipfile.ZipFile) -> None:
    """Read everything once. Raises whatever zipfile raises, or ValueError."""
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("two entries have one name")
    if not any(entry.CRC for entry in entries):  # torch.serialization.set_crc32_options(False) leaves them out
        return
    for entry in entries:
        if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
            raise ValueError("an entry has two sizes")
        if entry.external_attr & 0x10 and not entry.is_dir():  # torch.load takes it for an empty folder
            raise ValueError("an entry is a folder")
        with archive.open(entry) as stream:
            while stream.read(1 << 20):
                pass
