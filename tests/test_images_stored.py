"""Images as they are stored: not turned, of 16 bits, HEIC; what is said about dark ones; lists and what they leave."""

from __future__ import annotations

import logging
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.tiff import DEFLATE, UNCOMPRESSED, write_tiff
from ovseg_fast import images
from ovseg_fast.images import ImageError, list_images, load_image, passed_over
from test_images import grey, noise, pixels, refused, touch, upright, with_orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_pixels_stay_as_stored_when_asked_for(tmp_path: Path, suffix: str, orientation: int) -> None:
    stored = noise()
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored).save(path, exif=with_orientation(orientation), **options)
    assert np.array_equal(pixels(path, upright=False), stored)
    assert np.array_equal(pixels(path), upright(stored, orientation))


def test_stored_pixels_are_converted_like_upright_ones(tmp_path: Path) -> None:
    sixteen = np.random.randint(2**14, 2**16, (4, 6)).astype(np.uint16)
    transparent = noise(4, 6, 4)
    transparent[..., 3] = 0
    for name, array in (("sixteen", sixteen), ("transparent", transparent)):
        Image.fromarray(array).save(tmp_path / f"{name}.png", exif=with_orientation(6))
        turned, stored = pixels(tmp_path / f"{name}.png"), pixels(tmp_path / f"{name}.png", upright=False)
        assert np.array_equal(np.rot90(stored, -1), turned)
    assert np.array_equal(pixels(tmp_path / "sixteen.png", upright=False), grey((sixteen + 128.0) // 257))


@pytest.mark.parametrize("compression", [UNCOMPRESSED, DEFLATE])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_white_is_zero_is_a_negative(tmp_path: Path, bits: int, compression: int) -> None:
    levels = np.random.randint(0, 2**bits, (8, 8))
    levels[0, :2] = 0, 2**bits - 1
    path = write_tiff(tmp_path / "a.tif", levels, bits, 0, compression=compression)
    expected = 255 - np.floor(levels * 255 / (2**bits - 1) + 0.5)
    assert np.abs(pixels(path)[..., 0] - expected).max() <= (bits == 16)


# Dark ones


@pytest.fixture
def warned(caplog) -> pytest.LogCaptureFixture:
    images._warn.cache_clear()
    caplog.set_level(logging.WARNING, logger="ovseg_fast")
    return caplog


@pytest.mark.parametrize(("high", "bits"), [(200, 8), (1023, 10), (1500, 12), (4095, 12), (16000, 14)])
def test_dark_16_bit_images_are_said_once(tmp_path: Path, warned, high: int, bits: int) -> None:
    Image.fromarray(np.full((4, 4), high, np.uint16)).save(tmp_path / "a.png")
    for _ in range(3):
        load_image(tmp_path / "a.png")
    (record,) = warned.records
    assert f"no level is above {high} of 65535" in record.getMessage() and f"{bits} bits" in record.getMessage()
    assert "a.png" in record.getMessage()


@pytest.mark.parametrize("high", [0, 16384, 65535])
def test_black_and_bright_16_bit_images_are_not_warned_of(tmp_path: Path, warned, high: int) -> None:
    Image.fromarray(np.full((4, 4), high, np.uint16)).save(tmp_path / "a.png")
    load_image(tmp_path / "a.png")
    assert not warned.records


def test_dark_16_bit_colours(tmp_path: Path, warned) -> None:
    for level, count in ((4095, 1), (65535, 0)):
        values = np.full((4, 5, 3), level, ">u2")
        (tmp_path / "a.ppm").write_bytes(b"P6 5 4 65535\n" + values.tobytes())
        write_png16(tmp_path / "a.png", values)
        warned.clear()
        load_image(tmp_path / "a.png")
        assert len(warned.records) == count
    assert np.array_equal(pixels(tmp_path / "a.png"), np.full((4, 5, 3), 255))


def write_png16(path: Path, values: np.ndarray) -> None:
    import struct
    import zlib

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in [*chunks, (b"IEND", b"")]
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_8_bit_images_may_be_dark(tmp_path: Path, warned) -> None:
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "a.png")
    load_image(tmp_path / "a.png")
    assert not warned.records


# HEIC

HEIC = b"\0\0\0\x18ftypheic" + bytes(40)


def test_heic_without_its_package_is_told_with_the_package(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.jpg").write_bytes(HEIC)
    assert "install pillow-heif to read it" in refused(tmp_path / "a.jpg")


def test_avif_without_a_reader_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_avif", None)
    (tmp_path / "a.avif").write_bytes(HEIC.replace(b"heic", b"avif"))
    monkeypatch.setattr(Image, "open", lambda path: (_ for _ in ()).throw(Image.UnidentifiedImageError()))
    assert "Pillow 11.3" in refused(tmp_path / "a.avif")


def test_heic_is_read_where_its_package_is(tmp_path: Path, monkeypatch) -> None:
    """With a stand-in for pillow-heif, which takes such a file for a picture of one colour."""

    class Stand(Image.Image):
        pass

    def open_heif(file, name):
        image = Image.new("RGB", (6, 4), (9, 8, 7))
        return image

    def register() -> None:
        Image.register_open("HEIF", open_heif, lambda start: start[4:12] == b"ftypheic")

    package = types.ModuleType("pillow_heif")
    package.register_heif_opener = register
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    monkeypatch.setattr(images, "find_spec", lambda name: name == "pillow_heif" or None)
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setattr(Image, "OPEN", {**Image.OPEN})
    for name in ("a.heic", "b.HEIF"):
        (tmp_path / name).write_bytes(HEIC)
    assert list_images(tmp_path) == [tmp_path / "a.heic", tmp_path / "b.HEIF"]
    assert (pixels(tmp_path / "a.heic") == (9, 8, 7)).all()


# Lists


def test_what_is_passed_over_is_counted_by_kind(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    touch(tmp_path, "a.png", "b.heic", "c.HEIF", "d.webm", "e", "g.dng", "h.DNG", ".hidden.raw")
    (tmp_path / "sub").mkdir()
    (sentence,) = passed_over(tmp_path)
    kinds = ".heic: 1, .heif: 1, .webm: 1, no suffix: 1, .dng: 2"
    expected = (
        f"6 files ({kinds}) and 1 folder in '{tmp_path}' were passed over; install pillow-heif to read HEIC images."
    )
    assert sentence == expected
    assert passed_over(tmp_path / "a.png") == []


def test_nothing_passed_over_is_not_said(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.jpg", ".hidden")
    assert passed_over(tmp_path) == []


def test_a_folder_of_heic_alone_is_told_why(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    touch(tmp_path, "a.heic", "b.heif")
    with pytest.raises(ImageError, match=r"holds no image.*2 HEIC: install pillow-heif"):
        list_images(tmp_path)


def test_results_beside_their_images_are_left_out(tmp_path: Path) -> None:
    kept = ["a.jpg", "a.png", "b.jpg", "cat_labels.png", "x_overlay.jpg"]
    results = ["b_overlay.png", "b_labels.png", "a.jpg_overlay.png", "a.png_labels.png", "b_2_labels.png"]
    touch(tmp_path, *kept, *results, "b_labels.npz")
    assert list_images(tmp_path) == [tmp_path / name for name in kept]
    assert passed_over(tmp_path) == [f"6 files (own results: 6) in '{tmp_path}' were passed over."]
    named = list_images([tmp_path, tmp_path / "b_overlay.png"])
    assert set(named) == {*(tmp_path / name for name in kept), tmp_path / "b_overlay.png"}


def test_results_of_images_in_another_folder_are_left_out(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    touch(tmp_path / "one", "a.png", "b_overlay.png")
    touch(tmp_path / "two", "b.png")
    assert list_images([tmp_path / "one", tmp_path / "two"]) == [tmp_path / "one/a.png", tmp_path / "two/b.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of any bytes, which Linux has")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    Image.fromarray(noise()).save(tmp_path / name)
    (path,) = list_images(tmp_path)
    assert path == tmp_path / name and load_image(path).mode == "RGB"
