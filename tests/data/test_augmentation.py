from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ovseg_fast.data.augmentation import (
    Augmentation,
    Crop,
    Pad,
    ShorterSide,
    augmentation,
    largest_share,
    tv_tensors,
)
from ovseg_fast.models import CascadeCLIP, CATSeg

SETTINGS = {model.method: asdict(model.augmentation) for model in (CATSeg, CascadeCLIP)}
BOTH = pytest.mark.parametrize("method", SETTINGS)


def published(method: str, size: int, **others: Any) -> Augmentation:
    return augmentation(size, **(SETTINGS[method] | others))


def pair(rng: torch.Generator, height: int = 60, width: int = 90) -> tuple[Tensor, Tensor]:
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=rng)
    return pixels, torch.randint(-1, 9, (height, width), generator=rng)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@BOTH
@pytest.mark.parametrize("height, width", [(60, 90), (90, 60), (32, 32), (5, 200), (20, 21), (300, 40)])
def test_form_of_what_comes_out(rng, method: str, height: int, width: int) -> None:
    for _ in range(4):
        image, labels = published(method, 32)(*pair(rng, height, width), rng)
        assert type(image) is Tensor and type(labels) is Tensor
        assert image.dtype == torch.uint8 and image.shape == (3, 32, 32)
        assert labels.dtype == torch.int64 and labels.shape == (32, 32)
        assert int(labels.min()) >= -1 and int(labels.max()) < 9


@BOTH
def test_images_and_labels_of_every_kind_give_the_same(rng, method: str) -> None:
    augment = published(method, 24)
    pixels, labels = pair(rng)
    expected = augment(pixels, labels, seeded(3))
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    for other in (labels.numpy().astype(np.int32), labels.short(), labels.tolist()):
        for one, two in zip(expected, augment(image, other, seeded(3)), strict=True):
            assert torch.equal(one, two)


@BOTH
def test_the_seed_alone_decides(rng, method: str) -> None:
    augment = published(method, 24)
    pixels, labels = pair(rng)
    before = pixels.clone(), labels.clone()
    first = augment(pixels, labels, seeded(5))
    torch.manual_seed(99)
    np.random.seed(99)
    state = torch.get_rng_state()
    again = augment(pixels, labels, seeded(5))
    assert torch.equal(torch.get_rng_state(), state), "the global random state was used"
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert any(not torch.equal(first[0], augment(pixels, labels, seeded(seed))[0]) for seed in range(6, 10))
    assert torch.equal(pixels, before[0]) and torch.equal(labels, before[1])

    generator = seeded(5)
    augment(pixels, labels, generator)
    assert not torch.equal(augment(pixels, labels, generator)[0], first[0]), "a generator that goes on draws anew"


@BOTH
def test_image_and_labels_move_together(rng, method: str) -> None:
    # Two grey halves that no colour distortion exchanges: bright is class 1, dark class 0.
    labels = torch.zeros(80, 120, dtype=torch.int64)
    labels[:, int(torch.randint(40, 80, (), generator=rng)) :] = 1
    labels[int(torch.randint(20, 60, (), generator=rng)) :, :40] = 1
    pixels = (labels * 200 + 20).to(torch.uint8).expand(3, -1, -1)
    augment = published(method, 64)
    mixed = 0
    for _ in range(12):
        image, moved = augment(pixels, labels, rng)
        shown = image.float().mean(0)
        inside = moved >= 0
        if len(moved[inside].unique()) < 2:
            continue
        mixed += 1
        middle = (shown[inside].min() + shown[inside].max()) / 2
        agree = ((shown > middle).long() == moved)[inside].float().mean()
        assert agree > 0.93, "all but the pixels that resizing mixes"
    assert mixed >= 3


@BOTH
def test_flips_half_of_the_images(rng, method: str) -> None:
    labels = torch.arange(40).expand(40, 40)
    pixels = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=rng)
    rows = [published(method, 40)(pixels, labels, rng)[1][0] for _ in range(80)]
    flipped = sum(bool(row[row >= 0][0] > row[row >= 0][-1]) for row in rows)
    assert 12 <= flipped <= 68  # outside with a probability of 1e-10


def test_catseg_brings_the_shorter_side_to_the_crop(rng) -> None:
    # Every row of labels is its number: the whole height is in the crop, so nothing was cut off from it.
    labels = torch.arange(50)[:, None].expand(50, 90)
    pixels, _ = pair(rng, 50, 90)
    for _ in range(10):
        _, cropped = published("cat-seg", 100)(pixels, labels, rng)
        assert torch.equal(cropped[:, 0].unique(), torch.arange(50)) and torch.equal(
            cropped[0], cropped[0, :1].expand(100)
        )


def test_cascade_clip_resizes_by_half_to_double(rng) -> None:
    # The step from pixel to pixel of a ramp tells the factor.
    labels = torch.arange(120).expand(120, 120)
    pixels, _ = pair(rng, 120, 120)
    factors = []
    for _ in range(80):
        _, cropped = published("cascade-clip", 60)(pixels, labels, rng)
        row = cropped[0][cropped[0] >= 0]
        factors.append(len(row) / (float(row.max() - row.min()) + 1) * 2)
    assert 0.47 < min(factors) < 0.8 and 1.6 < max(factors) < 2.15


def test_padding_of_small_images(rng) -> None:
    padded = 0
    for _ in range(20):
        pixels, labels = torch.full((3, 30, 30), 77, dtype=torch.uint8), torch.full((30, 30), 4)
        image, moved = published("cascade-clip", 64)(pixels, labels, rng)
        outside = moved < 0
        padded += bool(outside.any())
        assert set(moved.unique().tolist()) <= {-1, 4}
        assert (image[:, outside] == 0).all() and (image[:, ~outside] > 0).all()
        height = int((~outside).any(1).sum())
        assert not outside[:height, :height].any(), "the image keeps the upper left corner"
    assert padded


@pytest.mark.parametrize("fill", [0, 128])
def test_pad_value(rng, fill: int) -> None:
    pixels, labels = pair(rng, 5, 7)
    image, moved = Pad(9, fill)(tv_tensors.Image(pixels), tv_tensors.Mask(labels))
    assert torch.equal(image[:, :5, :7], pixels) and torch.equal(moved[:5, :7], labels)
    assert (image[:, 5:] == fill).all() and (image[:, :, 7:] == fill).all()
    assert (moved[5:] == -1).all() and (moved[:, 7:] == -1).all()


def test_a_long_image_is_held_to_four_times_the_crop(rng) -> None:
    pixels = tv_tensors.Image(pair(rng, 10, 100)[0])
    assert ShorterSide(32, longer=4)(pixels).shape == (3, 13, 128)
    assert ShorterSide(32)(pixels).shape == (3, 32, 320)
    pixels, labels = torch.zeros(3, 10, 400, dtype=torch.uint8), torch.zeros(10, 400)
    for method, rows in (("cat-seg", range(32, 33)), ("cascade-clip", range(1, 8))):
        _, moved = published(method, 32)(pixels, labels.long(), rng)
        assert int((moved >= 0).any(1).sum()) in rows


def test_no_category_covers_more_than_three_quarters(rng) -> None:
    # A strip of a second class: most crops hold too much of the first.
    labels = torch.zeros(64, 256, dtype=torch.int64)
    labels[:, 150:175] = 1
    mask = tv_tensors.Mask(labels)
    image = tv_tensors.Image(torch.zeros(3, 64, 256, dtype=torch.uint8))
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
        bound = [largest_share(Crop(64, 0.75)(image, mask)[1]) <= 0.75 for _ in range(200)]
        free = [largest_share(Crop(64, 1.0)(image, mask)[1]) <= 0.75 for _ in range(200)]
    assert sum(bound) > 170 and sum(free) < 100  # about 29 % of the crops fit, so 97 % of ten tries hit one
    uniform = tv_tensors.Mask(torch.zeros(64, 256, dtype=torch.int64))
    assert Crop(64, 0.75)(image, uniform)[1].shape == (64, 64), "an image of one class is still cropped"


def test_largest_share_counts_labelled_pixels_only(rng) -> None:
    labels = torch.tensor([[0, 0, 0, 2], [-1, -1, -1, -1]])
    assert largest_share(labels) == 0.75
    assert largest_share(torch.full((3, 3), -1)) == 1.0


@BOTH
def test_distortion_changes_colours_but_never_exchanges_channels(rng, method: str) -> None:
    red = torch.tensor([200, 60, 40], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    augment = published(method, 4)
    colours = []
    for _ in range(400):
        image, moved = augment(red, torch.randint(0, 4, (4, 4), generator=rng), rng)
        colours.append(image[:, 0, 0])
        assert len(image[:, moved >= 0].unique(dim=1).T) == 1, "one colour stays one"
        assert int(image[:, 0, 0].argmax()) == 0
    assert len(torch.stack(colours).unique(dim=0)) > 100
    # each of the four parts is left out by half, so all are in one of 16 calls
    assert any(torch.equal(colour, red[:, 0, 0]) for colour in colours)


def test_bad_input_is_refused(rng) -> None:
    for size in (1, 2.5, True):
        with pytest.raises(ValueError, match=f"size must be a whole number of pixels, at least 2, got {size}"):
            published("cat-seg", size)
    augment = published("cat-seg", 32)
    pixels, labels = pair(rng)
    with pytest.raises(
        ValueError, match=r"image must be a PIL image or a uint8 tensor \(3, H, W\), got torch.float32 of"
    ):
        augment(pixels.float(), labels, rng)
    with pytest.raises(ValueError, match=r"image must be .*, got ndarray"):
        augment(pixels.numpy(), labels, rng)
    with pytest.raises(
        ValueError, match=r"labels must be whole numbers of the image's size \(60, 90\), got torch.int64 of"
    ):
        augment(pixels, labels[1:], rng)
    with pytest.raises(ValueError, match=r"labels must be whole numbers .* got torch.float32 of shape \(60, 90\)"):
        augment(pixels, labels.float(), rng)


def test_data_package_needs_no_torchvision() -> None:
    code = "import sys, ovseg_fast.data; print('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@BOTH
def test_colours_stay_and_sizes_are_chosen(rng, method: str) -> None:
    """Without distortion, and at a scale of 1, what comes out is a part of the picture or of its mirror image."""
    pixels, labels = pair(rng, 40, 60)
    augment = published(method, 40, scales=(1.0, 1.0), distortion=False)
    for _ in range(6):
        image, part = augment(pixels, labels, rng)
        places = [
            (source[0][..., left : left + 40], source[1][..., left : left + 40])
            for source in ((pixels, labels), (pixels.flip(-1), labels.flip(-1)))
            for left in range(21)
        ]
        assert any(torch.equal(image, a) and torch.equal(part, b) for a, b in places)
    larger = published(method, 40, scales=(3.0, 3.0), distortion=False)
    image, part = larger(torch.full((3, 40, 40), 7, dtype=torch.uint8), torch.arange(1600).view(40, 40) // 160, rng)
    assert bool((image == 7).all()) and len(part.unique()) < 6  # a third of the picture's height


@pytest.mark.parametrize("scales", [(0.0, 1.0), (2.0, 1.0), (1.0,), (1.0, float("inf"))])
def test_scales_that_are_none(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="scales must be two numbers above 0, the smaller one first"):
        published("cat-seg", 40, scales=scales)
