"""Labels of zero-shot training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from goldens import golden
from ovseg_fast.training.labels import pseudo_labels, seen_classes, seen_labels
from parity import fill


def test_seen_labels_are_the_published_ones():
    goldens = golden("cascade_clip")
    labels = np.stack([fill.labels(f"label{i}", 512, 512, 20, "E") for i in range(2)])
    mapped = seen_labels(torch.from_numpy(labels), 20, goldens.facts["novel"])
    assert mapped.dtype == torch.int64
    assert goldens.error("label_mapped", mapped.where(mapped >= 0, 255)[:, None]) == 0
    assert seen_classes(20, goldens.facts["novel"]) == goldens.facts["seen"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_seen_labels_by_hand(dtype):
    labels = torch.tensor([[0, 1, 2], [3, 4, 255]], dtype=dtype)
    assert seen_labels(labels, 5, (3, 1)).tolist() == [[0, -1, 1], [-1, 2, -1]]
    assert seen_labels(labels, 5, ()).tolist() == [[0, 1, 2], [3, 4, -1]]


def test_seen_labels_preserve_no_class():
    labels = torch.tensor([-1, -7, 5, 300, 2])
    assert seen_labels(labels, 5, [0]).tolist() == [-1, -1, -1, -1, 1]


def literal_pseudo_labels(logits, labels, unseen):
    """As the specification says it, at full size."""
    masks = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False).sigmoid()
    masks[:, [index for index in range(logits.shape[1]) if index not in unseen]] = -1
    guess = masks.argmax(1)
    hidden = torch.isin(labels, torch.tensor(list(unseen)))
    nothing = (labels < 0) | (labels >= logits.shape[1])
    return torch.where(hidden, guess, torch.where(nothing, -1, labels))


@pytest.mark.parametrize("size", [(40, 56), (12, 12), (5, 9)])
def test_pseudo_labels_are_those_of_the_full_size_masks(rng, size):
    logits = 3 * torch.randn(3, 11, 12, 12, generator=rng, dtype=torch.float64)
    labels = torch.randint(-1, 12, (3, *size), generator=rng)
    labels[labels == 11] = 255
    unseen = (9, 2, 4)
    before = labels.clone()
    found = pseudo_labels(logits, labels, unseen)
    assert torch.equal(found, literal_pseudo_labels(logits, labels, unseen))
    assert torch.equal(labels, before)  # the caller's are left alone
    shown = torch.isin(labels, torch.tensor(unseen))
    assert torch.isin(found[shown], torch.tensor(unseen)).all()
    assert {*found[shown].unique().tolist()} == {*unseen}


def test_pseudo_labels_do_not_read_which_unseen_class_it_is(rng):
    logits = torch.randn(1, 6, 8, 8, generator=rng)
    labels = torch.randint(0, 6, (1, 32, 32), generator=rng)
    other = labels.where(~torch.isin(labels, torch.tensor([1, 5])), 1)
    assert torch.equal(pseudo_labels(logits, labels, (1, 5)), pseudo_labels(logits, other, (1, 5)))


def test_without_unseen_classes_labels_are_unchanged(rng):
    labels = torch.randint(-1, 6, (2, 16, 16), generator=rng, dtype=torch.int32)
    assert torch.equal(pseudo_labels(torch.randn(2, 6, 4, 4, requires_grad=True), labels, ()), labels.long())


BAD_UNSEEN = [((0, 0), "different indices below 4"), ((4,), "below 4"), ((-1,), "below 4"), ((0, 1, 2, 3), "leave one")]


@pytest.mark.parametrize(("unseen", "words"), BAD_UNSEEN)
def test_bad_unseen(unseen, words):
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=words):
        seen_labels(labels, 4, unseen)
    with pytest.raises(ValueError, match=words):
        pseudo_labels(torch.zeros(1, 4, 2, 2), labels, unseen)


def test_pseudo_labels_need_no_map_of_all_classes_at_full_size(rng):
    elements = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            out = function(*arguments, **(options or {}))
            given = out if isinstance(out, (tuple, list)) else [out]
            elements.extend(tensor.numel() for tensor in given if isinstance(tensor, torch.Tensor))
            return out

    labels = torch.randint(0, 80, (1, 512, 512), generator=rng)
    with Watch():
        pseudo_labels(torch.randn(1, 80, 8, 8, generator=rng), labels, range(1, 80))
    assert 512**2 <= max(elements) <= 79 * 512**2 / 4


def test_bad_tensors():
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    words = r"labels must be a uint8, int32 or int64 tensor of class indices, got "
    with pytest.raises(TypeError, match=words + "torch.float32"):
        seen_labels(labels.float(), 4, ())
    with pytest.raises(TypeError, match=words + "ndarray"):
        seen_labels(labels.numpy(), 4, ())
    with pytest.raises(TypeError, match=r"logits must be a floating-point tensor, got torch\.int64"):
        pseudo_labels(torch.zeros(1, 4, 2, 2, dtype=torch.int64), labels, (0,))
    with pytest.raises(ValueError, match=r"logits must have shape \(B, T, h, w\), got \(4, 2, 2\)"):
        pseudo_labels(torch.zeros(4, 2, 2), labels, (0,))
    with pytest.raises(ValueError, match=r"labels must have shape \(B, H, W\) with B = 1"):
        pseudo_labels(torch.zeros(1, 4, 2, 2), labels[0], (0,))
