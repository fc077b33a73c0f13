"""The literal label maps against numpy; both methods from an image to labels and loss against the published ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import literal
from goldens import DEVICE, filled, golden
from literal_images import CLIP_PIXELS, IMAGENET_PIXELS, catseg_logits, normalised
from parity import fill
from tolerances import ARGMAX_AGREEMENT, GOLDEN_LOSS, GOLDEN_OUTPUT

OUTPUT = GOLDEN_OUTPUT / 2  # nothing is rewritten here, so no room is needed for another order of summation


def bilinear(maps, size):
    """Resize of (..., h, w) with align_corners=False, pixel centre by pixel centre, in numpy."""

    def matrix(n, m):
        rows = np.zeros((m, n))
        for i in range(m):
            position = max((i + 0.5) * n / m - 0.5, 0)
            low = min(int(position), n - 1)
            rows[i, low] += 1 - (position - low)
            rows[i, min(low + 1, n - 1)] += position - low
        return rows

    return matrix(maps.shape[-2], size[0]) @ maps @ matrix(maps.shape[-1], size[1]).T


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def covering_average(maps, corners, height, width):
    """At every pixel the mean over the windows that hold it, found pixel by pixel."""
    h, w = maps.shape[-2:]
    out = np.empty((maps.shape[1], height, width))
    for y in range(height):
        for x in range(width):
            hits = [
                window[:, y - top, x - left]
                for window, (top, left) in zip(maps, corners, strict=True)
                if 0 <= y - top < h and 0 <= x - left < w
            ]
            out[:, y, x] = np.mean(hits, axis=0)
    return out


def test_window_positions():
    assert literal.catseg_corners() == [(0, 0), (0, 256), (256, 0), (256, 256)]
    assert literal.cascade_corners((600, 800)) == [(0, 0), (0, 288), (88, 0), (88, 288)]
    assert literal.cascade_corners((512, 512)) == [(0, 0)]
    assert literal.cascade_corners((512, 938)) == [(0, 0), (0, 426)]
    assert literal.cascade_corners((512, 939)) == [(0, 0), (0, 426), (0, 427)]
    with pytest.raises(ValueError, match="image_size"):
        literal.cascade_corners((511, 800))


def test_catseg_label_map():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 3, 6, 6, generator=generator, dtype=torch.float64)
    out = literal.catseg_label_map(logits, (25, 31), size=40, window=24)
    windows = sigmoid(bilinear(logits.numpy(), (24, 24)))
    local = covering_average(windows[:4], [(0, 0), (0, 16), (16, 0), (16, 16)], 40, 40)
    expected = bilinear((local + bilinear(windows[4], (40, 40))) / 2, (25, 31))
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-12)


def test_cascade_label_map():
    generator = torch.Generator().manual_seed(0)
    masks = 3 * torch.randn(6, 4, 4, 4, generator=generator, dtype=torch.float64)
    image_size, out_size, seen = (20, 33), (27, 41), [0, 2]
    arguments = {"seen": seen, "crop": 16, "stride": 13}
    corners = [(0, 0), (0, 13), (0, 17), (4, 0), (4, 13), (4, 17)]
    scores = sigmoid(bilinear(masks.numpy(), (16, 16)))
    scores[:, seen] -= 0.1
    average = covering_average(scores, corners, *image_size)
    got = literal.cascade_window_average(masks, image_size, **arguments)
    np.testing.assert_allclose(got.numpy(), average, rtol=0, atol=1e-12)
    exponentials = np.exp(bilinear(average, out_size))
    got = literal.cascade_label_map(masks, image_size, out_size, **arguments)
    np.testing.assert_allclose(got.numpy(), exponentials / exponentials.sum(axis=0), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="6, one per window"):
        literal.cascade_label_map(masks[:5], image_size, out_size, **arguments)


# --- from image to labels ---


def resized(maps, size):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "pooling", "out_size"), [("slide", 1, (480, 640)), ("slide_pool2", 2, (640, 640))])
def test_catseg_sliding_windows_from_image_to_labels(op, pooling, out_size):
    case = golden("catseg_vitb")
    picture = case.images(f"{op}.image", 480, 640).float()
    large = resized(picture, (640, 640))
    crops = [large[:, :, top : top + 384, left : left + 384] for top, left in literal.catseg_corners()]
    pixels = normalised(torch.cat([*crops, resized(picture, (384, 384))]), CLIP_PIXELS)
    assert case.error(f"{op}.clip_input", pixels) <= OUTPUT
    logits = catseg_logits(pixels, pooling)
    assert case.error(f"{op}.logits", logits) <= OUTPUT
    probabilities = literal.catseg_label_map(logits, out_size)
    assert case.error(f"{op}.sem_seg", probabilities) <= OUTPUT
    assert case.agreement(f"{op}.argmax", probabilities.argmax(dim=0).cpu()) >= ARGMAX_AGREEMENT


@pytest.mark.slow
def test_cascade_sliding_windows_from_image_to_labels():
    case = golden("cascade_clip")
    picture = normalised(case.images("slide.image", 600, 800), IMAGENET_PIXELS)
    corners = literal.cascade_corners((600, 800))
    crops = torch.cat([picture[:, :, top : top + 512, left : left + 512] for top, left in corners])
    text = torch.from_numpy(case.store["text"]).to(DEVICE)
    backbone, head = (filled("cascade_clip_vitb", part, "E") for part in ("backbone.", "decode_head."))
    with torch.no_grad():
        gathered = literal.layer_gather(backbone, *literal.prompted_image_encoder(backbone, crops))
        masks = literal.cascade_masks(head, *gathered, text)
    average = literal.cascade_window_average(masks, (600, 800), case.facts["seen"])[None]
    assert case.error("slide.pred", average) <= OUTPUT
    assert case.error("slide.pred_rescaled", resized(average, (450, 600))) <= OUTPUT
    probabilities = literal.cascade_label_map(masks, (600, 800), (450, 600), case.facts["seen"])[None]
    assert case.error("slide.softmax", probabilities) <= OUTPUT
    assert case.agreement("slide.argmax", probabilities.argmax(dim=1).cpu()) >= ARGMAX_AGREEMENT


@pytest.mark.slow
def test_catseg_training_loss():
    case = golden("catseg_vitb")
    images = torch.cat([case.images(f"train.image{i}", 384, 384) for i in range(2)])
    logits = catseg_logits(normalised(images, CLIP_PIXELS), 2)
    assert case.error("train.logits", logits) <= OUTPUT
    labels = torch.from_numpy(np.stack([fill.labels(f"train.label{i}", 384, 384, 7, "C") for i in range(2)]))
    loss = literal.catseg_loss(logits, labels.to(DEVICE))
    assert loss.item() == pytest.approx(case.facts["train"]["loss"], rel=GOLDEN_LOSS)
