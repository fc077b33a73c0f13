"""Any of the `DATASETS` on disk, or the procedural world, as RGB images with label maps; -1 is "no class"."""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image

from ..arguments import check_whole
from ..files import read_text
from ..images import MAX_SIDE, check_max_side, enough_memory, load_image, suffixes
from ..vocabulary import check_classes, read_classes
from .conventions import DATASETS, Convention, KnownDataset
from .masks import DataError, MaskValues, read_mask
from .vocabularies import WORLD, Vocabulary

if TYPE_CHECKING:
    from .world.scenes import WorldScenes

WORLD_SPLITS = {"train": "train", "test": "test", "all": "all", "val": "test"}
MOST_SCENES = 10_000_000  # of the world, whose names take a gigabyte


@dataclass(frozen=True)
class Pair:
    """An image and its mask. Either file may be missing: `check_dataset` reports it, reading it raises."""

    name: str
    image: Path
    mask: Path


@dataclass
class SegmentationDataset:
    """Pairs of an image and a mask on disk.

    Args:
        name: a key of `DATASETS`. split: which part of it.
        vocabulary: the classes that label maps index.
        pairs: in the order of the split's list, or sorted by name; may be empty.
        values: the meaning of the values in the mask files.
        image_folder, mask_folders, mask_suffixes: where the files are, and the endings of mask files.
        max_side: largest accepted side of an image or mask in pixels.
    """

    name: str
    split: str
    vocabulary: Vocabulary
    pairs: list[Pair]
    values: MaskValues
    image_folder: Path
    mask_folders: tuple[Path, ...]
    mask_suffixes: tuple[str, ...]
    max_side: int = MAX_SIDE

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """An RGB image and its label map (H, W) int32 of the same size, with -1 for no class.

        Raises:
            ImageError: the image is missing or unreadable, see `load_image`.
            DataError: the mask is missing, unreadable, of another size, or holds a label beyond the list of classes.
            TooLargeError, or DataError of kind `memory`: there is not enough memory for the image or the mask.
        """
        pair = self.pairs[index]
        with enough_memory(f"image '{pair.image}'"):
            image, values = load_image(pair.image, self.max_side), read_mask(pair.mask, self.max_side)
            return fit(pair, image, values), self.values.labels(values, pair.mask)


Dataset: TypeAlias = "SegmentationDataset | WorldScenes"
Files: TypeAlias = dict[str, list[Path]]


def fit(pair: Pair, image: Image.Image, values: np.ndarray) -> Image.Image:
    """The image as its mask sees it: upright, or as stored if the mask was drawn without regard to EXIF data.

    Raises:
        DataError: `size`: image and mask differ in size either way.
    """
    height, width = values.shape
    if image.size == (height, width) and height != width:
        stored = load_image(pair.image, max(height, width), upright=False)
        image = stored if stored.size == (width, height) else image
    if image.size != (width, height):
        sizes = f"is {width} x {height} pixels, its image '{pair.image}' {image.width} x {image.height}"
        raise DataError("size", f"mask '{pair.mask}' {sizes}; expected the same size.")
    return image


def open_dataset(
    name: str,
    root: str | os.PathLike[str] | None = None,
    split: str = "val",
    *,
    limit: int | None = None,
    seed: int = 0,
    endless: int = 500,
    max_side: int = MAX_SIDE,
) -> Dataset:
    """Open a dataset in the folders that mmsegmentation or detectron2 users have, your own folder, or the world.

    Decodes nothing and does not look for missing files: `check_dataset` does that.

    Args:
        name: `coco-stuff`, `ade20k-150`, `ade20k-847`, `pascal-voc`, `pascal-voc-20b`, `pascal-context`,
            `pascal-context-459`; `folder`: your own `images/`, `masks/` (same names, PNG or TIFF, 255 for no class) and
            `classes.txt` (one per line, index 0 first); or `world`: scenes that are drawn from a seed.
        root: the dataset's folder, or one above it: mmsegmentation's `data`, detectron2's `$DETECTRON2_DATASETS`. The
            world needs none.
        split: `val`, `train`; PASCAL VOC also has `trainaug`. A `folder` has `images/val` with `masks/val` and so on,
            of any name, otherwise `val` and `train` are the whole folder. The world has `train`, `test` (which `val`
            means) and `all`.
        limit: only the first images. seed: of the world. endless: number of the world's scenes without a limit.
        max_side: largest accepted side of an image or mask in pixels.

    Returns:
        The dataset. The class names of `ade20k-847` and `pascal-context-459` are read from the dataset's folder or from
        `root`: from CAT-Seg's `ade847.json` or `pc459.json`, or from `classes.json` or `classes.txt`; for PASCAL
        Context also from its own `labels.txt`.

    Raises:
        FileNotFoundError: `root` does not exist, or there is no file of class names.
        ValueError: no such dataset or split, none of the expected folders, a wrong number of class names, or a bad
            `limit` or `seed`.
    """
    check_max_side(max_side)
    if limit is not None:
        check_whole("limit", limit, "images")
        if limit < 1:
            raise ValueError(f"limit must be at least 1 image, got {limit}.")
    check_whole("seed", seed)
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")
    if name not in (*DATASETS, WORLD.name):
        raise ValueError(f"name must be one of the datasets {', '.join((*DATASETS, WORLD.name))}, got {name!r}.")
    known = DATASETS.get(name)
    splits = list(dict.fromkeys(part for each in known.conventions for part in each.splits) if known else WORLD_SPLITS)
    if not (any(each.has(split) for each in known.conventions) if known else split in WORLD_SPLITS):
        raise ValueError(f"split of {name} must be one of {', '.join(splits)}, got {split!r}.")
    if known is None:
        from .world.scenes import WorldScenes  # the drawing code, loaded only if something is drawn

        if (limit or 0) > MOST_SCENES:
            raise ValueError(f"limit must be at most {MOST_SCENES:,} scenes of the world, got {limit}.")
        return WorldScenes.first(limit or endless, WORLD_SPLITS[split], seed)
    if root is None:
        raise ValueError(f"root must be the folder that {name} lies in, got None.")
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"root must be the folder of a dataset, there is no '{root}'.")
    if not root.is_dir():
        raise ValueError(f"root must be the folder of a dataset, '{root}' is a file.")

    folder, found = _find(name, known, root, split)
    vocabulary = _vocabulary(name, known, root, folder)
    images, masks, lists = found.paths(split)
    image_folder, mask_folders = folder / images, tuple(folder / mask for mask in masks)
    pairs = _pairs(found, image_folder, mask_folders, _listed(folder, lists) if lists else None)
    values = MaskValues(found.values or range(len(vocabulary.classes)))
    return SegmentationDataset(
        name, split, vocabulary, pairs[:limit], values, image_folder, mask_folders, found.mask_suffixes, max_side
    )


def _find(name: str, known: KnownDataset, root: Path, split: str) -> tuple[Path, Convention]:
    """The first convention whose folders and lists all exist, and the folder that it was found in."""
    wanted = []
    for convention in known.conventions:
        if not convention.has(split):
            continue
        images, masks, lists = convention.paths(split)
        for folder in (root / prefix for prefix in known.folders):
            folders_exist = (folder / images).is_dir() and (folder / masks[0]).is_dir()
            if folders_exist and all((folder / part).is_file() for part in lists):
                return folder, convention
        wanted.append(" + ".join([images, masks[0], *lists]))
        if convention.any_split and (there := _own_splits(root)):
            raise ValueError(f"root '{root}' holds no split {split!r}, only {', '.join(there)}.")
    below = " or in ".join(["it", *(f"'{prefix}'" for prefix in known.folders if prefix)])
    looked = f"looked in {below} for {', or '.join(dict.fromkeys(wanted))}"
    raise ValueError(f"root '{root}' holds no {name} of split {split!r}: {looked}.")


def _own_splits(root: Path) -> list[str]:
    """The splits of one's own folder; none if its images are not sorted into splits."""
    images, masks = root / "images", root / "masks"
    if not (images.is_dir() and masks.is_dir()) or files_by_name((images,), suffixes()):
        return []
    return sorted(entry.name for entry in images.iterdir() if entry.is_dir() and (masks / entry.name).is_dir())


def _vocabulary(name: str, known: KnownDataset, root: Path, folder: Path) -> Vocabulary:
    if isinstance(known.classes, Vocabulary):
        return known.classes
    places = (place / file for place in (folder, root) for file in known.class_files)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        files = ", ".join(known.class_files)
        raise FileNotFoundError(
            f"the class names of {name} are read from a file, but '{folder}' holds none of {files}."
        )
    names = _numbered(file) or read_classes(file, indexed=True)
    if known.classes is not None and len(names) != known.classes:
        raise ValueError(f"'{file}' must hold the {known.classes} class names of {name}, got {len(names)}.")
    return Vocabulary(name, tuple(names))


def _numbered(file: Path) -> list[str] | None:
    """Names from lines "1: accordion", as PASCAL Context has them; None for any other file."""
    if file.name != "labels.txt":
        return None
    lines = [line for line in read_text(file, "class names").split("\n") if line.strip()]
    matches = [re.fullmatch(r"(\d+)\s*:\s*(.+)", line.strip()) for line in lines]
    entries = [(int(match[1]), match[2]) for match in matches if match]
    first = entries[0][0] if entries and entries[0][0] in (0, 1) else 1
    numbers = list(range(first, first + len(entries)))
    if not entries or len(entries) < len(lines) or [number for number, _ in entries] != numbers:
        raise ValueError(f"'{file}' must hold lines '1: name', '2: name', ... in order.")
    return check_classes([name for _, name in entries])


def _listed(folder: Path, lists: tuple[str, ...]) -> list[str]:
    """Names from list files: the first word of each line, without folder and suffix."""
    lines = (line.split() for part in lists for line in read_text(folder / part, "list of images").split("\n"))
    paths = (PurePosixPath(words[0].replace("\\", "/")) for words in lines if words)  # also as Windows writes them
    endings = suffixes()
    names = (path.stem if path.suffix.lower() in endings else path.name for path in paths)
    return list(dict.fromkeys(unicodedata.normalize("NFC", name) for name in names))


def files_by_name(folders: tuple[Path, ...], suffixes: tuple[str, ...]) -> Files:
    """Files by name without suffix, each name from the first folder that has it; several if in several formats.

    Names are in Unicode's NFC, so that those of a Mac, often in NFD, are found.
    """
    found: Files = {}
    for folder in folders:
        files: Files = {}
        for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
            suffix = next((end for end in suffixes if name.lower().endswith(end.lower())), None)
            if suffix is not None and not name.startswith(".") and len(name) > len(suffix):
                files.setdefault(unicodedata.normalize("NFC", name[: -len(suffix)]), []).append(folder / name)
        found = files | found
    return found


def _pairs(
    convention: Convention, image_folder: Path, mask_folders: tuple[Path, ...], names: list[str] | None
) -> list[Pair]:
    images = files_by_name((image_folder,), suffixes())
    masks = files_by_name(mask_folders, convention.mask_suffixes)
    if names is None:
        names = sorted(masks if convention.by_masks else images | masks)
    # A missing file gets the name that it should have.
    return [
        Pair(
            name,
            images.get(name, [image_folder / f"{name}.jpg"])[0],
            masks.get(name, [mask_folders[0] / f"{name}{convention.mask_suffixes[0]}"])[0],
        )
        for name in names
    ]
