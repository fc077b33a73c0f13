"""One's own data as it comes: splits of any name, text of any encoding, names of a Mac, gaps in the class list."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovseg_fast.data import check_dataset, open_dataset


def split(tree, name: str, *pairs: str) -> None:
    for pair in pairs:
        tree.image(f"images/{name}/{pair}.jpg")
        tree.mask(f"masks/{name}/{pair}.png", tree.values([0, 1]))


@pytest.mark.parametrize("name", ["test", "fold-3", "2024", "täglich", "val v2"])
def test_any_split_that_has_its_folders(tree, name: str) -> None:
    split(tree, name, "a", "b")
    split(tree, "val", "c")
    tree.text("classes.txt", "cat", "dog")
    dataset = open_dataset("folder", tree.root, name)
    assert dataset.split == name and [pair.name for pair in dataset.pairs] == ["a", "b"]
    assert check_dataset(dataset) == []


@pytest.mark.parametrize("name", ["test", "val", "Train"])
def test_a_split_that_is_not_there_lists_those_that_are(tree, name: str) -> None:
    split(tree, "train", "a")
    split(tree, "validation", "b")
    (tree.root / "images/unmasked").mkdir()
    tree.text("classes.txt", "cat", "dog")
    if name == "Train" and (tree.root / "images/Train").exists():
        pytest.skip("this file system takes Train and train for one folder")
    with pytest.raises(ValueError) as caught:
        open_dataset("folder", tree.root, name)
    assert str(caught.value) == f"root '{tree.root}' holds no split '{name}', only train, validation."


@pytest.mark.parametrize("name", ["", ".", "..", "../images", "a/b", "/tmp", "a\\b"])
def test_a_split_is_one_folder(own, name: str) -> None:
    with pytest.raises(ValueError, match="split of folder must be one of train, val, got"):
        open_dataset("folder", own.root, name)


def test_an_unsorted_folder_has_no_other_split(own) -> None:
    with pytest.raises(
        ValueError, match=r"holds no folder of split 'test': looked in it for images/test \+ masks/test"
    ):
        open_dataset("folder", own.root, "test")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_in_any_encoding_that_says_what_it_is(tree, encoding: str, end: str) -> None:
    for name in ("2007_000033", "2007_000042"):
        tree.image(f"JPEGImages/{name}.jpg")
        tree.mask(f"SegmentationClass/{name}.png", tree.values([0, 20]))
    listing = tree.text("ImageSets/Segmentation/val.txt")
    listing.write_bytes(end.join(["2007_000033 ", "2007_000042", "  ", ""]).encode(encoding))
    dataset = open_dataset("pascal-voc", tree.root)
    assert [pair.name for pair in dataset.pairs] == ["2007_000033", "2007_000042"] and check_dataset(dataset) == []


def test_a_list_in_another_encoding_is_named(tree) -> None:
    for folder in ("JPEGImages", "SegmentationClass"):
        (tree.root / folder).mkdir()
    listing = tree.text("ImageSets/Segmentation/val.txt")
    listing.write_bytes("a\ncafé\n".encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        open_dataset("pascal-voc", tree.root)
    assert str(caught.value) == f"'{listing}' is not UTF-8 (line 2); save the list of images as UTF-8."


@pytest.mark.parametrize("first", [0, 1])
def test_numbered_names_with_a_mark_and_blank_lines(tree, first: int) -> None:
    for folder in ("images/val", "annotations_detectron2/pc459_val"):
        (tree.root / folder).mkdir(parents=True)
    lines = [f"{number}: name{number}" for number in range(first, first + 459)]
    listing = tree.text("labels.txt")
    listing.write_bytes(("\r\n".join(lines) + "\r\n  \r\n").encode("utf-8-sig"))
    assert open_dataset("pascal-context-459", tree.root).vocabulary.classes[0] == f"name{first}"
    listing.write_bytes("1: n\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels\.txt' is not UTF-8"):
        open_dataset("pascal-context-459", tree.root)


def test_a_gap_in_the_classes_of_a_folder_is_an_error(own) -> None:
    own.text("classes.txt", "cat", "", "sky")
    with pytest.raises(ValueError, match=r"^line 2 of '.*classes\.txt' is blank, but the labels count the lines"):
        open_dataset("folder", own.root)


def test_names_of_a_mac_find_their_masks(own) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Müller é") for form in ("NFC", "NFD"))
    own.image(f"images/{decomposed}.jpg")
    if (own.root / f"images/{composed}.jpg").exists():
        pytest.skip("this file system takes both forms for one file")
    values = own.values([0, 1, 2])
    own.mask(f"masks/{composed}.png", values)
    dataset = open_dataset("folder", own.root)
    assert [pair.name for pair in dataset.pairs] == [composed, "a", "b", "c"] and check_dataset(dataset) == []
    np.testing.assert_array_equal(dataset.read(0)[1], values)
    own.image(f"images/{composed}.jpg")
    (problem,) = check_dataset(open_dataset("folder", own.root))
    assert problem.kind == "duplicate"


def test_a_list_in_one_form_finds_files_in_the_other(tree) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    tree.image(f"JPEGImages/{decomposed}.jpg")
    tree.mask(f"SegmentationClass/{composed}.png", tree.values([0, 20]))
    tree.text("ImageSets/Segmentation/val.txt", decomposed)
    assert check_dataset(open_dataset("pascal-voc", tree.root)) == []


@pytest.mark.parametrize("kind", ["sixteen", "transparent"])
def test_an_image_as_stored_is_converted_like_any_other(own, kind: str) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    levels = np.random.randint(0, 2**16, (7, 9)).astype(np.uint16)
    transparent = np.dstack([np.random.randint(0, 256, (7, 9, 3), np.uint8), np.zeros((7, 9), np.uint8)])
    picture = Image.fromarray(levels if kind == "sixteen" else transparent)
    picture.save(own.root / "images/0.png", exif=exif)
    values = own.mask("masks/0.png", own.values([0, 1]))
    image, labels = open_dataset("folder", own.root).read(0)
    expected = np.full((7, 9), 255) if kind == "transparent" else (levels.astype(int) + 128) // 257
    np.testing.assert_array_equal(np.asarray(image), np.repeat(expected[..., None], 3, -1))
    assert labels.shape == (7, 9) and isinstance(values, Path)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_tiff_image_follows_its_mask_too(own, orientation: int) -> None:
    stored = np.random.randint(0, 256, (7, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(stored).save(own.root / "images/0.tif", exif=exif)
    own.mask("masks/0.png", own.values([0, 1]))
    image, _ = open_dataset("folder", own.root).read(0)
    np.testing.assert_array_equal(np.asarray(image), stored)


def test_sides_beyond_the_limit(own) -> None:
    own.image("images/0.png", size=(3, 17000))
    own.mask("masks/0.png", own.values([0], size=(3, 17000)))
    kinds = [problem.kind for problem in check_dataset(open_dataset("folder", own.root))]
    assert kinds == ["unreadable-image", "unreadable-mask"]
    assert check_dataset(open_dataset("folder", own.root, max_side=17000)) == []
