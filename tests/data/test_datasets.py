from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovseg_fast.data import (
    ADE20K_150,
    COCO_STUFF,
    DATASETS,
    PASCAL_CONTEXT,
    PASCAL_VOC,
    PASCAL_VOC_20B,
    WORLD,
    DataError,
    World,
    check_dataset,
    open_dataset,
)
from ovseg_fast.images import ImageError


def shifted(values: np.ndarray, none: int = 255) -> np.ndarray:
    labels = values.astype(np.int64) - 1
    labels[values == none] = -1
    return labels


def plain(values: np.ndarray, none: int = 255) -> np.ndarray:
    return np.where(values == none, -1, values.astype(np.int64))


def alphabet(values: np.ndarray) -> np.ndarray:
    names = sorted(PASCAL_CONTEXT.classes)
    translated = [PASCAL_CONTEXT.classes.index(names[v - 1]) if 0 < v < 60 else -1 for v in values.flatten()]
    return np.array(translated).reshape(values.shape)


def background_last(values: np.ndarray) -> np.ndarray:
    labels = values.astype(np.int64) + 1
    labels[values == 20] = 0
    labels[values == 255] = -1
    return labels


COCO = ("coco-stuff", COCO_STUFF, [0, 1, 90, 170, 255], np.uint8, plain)
ADE = ("ade20k-150", ADE20K_150, [0, 1, 150, 255], np.uint8, shifted)
VOC = ("pascal-voc", PASCAL_VOC, [0, 1, 20, 255], np.uint8, shifted)
VOC_CONVERTED = ("pascal-voc", PASCAL_VOC, [0, 19, 255], np.uint8, plain)
BACKGROUND = ("pascal-voc-20b", PASCAL_VOC_20B, [0, 1, 20, 255], np.uint8, plain)
BACKGROUND_CONVERTED = ("pascal-voc-20b", PASCAL_VOC_20B, [0, 19, 20, 255], np.uint8, background_last)
CONTEXT = ("pascal-context", PASCAL_CONTEXT, [*range(60), 255], np.uint8, alphabet)
CONTEXT_CONVERTED = ("pascal-context", PASCAL_CONTEXT, [0, 58, 255], np.uint8, plain)
VOC_LIST = "ImageSets/Segmentation/val.txt"

# dataset and what its masks hold, the folder to open, images, masks with {} for the name, the list
PUBLIC = {
    "coco, mmsegmentation": (
        COCO,
        "data/coco_stuff164k",
        "images/val2017/{}.jpg",
        "annotations/val2017/{}_labelTrainIds.png",
        None,
    ),
    "coco, detectron2": (
        COCO,
        "sets/coco-stuff",
        "images/val2017/{}.jpg",
        "annotations_detectron2/val2017/{}.png",
        None,
    ),
    "coco, detectron2, images apart": (
        COCO,
        "sets",
        "coco/val2017/{}.jpg",
        "coco-stuff/annotations_detectron2/val2017/{}.png",
        None,
    ),
    "ade, mmsegmentation": (
        ADE,
        "data/ade/ADEChallengeData2016",
        "images/validation/{}.jpg",
        "annotations/validation/{}.png",
        None,
    ),
    "ade, detectron2": (
        ("ade20k-150", ADE20K_150, [0, 149, 255], np.uint8, plain),
        "sets/ADEChallengeData2016",
        "images/validation/{}.jpg",
        "annotations_detectron2/validation/{}.png",
        None,
    ),
    "voc": (VOC, "data/VOCdevkit/VOC2012", "JPEGImages/{}.jpg", "SegmentationClass/{}.png", VOC_LIST),
    "voc, detectron2": (
        VOC_CONVERTED,
        "VOCdevkit/VOC2012",
        "images_detectron2/val/{}.jpg",
        "annotations_detectron2/val/{}.png",
        None,
    ),
    "voc, detectron2, all images": (
        VOC_CONVERTED,
        "VOCdevkit/VOC2012",
        "JPEGImages/{}.jpg",
        "annotations_detectron2/val/{}.png",
        None,
    ),
    "voc, detectron2, flat": (
        VOC_CONVERTED,
        "VOC2012",
        "JPEGImages/{}.jpg",
        "annotations_detectron2/{}.png",
        None,
    ),
    "voc-20b": (BACKGROUND, "VOCdevkit/VOC2012", "JPEGImages/{}.jpg", "SegmentationClass/{}.png", VOC_LIST),
    "voc-20b, detectron2": (
        BACKGROUND_CONVERTED,
        "VOCdevkit/VOC2012",
        "JPEGImages/{}.jpg",
        "annotations_detectron2_bg/val/{}.png",
        None,
    ),
    "context, mmsegmentation": (
        CONTEXT,
        "VOCdevkit/VOC2010",
        "JPEGImages/{}.jpg",
        "SegmentationClassContext/{}.png",
        "ImageSets/SegmentationContext/val.txt",
    ),
    "context, detectron2": (
        CONTEXT_CONVERTED,
        "VOCdevkit/VOC2010",
        "JPEGImages/{}.jpg",
        "annotations_detectron2/pc59_val/{}.png",
        None,
    ),
    "context, detectron2, images by split": (
        CONTEXT_CONVERTED,
        "VOCdevkit/VOC2010",
        "images/val/{}.jpg",
        "annotations_detectron2/pc59_val/{}.png",
        None,
    ),
}


@pytest.mark.parametrize("case", PUBLIC)
@pytest.mark.parametrize("above", [False, True], ids=["its folder", "the folder above"])
def test_public_conventions(tree, case: str, above: bool) -> None:
    (name_of_set, vocabulary, possible, dtype, meaning), folder, images, masks, listing = PUBLIC[case]
    written = {}
    for name in ("2007_000033", "2007_000042"):
        tree.image(f"{folder}/{images.format(name)}")
        written[name] = tree.values(possible, dtype)
        tree.mask(f"{folder}/{masks.format(name)}", written[name])
    if listing:
        tree.text(f"{folder}/{listing}", *written)
    if "JPEGImages" in images:
        tree.image(f"{folder}/JPEGImages/of_another_split.jpg")
    top = folder.split("/")[0]
    root = tree.root / (folder if not above else top if top in ("data", "sets") else "")

    dataset = open_dataset(name_of_set, root)
    assert (dataset.name, dataset.split) == (name_of_set, "val") and dataset.vocabulary is vocabulary
    assert len(dataset) == 2 and [pair.name for pair in dataset.pairs] == list(written)
    for index, (name, values) in enumerate(written.items()):
        image, labels = dataset.read(index)
        assert image.mode == "RGB" and image.size == labels.shape[::-1]
        with Image.open(tree.root / folder / images.format(name)) as expected:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(labels, meaning(values))


@pytest.mark.parametrize(
    "dataset, folder, image, mask, count, class_file",
    [
        (
            "ade20k-847",
            "ADE20K_2021_17_01",
            "images_detectron2/validation/x.jpg",
            "annotations_detectron2/validation/x.tif",
            847,
            "ade847.json",
        ),
        (
            "pascal-context-459",
            "VOCdevkit/VOC2010",
            "JPEGImages/x.jpg",
            "annotations_detectron2/pc459_val/x.tif",
            459,
            "labels.txt",
        ),
    ],
)
def test_large_vocabularies_read_their_names(tree, dataset, folder, image, mask, count, class_file) -> None:
    tree.image(f"{folder}/{image}")
    values = tree.values([0, 254, 255, 256, count - 1, 65535], np.uint16)
    tree.mask(f"{folder}/{mask}", values)
    with pytest.raises(
        FileNotFoundError, match=f"class names of {dataset} are read from a file, but .* holds none of "
    ):
        open_dataset(dataset, tree.root)

    names = [f"thing {index}" for index in range(count)]
    file = tree.root / folder / class_file
    numbered = "".join(f"{number}: {name}\n" for number, name in enumerate(names, 1))
    file.write_text(numbered if class_file == "labels.txt" else json.dumps(names))
    opened = open_dataset(dataset, tree.root)
    assert opened.vocabulary.classes == tuple(names)
    np.testing.assert_array_equal(opened.read(0)[1], plain(values, 65535))

    numbered = "".join(f"{number}: {name}\n" for number, name in enumerate(names[:-1], 1))
    file.write_text(numbered if class_file == "labels.txt" else json.dumps(names[:-1]))
    with pytest.raises(ValueError, match=f"must hold the {count} class names of {dataset}, got {count - 1}"):
        open_dataset(dataset, tree.root)
    tree.text(f"{folder}/labels.txt", "1: thing", "3: other")
    if class_file == "labels.txt":
        with pytest.raises(ValueError, match=r"must hold lines '1: name', '2: name', \.\.\. in order"):
            open_dataset(dataset, tree.root)


@pytest.mark.parametrize("listing", ["trainaug.txt", "train_aug.txt", "aug.txt"])
def test_augmented_training_set_of_voc(tree, listing: str) -> None:
    folder = "VOCdevkit/VOC2012"
    official, added = tree.values([0, 1, 20, 255]), tree.values([0, 5, 20])
    for name in ("official", "added", "unlisted"):
        tree.image(f"{folder}/JPEGImages/{name}.jpg")
    tree.mask(f"{folder}/SegmentationClass/official.png", official)
    tree.mask(f"{folder}/SegmentationClassAug/added.png", added)
    lists = f"{folder}/ImageSets/Segmentation"
    tree.text(f"{lists}/train.txt", "official")
    paths = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in ("official", "added")]
    tree.text(f"{lists}/{listing}", *(paths[1:] if listing == "aug.txt" else paths), "")
    dataset = open_dataset("pascal-voc", tree.root, "trainaug")
    assert [pair.name for pair in dataset.pairs] == ["official", "added"]
    np.testing.assert_array_equal(dataset.read(0)[1], shifted(official))
    np.testing.assert_array_equal(dataset.read(1)[1], shifted(added))
    assert [pair.name for pair in open_dataset("pascal-voc", tree.root, "train").pairs] == ["official"]


def test_splits_are_kept_apart(tree) -> None:
    for part in ("training", "validation"):
        tree.image(f"images/{part}/{part}.jpg")
        tree.mask(f"annotations/{part}/{part}.png", tree.values([0, 1, 150]))
    for split, name in (("train", "training"), ("val", "validation")):
        assert [pair.name for pair in open_dataset("ade20k-150", tree.root, split).pairs] == [name]


def test_masks_of_another_ending_are_passed_over(tree) -> None:
    tree.image("images/val2017/x.jpg")
    tree.mask("annotations/val2017/x.png", tree.values([181]))  # COCO's own numbers
    values = tree.values([0, 170, 255])
    tree.mask("annotations/val2017/x_labelTrainIds.png", values)
    dataset = open_dataset("coco-stuff", tree.root)
    assert [pair.name for pair in dataset.pairs] == ["x"]
    np.testing.assert_array_equal(dataset.read(0)[1], plain(values))


def test_own_folder(own) -> None:
    own.image("images/d.webp")
    values = own.values([0, 1, 2, 65535], np.uint16)
    own.mask("masks/d.tif", values)
    own.text("images/notes.txt", "no image")
    own.image("images/.hidden.jpg")
    dataset = open_dataset("folder", str(own.root))
    assert dataset.vocabulary.classes == ("cat", "grass", "sky") and dataset.vocabulary.unseen == ()
    assert [pair.name for pair in dataset.pairs] == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(dataset.read(3)[1], plain(values, 65535))
    assert [pair.name for pair in open_dataset("folder", own.root, "train").pairs] == ["a", "b", "c", "d"]
    assert [pair.name for pair in pickle.loads(pickle.dumps(dataset)).pairs] == ["a", "b", "c", "d"]

    own.image("images/val/v.png")
    own.mask("masks/val/v.png", own.values([2]))
    assert [pair.name for pair in open_dataset("folder", own.root).pairs] == ["v"]


def test_own_folder_with_more_than_255_classes(own) -> None:
    own.text("classes.txt", *(f"class {index}" for index in range(300)))
    values = own.values([0, 255, 299, 65535], np.uint16)
    own.mask("masks/a.png", values)
    np.testing.assert_array_equal(open_dataset("folder", own.root).read(0)[1], plain(values, 65535))


def test_own_folder_without_classes_is_refused(own) -> None:
    (own.root / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"class names of folder are read from a file.*classes.txt, classes.j"):
        open_dataset("folder", own.root)
    own.text("classes.json", '["cat", "cat"]')
    with pytest.raises(ValueError, match="classes must differ"):
        open_dataset("folder", own.root)


@pytest.mark.parametrize("name", DATASETS)
def test_root_without_the_folders_is_refused(tree, name: str) -> None:
    (tree.root / "something").mkdir()
    with pytest.raises(ValueError) as caught:
        open_dataset(name, tree.root)
    message = str(caught.value)
    assert message.startswith(f"root '{tree.root}' holds no {name} of split 'val': looked in it")
    for convention in DATASETS[name].conventions:
        if "val" in convention.splits:
            images, masks, lists = convention.paths("val")
            assert " + ".join([images, masks[0], *lists]) in message
    assert all(f"'{folder}'" in message for folder in DATASETS[name].folders if folder)


def test_bad_arguments_are_refused(tree) -> None:
    with pytest.raises(ValueError, match=r"name must be one of the datasets coco-stuff, .*world, got 'cityscapes'"):
        open_dataset("cityscapes", tree.root)
    with pytest.raises(ValueError, match=r"split of ade20k-150 must be one of train, val, got 'test'"):
        open_dataset("ade20k-150", tree.root, "test")
    with pytest.raises(ValueError, match=r"split of world must be one of train, test, all, val, got 'trainaug'"):
        open_dataset("world", split="trainaug")
    with pytest.raises(ValueError, match=r"root must be the folder that coco-stuff lies in, got None"):
        open_dataset("coco-stuff")
    with pytest.raises(FileNotFoundError, match=r"root must be the folder of a dataset, there is no '.*none'"):
        open_dataset("folder", tree.root / "none")
    file = tree.text("file", "x")
    with pytest.raises(ValueError, match=r"root must be the folder of a dataset, '.*file' is a file"):
        open_dataset("folder", file)
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        open_dataset("world", seed=-1)
    for name in ("folder", "world"):
        with pytest.raises(ValueError, match="limit must be at least 1 image, got 0"):
            open_dataset(name, tree.root, limit=0)


def test_a_limit_takes_the_first_pairs(own) -> None:
    assert [pair.name for pair in open_dataset("folder", own.root, limit=2).pairs] == ["a", "b"]
    assert len(open_dataset("folder", own.root, limit=9)) == 3


def test_the_world_opens_like_any_other_dataset() -> None:
    dataset = open_dataset("world", seed=3, limit=2)
    assert (dataset.name, dataset.split, dataset.vocabulary) == ("world", "test", WORLD)
    assert [pair.name for pair in dataset.pairs] == ["test-3-0", "test-3-1"]
    image, labels = dataset.read(1)
    scene = World(3).scene(1, split="test")
    np.testing.assert_array_equal(np.asarray(image), scene.image)
    np.testing.assert_array_equal(labels, scene.labels)
    assert [open_dataset("world", split=split, limit=1).split for split in ("val", "test", "train", "all")] == [
        "test",
        "test",
        "train",
        "all",
    ]


def test_the_world_has_no_end_but_its_dataset_does() -> None:
    assert len(open_dataset("world")) == 500
    assert len(open_dataset("world", endless=7)) == 7
    assert len(open_dataset("world", endless=7, limit=3)) == 3


def test_reading_a_broken_pair_is_told(own) -> None:
    own.mask("masks/a.png", own.values([0, 1], size=(9, 7)))
    own.mask("masks/b.png", own.values([0, 3]))
    (own.root / "masks/c.png").unlink()
    own.mask("masks/d.png", own.values([0]))
    dataset = open_dataset("folder", own.root)
    size = f"mask '{own.root / 'masks/a.png'}' is 7 x 9 pixels, its image '{own.root / 'images/a.jpg'}' 9 x 7; expected"
    for index, error, sentence in [
        (0, DataError, size),
        (1, DataError, "holds label 3, beyond the list of classes; expected 0..2, or 255 or 65535 for no class."),
        (2, DataError, "there is no mask file"),
        (3, ImageError, "there is no image file"),
    ]:
        with pytest.raises(error, match=re.escape(sentence)):
            dataset.read(index)


@pytest.mark.parametrize("upright", [True, False], ids=["mask of the turned image", "mask of the stored pixels"])
def test_image_turned_by_its_exif_data_follows_its_mask(own, upright: bool) -> None:
    file = own.root / "images/a.jpg"
    with Image.open(file) as image:
        exif = image.getexif()
        exif[0x0112] = 6  # a quarter turn clockwise
        image.save(file, exif=exif)
    own.mask("masks/a.png", own.values([0, 1, 2], size=(9, 7) if upright else (7, 9)))
    with Image.open(file) as image:
        expected = np.asarray(image)
    dataset = open_dataset("folder", own.root)
    image, labels = dataset.read(0)
    assert image.size == labels.shape[::-1]
    np.testing.assert_array_equal(np.asarray(image), np.rot90(expected, -1) if upright else expected)
    assert check_dataset(dataset) == []


def test_empty_folders_open(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "classes.txt").write_text("cat\n")
    assert len(open_dataset("folder", tmp_path)) == 0
