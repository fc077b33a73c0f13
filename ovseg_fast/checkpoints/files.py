"""Reading checkpoint files of any make: recognised by content, never run as code, refused in one sentence."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError
from .pickles import LEGACY, LEGACY_START, read_torch
from .tensors import read_safetensors

WRAPPERS = ("model", "state_dict")  # detectron2's and mmseg's name for the state dict within a checkpoint
PREFIX = re.compile(r"(module\.|_orig_mod\.)+")  # of every key, by DistributedDataParallel and torch.compile
ARCHIVE = b"PK\x03\x04"  # start of a zip archive, which torch.save writes
OTHERS = {  # how files of other kinds begin
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (.h5), as Keras and MATLAB write them",
    b"\x93NUMPY": "a numpy array (.npy)",
    b"GGUF": "a GGUF file of language models",
    b"\x1f\x8b": "packed with gzip",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ\x00": "packed with xz",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"PK\x05\x06": "an empty zip archive",
    b"\x7fELF": "a program",
}


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
        OSError, MemoryError: it cannot be opened, or is too large for the memory.
    """
    file = Path(path)
    kind = file_kind(file)
    if kind == "safetensors":
        content, metadata = read_safetensors(file)
        return unwrap(content, f"'{file}'"), metadata
    return unwrap(read_torch(file, zipped=kind == "zip"), f"'{file}'"), {}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file, empty for other checkpoints; reads no tensor. Errors as `read`."""
    file = Path(path)
    return read_safetensors(file, tensors=False)[1] if file_kind(file) == "safetensors" else {}


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
    others = [key for key, value in content.items() if not (isinstance(key, str) and _is_plain(value))]
    if others:
        kinds = [f"{key!r} ({_kind(content[key])})" for key in others]
        raise CheckpointError(
            f"{what} must hold tensors by name, bare or under 'model' or 'state_dict', got {first_of(kinds)}."
        )
    if all(PREFIX.match(key) for key in content):
        return {PREFIX.sub("", key, count=1): tensor for key, tensor in content.items()}
    return dict(content)


def _is_plain(value: object) -> bool:
    """Whether it is a tensor that holds its numbers one by one."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_meta or value.is_quantized)


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "quantized" if value.is_quantized else "without values" if value.is_meta else str(value.layout)


def first_of(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def file_kind(path: Path) -> str:
    """A file's kind by its first bytes: "zip" or "legacy", which torch.load reads, or "safetensors".

    Raises:
        FileNotFoundError: no such file. OSError: it cannot be read. CheckpointError: it is none of these.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except (FileNotFoundError, ValueError):  # a null character in the name
        raise FileNotFoundError(f"there is no checkpoint file '{path}'.") from None
    except OSError as error:
        if path.is_dir():
            raise CheckpointError(f"'{path}' is a folder, expected a checkpoint file.") from None
        raise OSError(f"cannot read '{path}': {error.strerror or error}.") from error
    if not head:
        raise CheckpointError(f"'{path}' is empty (0 bytes), expected a checkpoint; download or save it again.")
    if head.startswith(ARCHIVE) or ARCHIVE.startswith(head):
        return "zip"
    _refuse_text(path, head)
    if head[8:9] == b"{":  # after the header's length; the header is JSON
        return "safetensors"
    if LEGACY in head[:32] or (LEGACY_START + LEGACY).startswith(head):
        return "legacy"
    raise CheckpointError(_other_kind(path, head))


def _other_kind(path: Path, head: bytes) -> str:
    """What a file is that this package does not read."""
    if re.match(rb"\x80[\x02-\x05]", head):
        with open(path, "rb") as file:
            arrays = re.search(rb"numpy\W", file.read(1 << 20))
        if arrays:
            return (
                f"'{path}' is a pickle of numpy arrays, as detectron2's model zoo has them, not a PyTorch file; if you "
                "trust it, load it with pickle and save its arrays as tensors with torch.save."
            )
        return f"'{path}' is a pickle that torch.save did not write, or damaged; save the state dict with torch.save."
    if head[257:262] == b"ustar":
        old = b"sys_info" in head[:100] or b"pickle" in head[:100] or b"storages" in head[:100]
        cure = "load it with an old PyTorch and save it again" if old else "unpack it first"
        return f"'{path}' is a tar archive{', as PyTorch 0.1 wrote them' if old else ''}; {cure}."
    if path.suffix.lower() == ".onnx" or re.match(rb"\x08[\x01-\x20][\x12\x3a\x42]", head):
        return f"'{path}' is an ONNX model, expected a checkpoint of PyTorch (.pth, .pt, .bin or .safetensors)."
    for start, kind in OTHERS.items():
        if head.startswith(start):
            return f"'{path}' is {kind}, expected a checkpoint of PyTorch (.pth, .pt, .bin or .safetensors)."
    return f"'{path}' is neither a PyTorch nor a safetensors file, or it is damaged."


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
    if path.name.endswith(".index.json"):
        raise CheckpointError(f"'{path}' is the index of a checkpoint in several files; join them into one file first.")
    if re.search(r"<(!doctype|html|head|body)\b", text, re.IGNORECASE):
        raise CheckpointError(f"'{path}' is a web page about the checkpoint; download the checkpoint itself.")
    raise CheckpointError(f"'{path}' is a text file, expected a checkpoint (.pth, .pt, .bin or .safetensors).")
