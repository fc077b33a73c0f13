"""Bare TIFF files, of the kinds that PIL reads but does not write."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

UNCOMPRESSED, DEFLATE, PACKBITS = 1, 8, 32773


def write_tiff(
    path: Path,
    values: np.ndarray,
    bits: int,
    photometric: int,
    *,
    order: str = "<",
    fill: int = 1,
    compression: int = UNCOMPRESSED,
    orientation: int = 1,
) -> Path:
    """(H, W) values of that many bits as they are. `photometric` 0: white is zero, 1: black is zero, 3: a palette."""
    if bits == 16:
        rows = values.astype(f"{order}u2").tobytes()
    else:
        unpacked = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
        rows = np.packbits(unpacked.reshape(len(values), -1), axis=-1).tobytes()
    if compression == DEFLATE:
        rows = zlib.compress(rows)
    elif compression == PACKBITS:
        rows = b"".join(bytes([len(part) - 1]) + part for part in (rows[i : i + 100] for i in range(0, len(rows), 100)))
    if fill == 2:  # the lowest bit of a byte first
        rows = np.packbits(np.unpackbits(np.frombuffer(rows, np.uint8)).reshape(-1, 8)[:, ::-1]).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: compression, 262: photometric, 266: fill, 273: 0}
    tags |= {274: orientation, 277: 1, 278: height, 279: len(rows)}
    colours = np.random.default_rng(0).integers(0, 2**16, 3 * 2**bits, dtype=np.uint16) if photometric == 3 else None
    end = 8 + 2 + 12 * (len(tags) + (colours is not None)) + 4
    tags[273] = end + (0 if colours is None else colours.nbytes)
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    if colours is not None:
        entries += struct.pack(f"{order}HHII", 320, 3, len(colours), end)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries) // 12)
    table = b"" if colours is None else colours.astype(f"{order}u2").tobytes()
    path.write_bytes(start + entries + bytes(4) + table + rows)
    return path
