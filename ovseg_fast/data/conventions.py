"""How the public datasets lie on disk: the folders that users of mmsegmentation and of detectron2 already have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .vocabularies import ADE20K_150, COCO_STUFF, PASCAL_CONTEXT, PASCAL_VOC, PASCAL_VOC_20B, Vocabulary

TRAIN_VAL = {"train": "train", "val": "val"}
ADE_SPLITS = {"train": "training", "val": "validation"}
COCO_SPLITS = {"train": "train2017", "val": "val2017"}


@dataclass(frozen=True)
class Convention:
    """One way to store a dataset. `{split}` in a path stands for the value that `splits` gives.

    Args:
        images: folder of the images. masks: folders of the masks; a mask is taken from the first one that has it.
        values: the class of value 0, 1, 2, ... in a mask file, see `MaskValues`.
        mask_suffixes: endings of mask files, after the image's name.
        lists: text files with the names of the split's pairs, one per line; without them the folders decide.
        by_masks: the image folder holds other splits too, so only the masks name the pairs.
        splits: the available splits. any_split: any other name is one as well, if there are folders of that name.
    """

    images: str
    masks: tuple[str, ...]
    values: tuple[int, ...] = ()
    mask_suffixes: tuple[str, ...] = (".png",)
    lists: tuple[str, ...] = ()
    by_masks: bool = False
    splits: Mapping[str, str] = field(default_factory=lambda: TRAIN_VAL)
    any_split: bool = False

    def has(self, split: str) -> bool:
        """Whether it may hold a split of that name."""
        return split in self.splits or (self.any_split and re.fullmatch(r"[^./\\][^/\\]*", split) is not None)

    def paths(self, split: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """Image folder, mask folders and lists of a split."""

        def fill(path: str) -> str:
            return path.replace("{split}", self.splits.get(split, split))

        return fill(self.images), tuple(map(fill, self.masks)), tuple(map(fill, self.lists))


@dataclass(frozen=True)
class KnownDataset:
    """A dataset and the conventions that it is stored in.

    Args:
        classes: its class list, or if that is read from one of the `class_files`, its length (None: any).
        folders: the folders below the root that may hold it. conventions: tried in this order.
    """

    classes: Vocabulary | int | None
    folders: tuple[str, ...]
    conventions: tuple[Convention, ...]
    class_files: tuple[str, ...] = ()


def _same(count: int) -> tuple[int, ...]:
    return tuple(range(count))


def _voc(values: tuple[int, ...]) -> tuple[Convention, ...]:
    """PASCAL VOC 2012 as distributed, and with the 10,582 training masks of SBD ("trainaug")."""
    lists = "ImageSets/Segmentation/"
    # In mmsegmentation aug.txt lists only what SBD adds; others list everything in one file.
    augmented = ((f"{lists}trainaug.txt",), (f"{lists}train_aug.txt",), (f"{lists}train.txt", f"{lists}aug.txt"))
    both, trainaug = ("SegmentationClassAug", "SegmentationClass"), {"trainaug": "trainaug"}
    return (
        Convention("JPEGImages", ("SegmentationClass",), values, lists=(f"{lists}{{split}}.txt",)),
        *(Convention("JPEGImages", both, values, lists=names, splits=trainaug) for names in augmented),
    )


def _voc_converted(masks: str, values: tuple[int, ...]) -> tuple[Convention, ...]:
    """Converted masks of VOC 2012: one folder per split, or those of "val" directly in the folder."""
    return (
        Convention("images_detectron2/{split}", (f"{masks}/{{split}}",), values),
        Convention("JPEGImages", (f"{masks}/{{split}}",), values, by_masks=True),
        Convention("JPEGImages", (masks,), values, by_masks=True, splits={"val": "val"}),
    )


# mmsegmentation's masks of Context number its 59 classes alphabetically from 1; the dataset's own list does not.
_CONTEXT_BY_ALPHABET = (-1, *(PASCAL_CONTEXT.classes.index(name) for name in sorted(PASCAL_CONTEXT.classes)))
_CONTEXT_LISTS = ("ImageSets/SegmentationContext/{split}.txt",)
_CONTEXT_59, _CONTEXT_459 = ("annotations_detectron2/pc59_{split}",), ("annotations_detectron2/pc459_{split}",)
_ANNOTATIONS, _DETECTRON2 = ("annotations/{split}",), ("annotations_detectron2/{split}",)
_VOC2012 = ("", "VOC2012", "VOCdevkit/VOC2012")
_VOC2010 = ("", "VOC2010", "VOCdevkit/VOC2010")
_OWN_SUFFIXES, _LARGE_SUFFIXES = (".png", ".tif", ".tiff"), (".tif", ".png")

DATASETS = {
    "coco-stuff": KnownDataset(
        COCO_STUFF,
        ("", "coco_stuff164k", "coco-stuff"),
        (
            Convention("images/{split}", _ANNOTATIONS, _same(171), ("_labelTrainIds.png",), splits=COCO_SPLITS),
            Convention("images/{split}", _DETECTRON2, _same(171), splits=COCO_SPLITS),
            Convention("coco/{split}", ("coco-stuff/annotations_detectron2/{split}",), _same(171), splits=COCO_SPLITS),
        ),
    ),
    "ade20k-150": KnownDataset(
        ADE20K_150,
        ("", "ADEChallengeData2016", "ade/ADEChallengeData2016"),
        (
            Convention("images/{split}", _ANNOTATIONS, (-1, *range(150)), splits=ADE_SPLITS),
            Convention("images/{split}", _DETECTRON2, _same(150), splits=ADE_SPLITS),
        ),
    ),
    "ade20k-847": KnownDataset(
        847,
        ("", "ADE20K_2021_17_01"),
        (Convention("images_detectron2/{split}", _DETECTRON2, _same(847), (".tif",), splits=ADE_SPLITS),),
        class_files=("ade847.json", "classes.json", "classes.txt"),
    ),
    "pascal-voc": KnownDataset(
        PASCAL_VOC, _VOC2012, (*_voc((-1, *range(20))), *_voc_converted("annotations_detectron2", _same(20)))
    ),
    "pascal-voc-20b": KnownDataset(
        PASCAL_VOC_20B,
        _VOC2012,
        # The converted masks number background last; the dataset's own masks, tried first, as class 0.
        (*_voc(_same(21)), *_voc_converted("annotations_detectron2_bg", (*range(1, 21), 0))),
    ),
    "pascal-context": KnownDataset(
        PASCAL_CONTEXT,
        _VOC2010,
        (
            Convention("JPEGImages", ("SegmentationClassContext",), _CONTEXT_BY_ALPHABET, lists=_CONTEXT_LISTS),
            Convention("images/{split}", _CONTEXT_59, _same(59)),
            Convention("JPEGImages", _CONTEXT_59, _same(59), by_masks=True),
        ),
    ),
    "pascal-context-459": KnownDataset(
        459,
        _VOC2010,
        (
            Convention("images/{split}", _CONTEXT_459, _same(459), _LARGE_SUFFIXES),
            Convention("JPEGImages", _CONTEXT_459, _same(459), _LARGE_SUFFIXES, by_masks=True),
        ),
        class_files=("pc459.json", "classes.json", "classes.txt", "labels.txt", "trainval/labels.txt"),
    ),
    "folder": KnownDataset(
        None,
        ("",),
        (
            Convention("images/{split}", ("masks/{split}",), mask_suffixes=_OWN_SUFFIXES, any_split=True),
            Convention("images", ("masks",), mask_suffixes=_OWN_SUFFIXES),
        ),
        class_files=("classes.txt", "classes.json"),
    ),
}
