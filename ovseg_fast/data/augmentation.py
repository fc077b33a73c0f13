"""Augmentation of a training image and its labels: resize, crop at random, flip, distort colours as SSD does."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..arguments import check_number
from ..compat import ensure_importable
from .masks import NO_CLASS

ensure_importable()

from torchvision import tv_tensors  # noqa: E402
from torchvision.transforms import v2  # noqa: E402
from torchvision.transforms.v2 import functional as F  # noqa: E402

CROP_TRIES = 10

Augmentation = Callable[[Image.Image | Tensor, Any, torch.Generator], tuple[Tensor, Tensor]]


def augmentation(
    size: int,
    *,
    scales: tuple[float, float],
    longest: float,
    largest_share: float,
    fill: int,
    flip_first: bool,
    distortion: bool = True,
) -> Augmentation:
    """The augmentation of a method; the arguments but the first and the last are its `AugmentationSettings`.

    Args:
        size: side of the crop in pixels. fill: grey level of the padding.
        scales: smallest and largest shorter side before the crop, in units of `size`.
        longest: largest longer side, in units of the drawn shorter side.
        largest_share: largest share of a crop's labelled pixels that one class may have.
        flip_first: whether the flip comes before the colour distortion.
        distortion: whether colours are distorted; without it colours keep their names.

    Returns:
        A function of an image (PIL, or uint8 (3, H, W)), its labels (H, W) (array or tensor of indices, -1 for no
        class) and a CPU generator, which alone decides what is drawn. It gives a uint8 tensor (3, size, size) and int64
        labels (size, size), and raises ValueError for an image or labels of another form or size.

    Raises:
        ValueError: size is not a whole number of at least 2, scales are not two ascending numbers above 0, or another
            number is out of its range.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise ValueError(f"size must be a whole number of pixels, at least 2, got {size!r}.")
    if not (len(scales) == 2 and 0 < scales[0] <= scales[1] < math.inf):
        raise ValueError(f"scales must be two numbers above 0, the smaller one first, got {scales!r}.")
    if not longest >= 1:
        raise ValueError(f"longest must be a number of at least 1, got {longest!r}.")
    check_number("largest_share", largest_share, 0, 1, "a share")
    flip, colours = [v2.RandomHorizontalFlip()], _distortion() if distortion else []
    last = [*flip, *colours] if flip_first else [*colours, *flip]
    steps = [ShorterSide(size, scales, longest), Crop(size, largest_share), *last, Pad(size, fill)]
    return partial(_seeded, v2.Compose(steps))


class ShorterSide(v2.Transform):
    """Resize the shorter side to `size` times a random factor, but the longer side to at most `longer` times that."""

    def __init__(self, size: int, factors: tuple[float, float] = (1.0, 1.0), longer: float = math.inf) -> None:
        super().__init__()
        self.size, self.factors, self.longer = size, factors, longer

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = F.get_size(flat_inputs[0])
        low, high = self.factors
        side = self.size * (low + (high - low) * float(torch.rand(())))
        scale = min(side / min(height, width), self.longer * side / max(height, width))
        return {"size": [max(1, round(height * scale)), max(1, round(width * scale))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.resize(inpt, params["size"], antialias=True)


class Crop(v2.Transform):
    """A random crop of at most `size` x `size` pixels; up to ten are drawn until no class covers more than `most` of
    its labelled pixels."""

    def __init__(self, size: int, most: float) -> None:
        super().__init__()
        self.size, self.most = size, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        labels = next(one for one in flat_inputs if isinstance(one, tv_tensors.Mask))
        height, width = labels.shape[-2:]
        params: dict[str, Any] = {"height": min(self.size, height), "width": min(self.size, width)}
        for _ in range(CROP_TRIES):
            params["top"] = int(torch.randint(height - params["height"] + 1, ()))
            params["left"] = int(torch.randint(width - params["width"] + 1, ()))
            if self.most >= 1 or largest_share(F.crop(labels, **params)) <= self.most:
                break
        return params

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class Pad(v2.Transform):
    """Fill up to `size` x `size` at the right and the bottom, labels with -1."""

    def __init__(self, size: int, fill: int) -> None:
        super().__init__()
        self.size, self.fill = size, fill

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = F.get_size(inpt)
        fill = NO_CLASS if isinstance(inpt, tv_tensors.Mask) else self.fill
        return F.pad(inpt, [0, 0, self.size - width, self.size - height], fill=fill)


def largest_share(labels: Tensor) -> float:
    """Share of the most frequent class among the pixels that have one; 1 where none has."""
    counts = torch.bincount(labels.as_subclass(Tensor).flatten().clamp(min=NO_CLASS) + 1)[1:]
    return float(counts.max() / counts.sum()) if counts.sum() else 1.0


def _distortion() -> list[v2.Transform]:
    """SSD's colour distortion, each part with probability 1/2, contrast before or after saturation and hue.

    Not v2.RandomPhotometricDistort: it also exchanges channels, after which no colour has its name any more.
    """

    def half(**jitter: tuple[float, float]) -> v2.Transform:
        return v2.RandomApply([v2.ColorJitter(**jitter)], p=0.5)

    brightness = half(brightness=(1 - 32 / 255, 1 + 32 / 255))
    contrast = half(contrast=(0.5, 1.5))
    colour = [half(saturation=(0.5, 1.5)), half(hue=(-0.1, 0.1))]  # 18 of OpenCV's 180 steps
    return [brightness, v2.RandomChoice([v2.Compose([contrast, *colour]), v2.Compose([*colour, contrast])])]


def _seeded(
    transforms: v2.Transform, image: Image.Image | Tensor, labels: Any, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Runs transforms, which know torch's global random state only, on the numbers of a generator."""
    if isinstance(image, Image.Image):
        pixels = F.to_image(image.convert("RGB"))
    elif not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        form = f"{image.dtype} of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"image must be a PIL image or a uint8 tensor (3, H, W), got {form}.")
    else:
        pixels = tv_tensors.Image(image)
    classes = labels if isinstance(labels, Tensor) else torch.as_tensor(np.asarray(labels))
    if classes.is_floating_point() or classes.shape != pixels.shape[-2:]:
        got = f"{classes.dtype} of shape {tuple(classes.shape)}"
        raise ValueError(f"labels must be whole numbers of the image's size {tuple(pixels.shape[-2:])}, got {got}.")
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed the GPU as well
        pixels, classes = transforms(pixels, tv_tensors.Mask(classes.long()))
    return pixels.as_subclass(Tensor).contiguous(), classes.as_subclass(Tensor).contiguous()
