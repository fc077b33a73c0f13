"""The page of `ovseg-fast demo`: where names fit the picture, truth and prediction side by side, costs and scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ovseg_fast as ovs
from ovseg_fast.demo import page as page_module
from ovseg_fast.demo.page import cost_maps, page
from ovseg_fast.models.cascade_clip import ImageFeatures as CascadeFeatures
from ovseg_fast.models.catseg import ImageFeatures as CATSegFeatures
from ovseg_fast.segmentation import Segmentation
from ovseg_fast.visualize import cost_map


def red_corner(width: int, height: int) -> np.ndarray:
    """Blue, and red in the last third of both sides."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 2] = 255
    pixels[height * 2 // 3 :, width * 2 // 3 :] = (255, 0, 0)
    return pixels


@pytest.mark.parametrize("size", [(96, 96), (100, 70), (192, 160), (33, 130)])
@pytest.mark.parametrize("name", ["catseg-tiny", "cascade-clip-tiny"])
def test_cost_maps_lie_where_the_image_fits_the_words(name: str, size: tuple[int, int], monkeypatch) -> None:
    segmenter = ovs.load(name, weights=None, device="cpu")
    model = segmenter.model

    def colours(pixels):  # an encoder that sees the colour of each patch, through all that happens before it
        if name == "catseg-tiny":
            dense = F.avg_pool2d(model.preprocess(pixels) * model.pixel_std + model.pixel_mean, 8).permute(0, 2, 3, 1)
            return CATSegFeatures(dense, ())
        dense = F.avg_pool2d(pixels, 8).permute(0, 2, 3, 1)
        return CascadeFeatures((dense.flatten(1, 2) * 0, dense.flatten(1, 2)), dense.mean((1, 2)), dense.shape[1:3])

    monkeypatch.setattr(model, "encode_pixels", colours)
    monkeypatch.setattr(segmenter, "embed_text", lambda names: torch.tensor([[[1.0, 0, 0]], [[0, 0, 1.0]]]))
    pixels = red_corner(*size)
    red, blue = cost_maps(segmenter, Image.fromarray(pixels), ["red", "blue"])
    assert red.shape == blue.shape == pixels.shape[:2] and red.dtype == np.float32
    expected = pixels[..., 0] > 0
    assert red.max() > 0.99 and blue.max() > 0.99 and red.min() < 0.01
    wrong = (red > blue) != expected
    height, width = wrong.shape
    rows, columns = np.nonzero(wrong)  # a patch covers a twelfth, or a little more where the image is padded
    near = (abs(rows - height * 2 / 3) < height / 8) | (abs(columns - width * 2 / 3) < width / 8)
    assert near.all()
    assert wrong.mean() < 0.06


def test_cost_maps_are_the_cosines_that_cat_seg_starts_from(rng) -> None:
    segmenter = ovs.load("catseg-tiny", weights=None, device="cpu")
    pixels = torch.randint(256, (96, 96, 3), generator=rng, dtype=torch.uint8)
    names = ["red star", "water"]
    maps = cost_maps(segmenter, Image.fromarray(pixels.numpy()), names)
    with torch.no_grad():
        dense = segmenter.model.encode_image(pixels.permute(2, 0, 1)[None]).dense[0]
    text = segmenter.embed_text(names)[:, 0]
    cosine = (dense / dense.norm(dim=-1, keepdim=True)) @ (text / text.norm(dim=-1, keepdim=True)).T
    small = F.interpolate(torch.from_numpy(maps)[None], scale_factor=1 / 8, mode="area")[0]
    smooth = F.avg_pool2d(F.interpolate(cosine.permute(2, 0, 1)[None], scale_factor=8, mode="bilinear"), 8)[0]
    torch.testing.assert_close(small, smooth, atol=1e-5, rtol=0)
    assert -1 <= maps.min() <= maps.max() <= 1


@pytest.fixture
def rows(monkeypatch):
    """A page made of what is given, as its rows of panels."""

    def make(labels: np.ndarray, truth: np.ndarray, shown: list[int]):
        taken = []
        monkeypatch.setattr(page_module, "panels", lambda rows, *rest: taken.append((rows, rest)))
        scores = np.random.default_rng(0).uniform(size=(7, *labels.shape)).astype(np.float32)
        image = Image.fromarray(np.random.default_rng(1).integers(256, size=(*labels.shape, 3), dtype=np.uint8))
        names = [f"name {index}" for index in range(7)]
        costs = (scores * 2 - 1) * np.linspace(0.4, 1, 7, dtype=np.float32)[:, None, None]
        page(Segmentation(image, names, labels, lambda: scores), truth, costs, list("abcdefg"), shown, "t", "s")
        return *taken[0], costs, scores

    return make


def test_truth_and_prediction_have_the_same_colours_and_errors_are_marked(rows) -> None:
    truth = np.zeros((96, 96), np.int32)
    truth[:, 48:], truth[60:] = 1, -1
    labels = np.zeros((96, 96), np.int32)
    labels[:, 32:] = 1
    (first, *_), (_, _, side), *_ = rows(labels, truth, [0])
    assert [panel.title for panel in first] == ["Scene", "Truth", "Prediction", "Wrong pixels", "Names"]
    assert side == 192 and first[4].image.size == (192, 192)
    known, predicted, errors = (np.asarray(first[place].image).astype(int) for place in (1, 2, 3))
    assert np.array_equal(known[:58, :30], predicted[:58, :30]) and np.array_equal(known[:58, 52:], predicted[:58, 52:])
    assert not np.array_equal(known[:58, 34:46], predicted[:58, 34:46])
    red = (errors[..., 0] > errors[..., 1] + 100) & (errors[..., 0] > errors[..., 2] + 100)
    assert np.array_equal(red, (labels != truth) & (truth >= 0))
    assert first[3].note == f"{100 * 16 / 96:.1f} % of the named pixels"
    for picture in (known, errors):  # hatched
        assert {tuple(colour) for colour in picture[60:].reshape(-1, 3)} == {(255, 255, 255), page_module.HATCH}


def test_each_shown_name_has_its_costs_on_one_scale_and_its_scores(rows) -> None:
    labels, shown = np.zeros((96, 96), np.int32), [0, 1, 2, 3, 5]
    for further in ([], [4]):
        shown = sorted([*shown, *further])
        page_rows, (title, subtitle, _), costs, scores = rows(labels, labels, shown)
        assert (title, subtitle) == ("t", "s")
        assert [len(row) for row in page_rows] == [5, 5, 5] + [1, 1] * len(further)
        low, high = float(costs[shown].min()), float(costs[shown].max())  # name 6, the widest, is not shown
        above = [panel for row in page_rows[1::2] for panel in row]
        below = [panel for row in page_rows[2::2] for panel in row]
        assert len({panel.colour for panel in above}) == len(shown)
        for index, cost, score in zip(shown, above, below, strict=True):
            assert (cost.title, cost.subtitle) == (f"name {index}", "abcdefg"[index])
            assert cost.note == f"cosine {costs[index].min():.2f} to {costs[index].max():.2f}"
            assert score == (score.image, "", "", "score 0.00 to 1.00", None)
            assert np.array_equal(cost.image, cost_map(costs[index], low, high))
            assert np.array_equal(score.image, cost_map(scores[index], 0, 1))
