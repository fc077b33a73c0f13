"""Safetensors files, read strictly and written so that equal content gives equal bytes.

The format has no checksum of its own: own files carry one in their metadata, which `read_safetensors` compares.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..compat import lacks_memory
from .errors import CheckpointError, damaged

FORMAT, VERSION = "ovseg-fast", "1"  # in the metadata of own files
CHECKSUM = "crc32"  # key in the metadata
COVERED = ("classes", "format", "preset", "version")  # keys that the checksum covers, besides all tensors
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors in a fixed order, metadata sorted and with a checksum.

    Not with safetensors' own function: it shuffles the metadata, and leaves a second temporary file if it is killed.
    """
    metadata = {**metadata, CHECKSUM: checksum(tensors, metadata)}
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps each of them aligned
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(bytes_of(tensors[name]))


def read_safetensors(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, unless they are not wanted, and the metadata of a safetensors file.

    Raises:
        CheckpointError: it is damaged; that a tensor was altered shows if the file has a checksum.
    """
    try:
        with _utf8(path) as name, safe_open(name, framework="pt") as file:
            metadata = {str(key): str(value) for key, value in (file.metadata() or {}).items()}
            state = {name: file.get_tensor(name) for name in (file.keys() if tensors else ())}
    except Exception as error:  # safetensors' own, or whatever torch makes of a strange shape
        if lacks_memory(error):
            raise MemoryError(f"there is not enough memory to read '{path}'.") from error
        raise damaged(path) from error
    own = metadata.get("format") == FORMAT and metadata.get("version") == VERSION
    if own and not metadata.keys() <= {CHECKSUM, *COVERED}:  # the checksum's own name may be damaged
        raise damaged(path)
    if tensors and CHECKSUM in metadata and metadata[CHECKSUM] != checksum(state, metadata):
        raise CheckpointError(f"'{path}' is damaged: its content has another checksum than when it was saved.")
    return state, metadata


@contextmanager
def _utf8(path: Path) -> Iterator[Path]:
    """The path, or a link to the file for a path that is not UTF-8, which safetensors does not open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, "link.safetensors")
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Eight hexadecimal digits that follow from the names, types, shapes and bytes of the tensors, and the metadata."""
    value = zlib.crc32(json.dumps([metadata.get(key) for key in COVERED]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(bytes_of(tensor), value)
    return f"{value:08x}"


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in the memory, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
