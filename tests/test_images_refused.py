"""No image, a damaged one, or one of a size or type that is not taken: refused in one sentence that names it."""

from __future__ import annotations

import os
import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovseg_fast.images import (
    MAX_SIDE,
    ImageError,
    MissingImageError,
    TooLargeError,
    enough_memory,
    load_image,
    out_of_memory,
)
from test_images import noise, refused


def test_missing_file(tmp_path: Path) -> None:
    assert "no image file" in refused(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "a.png")
    with pytest.raises(MissingImageError):
        load_image("")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(MissingImageError):
        load_image(tmp_path / "file" / "a.png")


def test_folder(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path)


def test_name_that_no_file_can_have() -> None:
    refused("a\0b.png")
    refused("a" * 5000 + ".png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes, which this system lacks")
def test_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert "not a plain file" in refused(tmp_path / "a.png")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert "0 bytes" in refused(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"class names\n" * 20, b"\x89PNG\r\n", b"\xff" * 500, b"<svg></svg>"])
def test_no_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert "not in an image format" in refused(tmp_path / "a.png")


ENCODINGS = {
    "a.jpg": {"quality": 90},
    "progressive.jpg": {"quality": 90, "progressive": True},
    "a.png": {},
    "a.gif": {},
    "a.bmp": {},
    "a.tif": {},
    "deflate.tif": {"compression": "tiff_deflate"},
    "a.webp": {"lossless": True},
    "a.ppm": {},
}


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_truncated(tmp_path: Path, name: str, part: float) -> None:
    path = tmp_path / name
    Image.fromarray(noise(200, 300)).save(path, **ENCODINGS[name])
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    refused(path)


def test_pil_image_of_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(noise(200, 300)).save(path)
    path.write_bytes(path.read_bytes()[:20000])
    with Image.open(path) as image:
        message = refused(image)
    assert "truncated" in message and str(path) in message


@pytest.mark.parametrize("name", ENCODINGS)
def test_damaged_files_never_raise_anything_else(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    Image.fromarray(noise(20, 30)).save(path, **ENCODINGS[name])
    whole = path.read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(random.randint(1, 8)):
            data[random.randrange(min(len(data), random.choice([60, 10**6])))] = random.randrange(256)
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's own, about what is damaged
            try:
                assert load_image(path).mode == "RGB"
            except ImageError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_too_small(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert f"{size[0]} x {size[1]}" in refused(tmp_path / "a.png")
    assert "2 x 2" in refused(Image.new("RGB", size))
    refused(np.zeros((*size, 3), np.uint8))


def test_smallest(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").size == (2, 2)
    refused(Image.new("RGB", (0, 5)))


def test_too_wide(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (20_000, 4)).save(path)
    message = refused(path)
    for word in ("20000 x 4", str(MAX_SIDE), "tiles", "shrink", "max_side"):
        assert word in message
    assert load_image(path, max_side=20_000).size == (20_000, 4)
    refused(path, max_side=19_999)
    refused(Image.new("L", (4, 20_000)))
    refused(np.zeros((20_000, 4, 3), np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG file that says how large it is but holds next to no pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0"))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def test_size_is_checked_before_pixels_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_header(20_000, 50))
    assert "20000 x 50" in refused(path)
    assert "damaged" in refused(path, max_side=20_000)


def test_decompression_bomb(tmp_path: Path) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    path = tmp_path / "a.png"
    path.write_bytes(png_header(100_000, 100_000))
    message = refused(path)
    assert "100000 x 100000 pixels" in message and "--max-side" in message and "tiles" in message
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("suffix", ["png", "gif", "tif", "webp", "bmp", "jpg", "ico"])
def test_max_side_stands_in_for_pils_own_limit(tmp_path: Path, monkeypatch, suffix: str) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / f"a.{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # PIL warns from there, and refuses from twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / f"a.{suffix}").size == (32, 32)
        assert "max_side = 31" in refused(tmp_path / f"a.{suffix}", max_side=31)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_pils_limit_comes_back_after_many_threads(tmp_path: Path, monkeypatch) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda _: load_image(tmp_path / "a.png").size, range(200)))
    assert sizes == [(32, 32)] * 200 and Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        OSError(12, "Cannot allocate memory"),
        OSError("out of memory error when reading image file"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:12]}",
)
def test_too_large_for_the_memory(tmp_path: Path, monkeypatch, error: Exception) -> None:
    def fail(*_):
        raise error

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    for step in ("PIL.ImageFile.ImageFile.load", "PIL.Image.Image.convert"):
        with monkeypatch.context() as patch:
            patch.setattr(step, fail)
            with pytest.raises(TooLargeError) as caught:
                load_image(tmp_path / "a.png")
            assert str(caught.value) == f"image '{tmp_path / 'a.png'}' is too large for the memory."


def test_other_errors_are_not_taken_for_memory() -> None:
    for error in (RuntimeError("shape mismatch"), OSError(2, "No such file"), ValueError("out of memory")):
        assert not out_of_memory(error)
    with pytest.raises(KeyError), enough_memory("image 'a'"):
        raise KeyError


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((5, 6), np.uint8),
        np.zeros((5, 6, 4), np.uint8),
        np.zeros((3, 5, 6), np.uint8),
        np.zeros((1, 5, 6, 3), np.uint8),
        np.zeros((5, 6, 3), np.float32),
        np.zeros((5, 6, 3), np.int8),
        np.zeros((5, 6, 3), bool),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    message = refused(array)
    assert str(array.shape) in message and str(array.dtype) in message and "(H, W, 3)" in message


def test_other_types_are_refused() -> None:
    import torch

    for source, name in [
        (torch.zeros(5, 6, 3, dtype=torch.uint8), "torch.Tensor"),
        (b"a.png", "bytes"),
        (None, "None"),
    ]:
        with pytest.raises(TypeError, match=name) as caught:
            load_image(source)
        assert "uint8 array (H, W, 3)" in str(caught.value)


@pytest.mark.parametrize("max_side", [0, 1, 2.5, True, "100", None])
def test_max_side_is_checked(max_side) -> None:
    with pytest.raises(ValueError, match="max_side"):
        load_image(noise(), max_side=max_side)
