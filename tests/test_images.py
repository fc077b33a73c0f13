"""Images of every kind come in as RGB; lists of files. What is refused is in test_images_refused."""

from __future__ import annotations

import logging
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from ovseg_fast.images import ImageError, list_images, load_image

WHITE = 255


def noise(height: int = 24, width: int = 40, channels: int = 3) -> np.ndarray:
    return np.random.randint(0, 256, (height, width, channels), dtype=np.uint8)


def photograph(height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth, so that lossy formats keep it nearly as it is."""
    y, x = np.mgrid[:height, :width]
    a, b, c = np.random.uniform(0.02, 0.08, 3)
    waves = [np.sin(a * x + b * y), np.cos(b * x - c * y), np.sin(c * x + a * y + 1)]
    return (np.stack(waves, axis=-1) * 100 + 128).astype(np.uint8)


def pixels(source, **options) -> np.ndarray:
    image = load_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def refused(source, **options) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    if isinstance(source, (str, Path)):
        assert str(source) in message
    return message


# What comes in


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "tga", "webp"])
def test_lossless_formats(tmp_path: Path, suffix: str) -> None:
    expected = noise()
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(expected).save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(pixels(path), expected)
    assert np.array_equal(pixels(str(path)), expected)


def test_jpeg(tmp_path: Path) -> None:
    expected = photograph()
    Image.fromarray(expected).save(tmp_path / "a.jpg", quality=98)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - expected).mean() < 2


def test_the_content_counts_not_the_suffix(tmp_path: Path) -> None:
    expected = noise()
    Image.fromarray(expected).save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(pixels(tmp_path / "a.jpg"), expected)


def test_pil_image_is_copied() -> None:
    expected = noise()
    source = Image.fromarray(expected)
    result = load_image(source)
    result.paste((1, 2, 3), (0, 0, *result.size))
    assert np.array_equal(np.asarray(source), expected)


def test_pil_image_of_a_file_is_read(tmp_path: Path) -> None:
    expected = noise()
    Image.fromarray(expected).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as source:
        assert np.array_equal(pixels(source), expected)


def test_array_is_copied_and_may_be_a_view() -> None:
    expected = noise()
    source = expected[::-1, :, ::-1]
    result = load_image(source)
    assert np.array_equal(np.asarray(result), source)
    source[:] = 0
    assert np.asarray(result).any()


def test_result_holds_no_trace_of_the_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise()).save(tmp_path / "a.png", exif=exif)
    once = load_image(tmp_path / "a.png")
    assert once.info == {}
    assert np.array_equal(pixels(once), np.asarray(once))  # not turned a second time


# Modes


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    with Image.open(path) as again:
        assert again.mode == image.mode, "the file does not hold the mode that is to be tested"
    return path


def test_grey(tmp_path: Path) -> None:
    values = noise(channels=1)[..., 0]
    assert np.array_equal(pixels(saved(Image.fromarray(values), tmp_path / "a.png")), grey(values))


def test_black_and_white(tmp_path: Path) -> None:
    values = noise(channels=1)[..., 0] > 127
    path = saved(Image.fromarray(values), tmp_path / "a.png")
    assert np.array_equal(pixels(path), grey(values * np.uint8(255)))


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha[..., None] / 255
    return colour * opacity + WHITE * (1 - opacity)


def test_grey_with_alpha_is_laid_over_white(tmp_path: Path) -> None:
    values, alpha = noise(channels=1)[..., 0], noise(channels=1)[..., 0]
    image = Image.merge("LA", (Image.fromarray(values), Image.fromarray(alpha)))
    result = pixels(saved(image, tmp_path / "a.png"))
    assert np.abs(result - over_white(grey(values), alpha)).max() <= 1


def test_rgba_is_laid_over_white(tmp_path: Path) -> None:
    values = noise(channels=4)
    values[:3, :, 3], values[3:6, :, 3] = 0, 255
    result = pixels(saved(Image.fromarray(values), tmp_path / "a.png"))
    assert np.abs(result - over_white(values[..., :3], values[..., 3])).max() <= 1
    assert (result[:3] == WHITE).all() and np.array_equal(result[3:6], values[3:6, :, :3])


def palette_image() -> tuple[Image.Image, np.ndarray, np.ndarray]:
    colours = np.random.randint(0, 255, (256, 3), dtype=np.uint8)
    indices = noise(channels=1)[..., 0]
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    assert image.mode == "P"
    return image, indices, colours


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp"])
def test_palette(tmp_path: Path, suffix: str) -> None:
    image, indices, colours = palette_image()
    path = tmp_path / f"a.{suffix}"
    image.save(path)
    assert np.array_equal(pixels(path), colours[indices])


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_transparent_colour_of_a_palette_becomes_white(tmp_path: Path, suffix: str) -> None:
    image, indices, colours = palette_image()
    transparent = int(indices[5, 7])
    path = tmp_path / f"a.{suffix}"
    image.save(path, transparency=transparent)
    expected = colours[indices]
    expected[indices == transparent] = WHITE
    assert np.array_equal(pixels(path), expected)


def test_opacity_of_each_palette_colour(tmp_path: Path) -> None:
    image, indices, colours = palette_image()
    alpha = np.random.randint(0, 256, 256, dtype=np.uint8)
    image.save(tmp_path / "a.png", transparency=alpha.tobytes())
    assert np.abs(pixels(tmp_path / "a.png") - over_white(colours[indices], alpha[indices])).max() <= 1


def test_transparent_colour_of_rgb_becomes_white(tmp_path: Path) -> None:
    values = noise()
    transparent = tuple(values[3, 4].tolist())
    Image.fromarray(values).save(tmp_path / "a.png", transparency=transparent)
    expected = values.copy()
    expected[(values == transparent).all(-1)] = WHITE
    assert np.array_equal(pixels(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    inks = {(0, 0, 0, 0): (255, 255, 255), (255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): (0, 0, 0)}
    for ink, expected in inks.items():
        path = saved(Image.new("CMYK", (16, 16), ink), tmp_path / f"a.{suffix}")
        assert np.abs(pixels(path).astype(int) - expected).max() <= 4


def test_ycbcr() -> None:
    expected = photograph()
    assert np.abs(pixels(Image.fromarray(expected).convert("YCbCr")).astype(int) - expected).max() <= 3


def test_hsv() -> None:
    expected = noise()
    assert np.abs(pixels(Image.fromarray(expected).convert("HSV")).astype(int) - expected).mean() < 4


SIXTEEN = np.array([[0, 128, 129, 257], [32896, 65406, 65407, 65535]], dtype=np.uint16)
EIGHT = np.array([[0, 0, 1, 1], [128, 254, 255, 255]], dtype=np.uint8)  # nearest of value / 257


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(SIXTEEN).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(pixels(tmp_path / f"a.{suffix}"), grey(EIGHT))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bit_grey_in_either_byte_order(mode: str) -> None:
    data = SIXTEEN.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    assert np.array_equal(pixels(Image.frombytes(mode, (4, 2), data)), grey(EIGHT))


def test_big_endian_16_bit_pgm(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 4 2 65535\n" + SIXTEEN.astype(">u2").tobytes())
    assert np.array_equal(pixels(tmp_path / "a.pgm"), grey(EIGHT))


def test_32_bit_grey_within_16_bits() -> None:
    assert np.array_equal(pixels(Image.fromarray(SIXTEEN.astype(np.int32))), grey(EIGHT))


@pytest.mark.parametrize("value", [-1, 65536])
def test_32_bit_grey_beyond_16_bits_is_refused(tmp_path: Path, value: int) -> None:
    values = SIXTEEN.astype(np.int32)
    values[0, 1] = value
    message = refused(saved(Image.fromarray(values), tmp_path / "a.tif"))
    assert str(value) in message and "65535" in message


def test_transparent_level_of_16_bit_grey_becomes_white(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(SIXTEEN).save(path)
    data = path.read_bytes()
    body = b"tRNS" + struct.pack(">H", 32896)
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    at = data.index(b"IDAT") - 4
    path.write_bytes(data[:at] + chunk + data[at:])
    expected = EIGHT.copy()
    expected[1, 0] = WHITE
    assert np.array_equal(pixels(path), grey(expected))


def test_float_is_refused(tmp_path: Path) -> None:
    path = saved(Image.fromarray(np.random.rand(4, 5).astype(np.float32)), tmp_path / "a.tif")
    assert "floating-point" in refused(path)


# Orientation


def upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """The picture that the EXIF standard means by `orientation`: where the stored first row and first column belong."""
    return {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: np.swapaxes(stored, 0, 1),
        6: np.rot90(stored, -1),
        7: np.swapaxes(stored, 0, 1)[::-1, ::-1],
        8: np.rot90(stored, 1),
    }[orientation]


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    stored = noise()
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored).save(path, exif=with_orientation(orientation), **options)
    assert np.array_equal(pixels(path), upright(stored, orientation))


def test_orientation_of_jpeg_pil_image_and_16_bits(tmp_path: Path) -> None:
    stored = photograph()
    Image.fromarray(stored).save(tmp_path / "a.jpg", quality=98, exif=with_orientation(6))
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - upright(stored, 6)).mean() < 2
    with Image.open(tmp_path / "a.jpg") as image:
        assert np.array_equal(pixels(image), pixels(tmp_path / "a.jpg"))
    Image.fromarray(SIXTEEN).save(tmp_path / "a.png", exif=with_orientation(8))
    assert np.array_equal(pixels(tmp_path / "a.png"), grey(upright(EIGHT, 8)))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientation_is_no_rotation(tmp_path: Path, orientation: int) -> None:
    stored = noise()
    Image.fromarray(stored).save(tmp_path / "a.png", exif=with_orientation(orientation))
    assert np.array_equal(pixels(tmp_path / "a.png"), stored)


def test_damaged_exif_entry_does_not_hide_the_orientation(tmp_path: Path) -> None:
    # Entry 0x0142 (tile width) holds text: PIL reads it, but fails to write it again.
    entries = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00" + b"\x01\x42\x00\x02\x00\x00\x00\x04abc\x00"
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x02" + entries + b"\x00\x00\x00\x00"
    stored = photograph()
    Image.fromarray(stored).save(tmp_path / "a.jpg", quality=98, exif=exif)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - upright(stored, 6)).mean() < 2


def test_unreadable_exif_is_said_and_passed_over(tmp_path: Path, caplog, monkeypatch) -> None:
    def fail(self):
        raise struct.error("unpack requires 4 bytes")

    stored = noise()
    Image.fromarray(stored).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "getexif", fail)
    with caplog.at_level(logging.WARNING, logger="ovseg_fast"):
        assert np.array_equal(pixels(tmp_path / "a.png"), stored)
    assert "a.png" in caplog.text and "EXIF" in caplog.text


# Several pictures in one file


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_first_picture_of_several(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert (pixels(path) == (200, 0, 0)).all()


# Lists of files


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"x")


def test_images_of_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "b.PNG", "a.jpg", "c.JpEg", "notes.txt", "d", ".hidden.png", "._a.jpg", "e.tif", "f.png.txt")
    (tmp_path / "folder.png").mkdir()
    touch(tmp_path / "folder.png", "inside.png")
    expected = ["a.jpg", "b.PNG", "c.JpEg", "e.tif"]
    assert list_images([tmp_path]) == [tmp_path / name for name in expected]
    assert list_images(tmp_path) == list_images(str(tmp_path)) == list_images([tmp_path])


def test_named_files_stay_in_order_and_keep_their_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "z.dat", "a.png", ".hidden")
    names = ["z.dat", ".hidden", "a.png"]
    assert list_images([tmp_path / name for name in names]) == [tmp_path / name for name in names]


def test_named_twice_comes_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    paths = [tmp_path / "b.png", tmp_path, tmp_path / "." / "b.png", f"{tmp_path}/../{tmp_path.name}/a.png"]
    assert list_images(paths) == [tmp_path / "b.png", tmp_path / "a.png"]


@pytest.mark.parametrize("suffix", ["png", "gif", "jpg", "tif"])
def test_threads_may_share_an_image_that_is_opened_but_not_decoded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(photograph(600, 700))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(path, **({"exif": exif} if suffix != "gif" else {}))
    expected = pixels(path)
    with ThreadPoolExecutor(8) as threads:
        for _ in range(6):
            with Image.open(path) as opened:
                found = list(threads.map(pixels, [opened] * 8))
            assert all(np.array_equal(each, expected) for each in found)


def test_broken_link_in_a_folder_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    assert list_images(tmp_path) == [tmp_path / "a.png"]
    refused(tmp_path / "a.png")


def test_folder_without_images(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    with pytest.raises(ImageError, match="holds no image") as caught:
        list_images([tmp_path])
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_path_in_a_list(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    with pytest.raises(FileNotFoundError, match=r"no file or folder '.*b\.png'"):
        list_images([tmp_path / "a.png", tmp_path / "b.png"])


def test_no_path() -> None:
    with pytest.raises(ImageError, match="at least one"):
        list_images([])
