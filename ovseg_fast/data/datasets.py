"""Images with masks on disk, in any of the `LAYOUTS`, as RGB images and label maps with -1 for "no class"."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..images import SUFFIXES, load_image
from ..vocabulary import check_classes, read_classes
from .conventions import LAYOUTS, Layout, Source
from .masks import DataError, MaskValues, read_mask
from .vocabularies import Vocabulary


@dataclass(frozen=True)
class Pair:
    """An image and its mask. Either file may be missing: `check_dataset` names it, reading it raises."""

    name: str
    image: Path
    mask: Path


@dataclass
class SegmentationDataset:
    """Pairs of an image and a mask.

    Args:
        name: the layout, "ade20k-150" for example.
        vocabulary: the classes that label maps hold indices into, and which of them are unseen.
        pairs: the pairs, by name; there may be none.
        values: what the values in the mask files mean.
        image_folder, mask_folders: where the files are.
        mask_suffixes: how the names of mask files end.
    """

    name: str
    vocabulary: Vocabulary
    pairs: list[Pair]
    values: MaskValues
    image_folder: Path
    mask_folders: tuple[Path, ...]
    mask_suffixes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Read a pair.

        Returns:
            An RGB image and its label map (H, W) int32 of the same size, with -1 for no class.

        Raises:
            ImageError: the image is missing or unreadable, see `load_image`.
            DataError: the mask is missing, unreadable, of another size, or holds a label beyond the list of classes.
        """
        pair = self.pairs[index]
        image = load_image(pair.image)
        values = read_mask(pair.mask)
        return fit(pair, image, values), self.values.labels(values, pair.mask)


def fit(pair: Pair, image: Image.Image, values: np.ndarray) -> Image.Image:
    """The image as its mask sees it: upright, or as stored where the mask was drawn without regard to EXIF data.

    Raises:
        DataError: `size`: image and mask differ in size either way.
    """
    height, width = values.shape
    if image.size == (height, width) and height != width:
        with Image.open(pair.image) as stored:
            if stored.size == (width, height):
                image = stored.convert("RGB")
    if image.size != (width, height):
        raise DataError(
            "size",
            f"mask '{pair.mask}' is {width} x {height} pixels, its image '{pair.image}' "
            f"{image.size[0]} x {image.size[1]}; expected the same size.",
        )
    return image


def open_dataset(layout: str, root: str | os.PathLike[str], split: str = "val") -> SegmentationDataset:
    """Find a dataset in the folders that mmsegmentation or detectron2 users have, or one's own.

    Nothing is decoded, and nothing is said of missing files: `check_dataset` does that.

    Args:
        layout: `coco-stuff`, `ade20k-150`, `ade20k-847`, `pascal-voc`, `pascal-voc-20b`, `pascal-context`,
            `pascal-context-459`; or `folder`, one's own `images/`, `masks/` (of the same names, PNG or TIFF, 255 for no
            class) and `classes.txt` (one a line, index 0 first).
        root: the dataset's folder, or one above it: mmsegmentation's `data`, detectron2's `$DETECTRON2_DATASETS`.
        split: `val`, `train`; PASCAL VOC also has `trainaug`. A `folder` has `images/val` with `masks/val` and so on,
            or else is taken whole for any split.

    Returns:
        The dataset. The names of `ade20k-847` and `pascal-context-459` are not in this package: they are read from the
        dataset's folder or from `root`, out of `ade847.json` or `pc459.json` as the authors of CAT-Seg publish them, or
        `classes.json` or `classes.txt`; for PASCAL Context also out of its own `labels.txt`.

    Raises:
        FileNotFoundError: `root` does not exist, or there is no file of class names.
        ValueError: no such layout or split, none of the expected folders, or a wrong number of class names.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    found = LAYOUTS[layout]
    splits = dict.fromkeys(name for source in found.sources for name in source.splits)
    if split not in splits:
        raise ValueError(f"split of {layout} must be one of {', '.join(splits)}, got {split!r}.")
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"root must be the folder of a dataset, there is no '{root}'.")
    if not root.is_dir():
        raise ValueError(f"root must be the folder of a dataset, '{root}' is a file.")

    folder, source = _find(layout, found, root, split)
    vocabulary = _vocabulary(layout, found, root, folder)
    images, masks, lists = source.fill(split)
    image_folder, mask_folders = folder / images, tuple(folder / mask for mask in masks)
    names = _listed(folder, lists) if lists else None
    return SegmentationDataset(
        layout,
        vocabulary,
        _pairs(source, image_folder, mask_folders, names),
        MaskValues(source.values or range(len(vocabulary.classes))),
        image_folder,
        mask_folders,
        source.mask_suffixes,
    )


def _find(layout: str, found: Layout, root: Path, split: str) -> tuple[Path, Source]:
    """The first convention whose folders and lists are all there."""
    wanted = []
    for source in found.sources:
        if split not in source.splits:
            continue
        images, masks, lists = source.fill(split)
        for prefix in found.folders:
            folder = root / prefix
            if all((folder / part).is_dir() for part in (images, masks[0])) and all(
                (folder / part).is_file() for part in lists
            ):
                return folder, source
        wanted.append(" + ".join([images, masks[0], *lists]))
    below = " or in ".join(["it", *(f"'{prefix}'" for prefix in found.folders if prefix)])
    raise ValueError(
        f"root '{root}' holds no {layout} of split {split!r}: looked in {below} for "
        f"{', or '.join(dict.fromkeys(wanted))}."
    )


def _vocabulary(layout: str, found: Layout, root: Path, folder: Path) -> Vocabulary:
    if isinstance(found.classes, Vocabulary):
        return found.classes
    places = list(dict.fromkeys(place / name for place in (folder, root) for name in found.class_files))
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"the class names of {layout} are read from a file, there is none of {', '.join(found.class_files)} in "
            f"'{folder}'."
        )
    names = _numbered(file) or read_classes(file)
    if found.classes is not None and len(names) != found.classes:
        raise ValueError(f"'{file}' must hold the {found.classes} class names of {layout}, got {len(names)}.")
    return Vocabulary(layout, tuple(names))


def _numbered(file: Path) -> list[str] | None:
    """Names out of lines "1: accordion", as PASCAL Context brings them; None for any other file."""
    if file.name != "labels.txt":
        return None
    lines = [re.fullmatch(r"(\d+)\s*:\s*(.+)", line.strip()) for line in file.read_text("utf-8").splitlines() if line]
    entries = [(int(line[1]), line[2]) for line in lines if line]
    if len(entries) < len(lines) or [number for number, _ in entries] != list(range(1, len(entries) + 1)):
        raise ValueError(f"'{file}' must hold lines '1: name', '2: name', ... in order.")
    return check_classes([name for _, name in entries])


def _listed(folder: Path, lists: tuple[str, ...]) -> list[str]:
    """Names out of list files: the first word of each line, without folder and suffix."""
    names: dict[str, None] = {}
    for part in lists:
        for line in (folder / part).read_text("utf-8").splitlines():
            if words := line.split():
                path = PurePosixPath(words[0])
                names[path.stem if path.suffix.lower() in SUFFIXES else path.name] = None
    return list(names)


def image_files(folder: Path) -> dict[str, list[Path]]:
    """Image files of a folder by their names without suffix; several where one image comes in several formats."""
    return _by_stem(folder, SUFFIXES)


def mask_files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
    """Mask files of a folder by the name of their image."""
    return _by_stem(folder, suffixes)


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    if not folder.is_dir():
        return files
    for name in sorted(os.listdir(folder)):
        suffix = next((end for end in suffixes if name.lower().endswith(end.lower())), None)
        if suffix is not None and not name.startswith(".") and len(name) > len(suffix):
            files.setdefault(name[: -len(suffix)], []).append(folder / name)
    return files


def _pairs(source: Source, image_folder: Path, mask_folders: tuple[Path, ...], names: list[str] | None) -> list[Pair]:
    images = image_files(image_folder)
    masks: dict[str, list[Path]] = {}
    for folder in mask_folders:
        for name, files in mask_files(folder, source.mask_suffixes).items():
            masks.setdefault(name, files)
    if names is None:
        names = sorted(masks) if source.by_masks else sorted({*images, *masks})
    # A file that is missing gets the name it should have.
    return [
        Pair(
            name,
            images.get(name, [image_folder / f"{name}.jpg"])[0],
            masks.get(name, [mask_folders[0] / f"{name}{source.mask_suffixes[0]}"])[0],
        )
        for name in names
    ]
