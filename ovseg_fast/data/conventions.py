"""Where the public datasets lie on disk, in the folders that users of mmsegmentation and of detectron2 already have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .vocabularies import ADE20K_150, COCO_STUFF, PASCAL_CONTEXT, PASCAL_VOC, PASCAL_VOC_20B, Vocabulary

TRAIN_VAL = {"train": "train", "val": "val"}
ADE_SPLITS = {"train": "training", "val": "validation"}
COCO_SPLITS = {"train": "train2017", "val": "val2017"}


@dataclass(frozen=True)
class Source:
    """One convention of keeping a dataset. `{split}` in a path is replaced by what `splits` says.

    Args:
        images: folder of the images.
        masks: folders of the masks; a mask is taken from the first one that has it.
        values: the class of value 0, 1, 2, ... in a mask file, -1 for no class, see `MaskValues`.
        mask_suffixes: how the names of mask files end, after the image's name.
        lists: text files that name the pairs of the split, one a line; without any, the files in the folders do.
        by_masks: the folder of images holds those of other splits too, so that the masks alone name the pairs.
        splits: the splits there are.
    """

    images: str
    masks: tuple[str, ...]
    values: tuple[int, ...] = ()
    mask_suffixes: tuple[str, ...] = (".png",)
    lists: tuple[str, ...] = ()
    by_masks: bool = False
    splits: Mapping[str, str] = field(default_factory=lambda: TRAIN_VAL)

    def fill(self, split: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """Images, masks and lists of a split."""
        part = self.splits[split]

        def put(path: str) -> str:
            return path.replace("{split}", part)

        return put(self.images), tuple(map(put, self.masks)), tuple(map(put, self.lists))


@dataclass(frozen=True)
class Layout:
    """A dataset and the conventions it is found in.

    Args:
        classes: its class list, or where that is to be read from a file, the number of classes (None: any number).
        folders: where below the root its folders may begin.
        sources: the conventions, tried in this order.
        class_files: files of class names, for a class list that is read.
    """

    classes: Vocabulary | int | None
    folders: tuple[str, ...]
    sources: tuple[Source, ...]
    class_files: tuple[str, ...] = ()


def _same(count: int) -> tuple[int, ...]:
    return tuple(range(count))


def _shifted(count: int) -> tuple[int, ...]:
    """0 is no class, 1 is class 0, ..."""
    return (-1, *range(count))


def _voc(values: tuple[int, ...]) -> tuple[Source, ...]:
    """PASCAL VOC 2012 as it is distributed, and with the 10,582 training masks of SBD ("trainaug")."""
    lists = "ImageSets/Segmentation/"
    # mmsegmentation keeps only what SBD adds in aug.txt; others list all of it in one file.
    augmented = ((f"{lists}trainaug.txt",), (f"{lists}train_aug.txt",), (f"{lists}train.txt", f"{lists}aug.txt"))
    return (
        Source("JPEGImages", ("SegmentationClass",), values, lists=(f"{lists}{{split}}.txt",)),
        *(
            Source(
                "JPEGImages",
                ("SegmentationClassAug", "SegmentationClass"),
                values,
                lists=names,
                splits={"trainaug": "trainaug"},
            )
            for names in augmented
        ),
    )


def _detectron2(masks: str, values: tuple[int, ...]) -> tuple[Source, ...]:
    """Converted masks of VOC 2012, in a folder for each split, or those of "val" right in one."""
    return (
        Source("images_detectron2/{split}", (f"{masks}/{{split}}",), values),
        Source("JPEGImages", (f"{masks}/{{split}}",), values, by_masks=True),
        Source("JPEGImages", (masks,), values, by_masks=True, splits={"val": "val"}),
    )


# mmsegmentation's masks of Context count its 59 classes by alphabet, from 1 on; the dataset's own list does not.
_CONTEXT_BY_ALPHABET = (-1, *(PASCAL_CONTEXT.classes.index(name) for name in sorted(PASCAL_CONTEXT.classes)))

_VOC2012 = ("", "VOC2012", "VOCdevkit/VOC2012")
_VOC2010 = ("", "VOC2010", "VOCdevkit/VOC2010")

LAYOUTS = {
    "coco-stuff": Layout(
        COCO_STUFF,
        ("", "coco_stuff164k", "coco-stuff"),
        (
            Source(
                "images/{split}",
                ("annotations/{split}",),
                _same(171),
                mask_suffixes=("_labelTrainIds.png",),
                splits=COCO_SPLITS,
            ),
            Source("images/{split}", ("annotations_detectron2/{split}",), _same(171), splits=COCO_SPLITS),
            Source("coco/{split}", ("coco-stuff/annotations_detectron2/{split}",), _same(171), splits=COCO_SPLITS),
        ),
    ),
    "ade20k-150": Layout(
        ADE20K_150,
        ("", "ADEChallengeData2016", "ade/ADEChallengeData2016"),
        (
            Source("images/{split}", ("annotations/{split}",), _shifted(150), splits=ADE_SPLITS),
            Source("images/{split}", ("annotations_detectron2/{split}",), _same(150), splits=ADE_SPLITS),
        ),
    ),
    "ade20k-847": Layout(
        847,
        ("", "ADE20K_2021_17_01"),
        (
            Source(
                "images_detectron2/{split}",
                ("annotations_detectron2/{split}",),
                _same(847),
                mask_suffixes=(".tif",),
                splits=ADE_SPLITS,
            ),
        ),
        class_files=("ade847.json", "classes.json", "classes.txt"),
    ),
    "pascal-voc": Layout(
        PASCAL_VOC, _VOC2012, (*_voc(_shifted(20)), *_detectron2("annotations_detectron2", _same(20)))
    ),
    "pascal-voc-20b": Layout(
        PASCAL_VOC_20B,
        _VOC2012,
        # The converted masks count background last; the dataset's own, which are tried first, as class 0.
        (*_voc(_same(21)), *_detectron2("annotations_detectron2_bg", (*range(1, 21), 0))),
    ),
    "pascal-context": Layout(
        PASCAL_CONTEXT,
        _VOC2010,
        (
            Source(
                "JPEGImages",
                ("SegmentationClassContext",),
                _CONTEXT_BY_ALPHABET,
                lists=("ImageSets/SegmentationContext/{split}.txt",),
            ),
            Source("images/{split}", ("annotations_detectron2/pc59_{split}",), _same(59)),
            Source("JPEGImages", ("annotations_detectron2/pc59_{split}",), _same(59), by_masks=True),
        ),
    ),
    "pascal-context-459": Layout(
        459,
        _VOC2010,
        (
            Source(
                "images/{split}",
                ("annotations_detectron2/pc459_{split}",),
                _same(459),
                mask_suffixes=(".tif", ".png"),
            ),
            Source(
                "JPEGImages",
                ("annotations_detectron2/pc459_{split}",),
                _same(459),
                mask_suffixes=(".tif", ".png"),
                by_masks=True,
            ),
        ),
        class_files=("pc459.json", "classes.json", "classes.txt", "labels.txt", "trainval/labels.txt"),
    ),
    "folder": Layout(
        None,
        ("",),
        (
            Source("images/{split}", ("masks/{split}",), mask_suffixes=(".png", ".tif", ".tiff")),
            Source("images", ("masks",), mask_suffixes=(".png", ".tif", ".tiff")),
        ),
        class_files=("classes.txt", "classes.json"),
    ),
}
