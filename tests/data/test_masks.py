from __future__ import annotations

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovseg_fast.data.masks import DataError, MaskValues, read_mask


def test_mask_formats_give_their_indices(tmp_path: Path) -> None:
    random = np.random.default_rng(np.random.randint(2**31))
    small = random.integers(0, 256, (5, 8), dtype=np.uint8)
    large = random.integers(0, 2**16, (5, 8), dtype=np.uint16)
    palette = Image.fromarray(small).convert("P")
    palette.putdata(small.flatten().tolist())
    palette.putpalette(random.integers(0, 256, 768, dtype=np.uint8).tobytes())
    palette.save(tmp_path / "palette.png")
    Image.fromarray(small).save(tmp_path / "grey.png")
    Image.fromarray(large).save(tmp_path / "sixteen.png")
    Image.fromarray(large).save(tmp_path / "sixteen.tif")
    Image.fromarray(small > 100).save(tmp_path / "bits.png")
    for name, values in {
        "palette.png": small,
        "grey.png": small,
        "sixteen.png": large,
        "sixteen.tif": large,
        "bits.png": small > 100,
    }.items():
        read = read_mask(tmp_path / name)
        assert read.dtype == np.int32
        np.testing.assert_array_equal(read, values, err_msg=name)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_packed_grey_levels_stay_indices(tmp_path: Path, bits: int) -> None:
    values = np.random.default_rng(np.random.randint(2**31)).integers(0, 2**bits, (3, 8), dtype=np.uint8)

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    unpacked = np.unpackbits(values[..., None], axis=-1)[..., 8 - bits :].reshape(3, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(unpacked, axis=-1))
    file = tmp_path / "packed.png"
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 3, bits, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    np.testing.assert_array_equal(read_mask(file), values)


def test_unreadable_masks_are_told(tmp_path: Path) -> None:
    random = np.random.default_rng(np.random.randint(2**31))
    whole = tmp_path / "whole.png"
    Image.fromarray(random.integers(0, 9, (64, 64), dtype=np.uint8)).save(whole)
    (tmp_path / "truncated.png").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "words.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(random.integers(0, 9, (4, 4, 3), dtype=np.uint8)).save(tmp_path / "colour.png")
    Image.fromarray(random.random((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    for name, kind, sentence in [
        ("none.png", "missing-mask", "there is no mask file '"),
        ("truncated.png", "unreadable-mask", "is damaged or truncated and cannot be decoded ("),
        ("empty.png", "unreadable-mask", "is empty (0 bytes)."),
        ("words.png", "unreadable-mask", "is not in an image format that PIL reads, or its beginning is damaged."),
        ("folder.png", "unreadable-mask", "is a folder, expected a file."),
        ("colour.png", "unreadable-mask", "is of PIL mode RGB, expected one class index per pixel (greyscale)."),
        ("float.tif", "unreadable-mask", "is of PIL mode F, expected one class index per pixel (greyscale)."),
    ]:
        with pytest.raises(DataError) as caught:
            read_mask(tmp_path / name)
        assert caught.value.kind == kind and sentence in str(caught.value) and name in str(caught.value)


def test_values_become_classes() -> None:
    def labels(classes: list[int] | range, values: list[int]) -> list[int]:
        return MaskValues(classes).labels(np.array([values], np.int32), Path("mask.png"))[0].tolist()

    assert labels(range(3), [0, 1, 2, 255, 65535]) == [0, 1, 2, -1, -1]
    assert labels([-1, 2, 0, 1], [0, 1, 2, 3, 255]) == [-1, 2, 0, 1, -1]
    assert labels(range(847), [0, 255, 846, 65535]) == [0, 255, 846, -1]  # 255 is a class there
    assert labels(range(255), [254, 255]) == [254, -1]
    assert MaskValues(range(3)).labels(np.zeros((0, 4), np.int32), Path("mask.png")).shape == (0, 4)


def test_label_beyond_the_list_is_told() -> None:
    with pytest.raises(DataError, match=r"^mask 'm.png' holds label 3, beyond the list of classes; ") as caught:
        MaskValues(range(3)).labels(np.array([[0, 3, 255]]), Path("m.png"))
    assert caught.value.kind == "label"
    assert str(caught.value).endswith("expected 0..2, or 255 or 65535 for no class.")
    with pytest.raises(
        DataError, match=r"holds labels -7, 847, 848, 849, 70000, \.\.\., beyond .*0\.\.846, or 65535 for"
    ):
        MaskValues(range(847)).labels(np.array([[-7, 255, 847, 848, 849, 70000, 70001]]), Path("m.png"))


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(DataError("size", "one sentence.")))
    assert (type(error), error.kind, str(error)) == (DataError, "size", "one sentence.")
