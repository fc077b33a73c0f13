"""Reading checkpoint files of any make: recognised by content, never run as code, refused in one sentence."""

from __future__ import annotations

import codecs
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WRAPPERS = ("model", "state_dict")  # detectron2's and mmseg's name for the state dict within a checkpoint
PREFIX = re.compile(r"(module\.|_orig_mod\.)+")  # of every key, by DistributedDataParallel and torch.compile
ARCHIVE = b"PK\x03\x04"  # start of a zip archive, which torch.save writes


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or belongs to another model.

    The first line of the message is one sentence; further lines name every key that does not fit.

    Attributes:
        missing, unexpected, mismatched: keys that the checkpoint lacks, that the model lacks, and of another shape.
    """

    def __init__(
        self, message: str, missing: Iterable[str] = (), unexpected: Iterable[str] = (), mismatched: Iterable[str] = ()
    ) -> None:
        super().__init__(message)
        self.missing, self.unexpected, self.mismatched = tuple(missing), tuple(unexpected), tuple(mismatched)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint file, whatever its format; no code in the file is run.

    Args:
        path: a PyTorch file (.pth, .pt, .bin) or a safetensors file, told apart by content.

    Returns:
        The state dict on the CPU, without wrapping dicts and the `module.` prefix, and the metadata of a safetensors
        file. Tensors of PyTorch files are mapped from the file, so it must not be overwritten while they are used.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, not a checkpoint, or holds other objects than tensors.
    """
    file = Path(path)
    kind = file_kind(file)
    if kind == "safetensors":
        content, metadata = _read_safetensors(file)
        return unwrap(content, f"'{file}'"), metadata
    return unwrap(_read_torch(file, zipped=kind == "zip"), f"'{file}'"), {}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file, empty for other checkpoints; reads no tensor. Errors as `read`."""
    file = Path(path)
    return _read_safetensors(file, tensors=False)[1] if file_kind(file) == "safetensors" else {}


def unwrap(content: object, what: str) -> dict[str, Tensor]:
    """The bare state dict in the content of a checkpoint; `what` names the checkpoint in errors.

    Raises:
        CheckpointError: it does not hold tensors by name, or holds other things too.
    """
    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        held = "an empty one" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise CheckpointError(f"{what} must hold a dict of tensors, got {held}.")
    others = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        kinds = [f"{key!r} ({type(content[key]).__name__})" for key in others]
        raise CheckpointError(
            f"{what} must hold tensors by name, bare or under 'model' or 'state_dict', got {first_of(kinds)}."
        )
    if all(PREFIX.match(key) for key in content):
        return {PREFIX.sub("", key, count=1): tensor for key, tensor in content.items()}
    return dict(content)


def first_of(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def file_kind(path: Path) -> str:
    """A file's kind by its first bytes: "zip" or "pickle", which torch.load reads, or "safetensors".

    Raises:
        FileNotFoundError: no such file. CheckpointError: it is none of these.
    """
    if path.is_dir():
        raise CheckpointError(f"'{path}' is a folder, expected a checkpoint file.")
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint file '{path}'.")
    with open(path, "rb") as file:
        head = file.read(1024)
    if not head:
        raise CheckpointError(f"'{path}' is empty (0 bytes), expected a checkpoint; download or save it again.")
    if head.startswith(ARCHIVE) or ARCHIVE.startswith(head):
        return "zip"
    _refuse_text(path, head)
    if head[8:9] == b"{":  # after the header's length; the header is JSON
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    raise CheckpointError(f"'{path}' is neither a PyTorch nor a safetensors file, or a damaged one; download it again.")


def _refuse_text(path: Path, head: bytes) -> None:
    """Failed downloads are mostly text; say which."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return
    if not all(letter.isprintable() or letter.isspace() for letter in text):
        return
    if text.startswith("version https://git-lfs"):
        raise CheckpointError(f"'{path}' is a Git LFS pointer, not the checkpoint itself; run 'git lfs pull' there.")
    if re.search(r"<(!doctype|html|head|body)\b", text, re.IGNORECASE):
        raise CheckpointError(f"'{path}' is a web page about the checkpoint; download the checkpoint itself.")
    raise CheckpointError(f"'{path}' is a text file, expected a checkpoint (.pth, .pt, .bin or .safetensors).")


def _read_torch(path: Path, zipped: bool) -> object:
    """The content of a torch.save file: tensors in plain containers, anything else is refused."""
    if zipped:
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickles; the sentences below say what matters
            # Mapping saves a second copy in memory. It needs a zipped file, and the name of another format misleads it.
            if zipped and path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail as anything
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign is None or _ends_within(path, foreign[1]):
            raise _damaged(path) from error
        raise CheckpointError(
            f"'{path}' holds Python objects ({foreign[1]}), which are not loaded because a file can run code through "
            "them; if you trust it, save its state dict alone to another file."
        ) from error


def _ends_within(path: Path, name: str) -> bool:
    """Whether a pickle was cut off within this name, which then only looks foreign."""
    stem = name.rstrip(".").encode()
    with open(path, "rb") as file:
        file.seek(-min(len(stem) + 2, path.stat().st_size), os.SEEK_END)  # its reader drops the last character
        return stem in file.read().replace(b"\n", b".")


def _check_archive(path: Path) -> None:
    """Refuse zip archives that torch.load cannot read, or would read as something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise _damaged(path) from error
    if "constants.pkl" in names:
        raise CheckpointError(
            f"'{path}' is a TorchScript program, as OpenAI publishes CLIP, not a checkpoint of a segmentation model."
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"'{path}' is a zip archive that torch.save did not write; unpack it first.")


def _read_safetensors(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys() if tensors else []
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"'{path}' ({path.stat().st_size:,} bytes) is damaged or cut short; download it again.")
