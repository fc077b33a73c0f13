"""Made-up datasets: tiny files in a folder of the test's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZE = (7, 9)  # height, width: unequal, so that a transposed mask shows


class Tree:
    """Writes images, masks and lists below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.random = np.random.default_rng(np.random.randint(2**31))  # the test's seed

    def image(self, path: str, size: tuple[int, int] = SIZE) -> Path:
        file = self._file(path)
        Image.fromarray(self.random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
        return file

    def mask(self, path: str, values: np.ndarray) -> Path:
        """8 bits, or 16 where the dtype is uint16."""
        file = self._file(path)
        Image.fromarray(values).save(file)
        return file

    def values(self, possible: list[int], dtype: type = np.uint8, size: tuple[int, int] = SIZE) -> np.ndarray:
        """(H, W), in which each possible value is found."""
        values = np.resize(np.array(possible, dtype), size[0] * size[1])
        return self.random.permutation(values).reshape(size)

    def text(self, path: str, *lines: str) -> Path:
        file = self._file(path)
        file.write_text("".join(f"{line}\n" for line in lines))
        return file

    def _file(self, path: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        return file


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def own(tree: Tree) -> Tree:
    """One's own data: three classes, pairs a, b, c."""
    for name in "abc":
        tree.image(f"images/{name}.jpg")
        tree.mask(f"masks/{name}.png", tree.values([0, 1, 2, 255]))
    tree.text("classes.txt", "cat", "grass", "sky")
    return tree
