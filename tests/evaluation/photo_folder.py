"""A small dataset in a folder, read without `data/datasets.py`; run as a program, it is evaluated until killed."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ovseg_fast.images import load_image

CLASSES = ("cat", "grass", "sky", "wall", "unicorn")


class Pair(NamedTuple):
    name: str
    image: Path
    mask: Path


@dataclass
class ClassList:
    """As `data.vocabularies.Vocabulary`."""

    classes: tuple[str, ...]
    unseen: tuple[int, ...] = ()
    background: tuple[str, ...] = ()


class PhotoFolder:
    """`NAME.png` and `NAME_mask.png`, 255 where there is no class."""

    name = "photo folder"
    split = "val"

    def __init__(self, folder: Path) -> None:
        self.vocabulary = ClassList(CLASSES)
        self.pairs = [
            Pair(mask.stem.removesuffix("_mask"), Path(str(mask).replace("_mask", "")), mask)
            for mask in sorted(folder.glob("*_mask.png"))
        ]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        pair = self.pairs[index]
        labels = np.array(Image.open(pair.mask)).astype(np.int32)
        return load_image(pair.image), np.where(labels == 255, -1, labels)


def make_photos(folder: Path, count: int, seed: int, size: tuple[int, int] = (48, 52)) -> PhotoFolder:
    """Random photographs and masks; "unicorn" is in no mask, a fifth of the pixels have no class."""
    random = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for number in range(count):
        height, width = (side + int(random.integers(8)) for side in size)
        photo = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = random.choice([0, 1, 2, 3, 255], (height, width)).astype(np.uint8)
        Image.fromarray(photo).save(folder / f"{number:03}.png")
        Image.fromarray(mask).save(folder / f"{number:03}_mask.png")
    return PhotoFolder(folder)


if __name__ == "__main__":
    from ovseg_fast import load
    from ovseg_fast.evaluation.evaluate import evaluate

    class SlowFolder(PhotoFolder):
        """Leaves the test the time to kill this program before it is done."""

        def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
            time.sleep(0.05)
            return super().read(index)

    photos, weights, result = map(Path, sys.argv[1:])
    segmenter = load("catseg-tiny", weights=weights, device="cpu")
    segmenter.model.double()  # as in the test, where rounding must not pick labels
    evaluate(segmenter, SlowFolder(photos), result, mode="whole", save_seconds=0)
