"""Masks are read as they are stored, whatever PIL makes of their values; the limits on their size."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.tiff import DEFLATE, PACKBITS, UNCOMPRESSED, write_tiff
from ovseg_fast.data.masks import DataError, read_mask


def indices(bits: int, height: int = 7, width: int = 13) -> np.ndarray:
    return np.random.randint(0, 2**bits, (height, width))


@pytest.mark.parametrize("compression", [UNCOMPRESSED, DEFLATE, PACKBITS])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("photometric", [0, 1, 3], ids=["white is zero", "black is zero", "palette"])
def test_tiff_masks_are_read_as_they_are_stored(tmp_path: Path, bits: int, photometric: int, compression: int) -> None:
    values = indices(bits)
    fills = (1,) if photometric == 3 or (photometric, bits) == (0, 8) else (1, 2)  # PIL refuses the others
    for order, fill in itertools.product("<>", fills):
        file = write_tiff(
            tmp_path / "a.tif", values, bits, photometric, order=order, fill=fill, compression=compression
        )
        np.testing.assert_array_equal(read_mask(file), values, err_msg=f"{order} {fill}")


@pytest.mark.parametrize(("order", "photometric"), [("<", 0), ("<", 1), (">", 1)])
@pytest.mark.parametrize("compression", [UNCOMPRESSED, DEFLATE])
def test_tiff_masks_of_16_bits(tmp_path: Path, order: str, photometric: int, compression: int) -> None:
    values = indices(16)
    file = write_tiff(tmp_path / "a.tif", values, 16, photometric, order=order, compression=compression)
    np.testing.assert_array_equal(read_mask(file), values)


@pytest.mark.parametrize("white", [1, 3, 20, 254, 255, 256, 1000, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_netpbm_masks_with_their_own_white(tmp_path: Path, white: int, plain: bool) -> None:
    values = np.random.randint(0, white + 1, (7, 13))
    header = f"P{2 if plain else 5}\n13 7\n{white}\n".encode()
    body = "\n".join(map(str, values.ravel())).encode()
    if not plain:
        body = values.astype(">u2" if white > 255 else np.uint8).tobytes()
    (tmp_path / "a.png").write_bytes(header + body)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), values)


@pytest.mark.parametrize("suffix", ["bmp", "gif", "png", "tga"])
@pytest.mark.parametrize("colours", ["grey", "white first", "any"])
def test_palette_masks_of_other_formats(tmp_path: Path, suffix: str, colours: str) -> None:
    values = np.random.randint(0, 256, (7, 13)).astype(np.uint8)
    image = Image.fromarray(values)
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    tables = {"grey": levels, "white first": levels[::-1], "any": np.random.permutation(levels)}
    image.putpalette(tables[colours].tobytes())
    image.save(tmp_path / f"a.{suffix}", optimize=False)
    with Image.open(tmp_path / f"a.{suffix}") as again:
        if len(set(np.asarray(again).ravel().tolist()) - set(values.ravel().tolist())):
            pytest.fail("the file does not hold the indices that are to be tested")
    np.testing.assert_array_equal(read_mask(tmp_path / f"a.{suffix}"), values)


@pytest.mark.parametrize("side", [16385, 20000])
def test_a_mask_beyond_the_limit_is_one_sentence(tmp_path: Path, side: int) -> None:
    Image.new("L", (side, 3)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=rf"^mask '.*a\.png' is {side} x 3 pixels, more than max_side = 16384: "):
        read_mask(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png", max_side=side).shape == (3, side)


def test_a_mask_within_the_limit_is_read_whatever_pil_thinks_of_it(tmp_path: Path, monkeypatch) -> None:
    Image.new("L", (30, 20), 3).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (read_mask(tmp_path / "a.png") == 3).all()
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_mask_too_large_for_the_memory_is_named(tmp_path: Path, monkeypatch) -> None:
    def fail(*_):
        raise MemoryError

    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(DataError, match=r"a\.png' is too large for the memory\.$") as caught:
        read_mask(tmp_path / "a.png")
    assert caught.value.kind == "memory"
