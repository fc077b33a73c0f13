"""The confusion matrix and its scores against plain loops over pixels."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ovseg_fast.evaluation import metrics
from ovseg_fast.evaluation.metrics import ConfusionMatrix, Scores

NAN = float("nan")


def counted(predicted, truth, classes):
    """The matrix by one step a pixel."""
    matrix = [[0] * classes for _ in range(classes)]
    for p, t in zip(np.ravel(predicted).tolist(), np.ravel(truth).tolist(), strict=True):
        if t != -1:
            matrix[t][p] += 1
    return matrix


def naive_scores(predicted, truth, classes, seen):
    """The scores from sets of pixels, without a matrix."""
    pixels = [i for i, t in enumerate(truth) if t != -1]
    iou, present = {}, []
    for c in range(classes):
        true = {i for i in pixels if truth[i] == c}
        found = {i for i in pixels if predicted[i] == c}
        if true:
            present.append(c)
        if true | found:
            iou[c] = len(true & found) / len(true | found)
    accuracy = [sum(predicted[i] == c for i in pixels if truth[i] == c) / truth.count(c) for c in present]

    def mean(values):
        return sum(values) / len(values) if values else NAN

    miou_seen = mean([iou[c] for c in present if c in seen])
    miou_unseen = mean([iou[c] for c in present if c not in seen])
    both = miou_seen + miou_unseen
    return {
        "miou": mean([iou[c] for c in present]),
        "miou_nonzero_union": mean(list(iou.values())),
        "pixel_accuracy": mean([predicted[i] == truth[i] for i in pixels]),
        "mean_accuracy": mean(accuracy),
        "miou_seen": miou_seen,
        "miou_unseen": miou_unseen,
        "hiou": 0.0 if both == 0 else 2 * miou_seen * miou_unseen / both,
        "iou": [iou.get(c, NAN) for c in range(classes)],
    }


@st.composite
def labelled_images(draw):
    classes = draw(st.integers(1, 6))
    truth = st.integers(-1, classes - 1)
    # Few different labels: absent classes, and images without any ground truth, come up often.
    kinds = draw(st.lists(truth, min_size=1, max_size=3))
    pixels = draw(st.lists(st.tuples(st.integers(0, classes - 1), st.sampled_from(kinds)), min_size=1, max_size=40))
    predicted, labels = map(list, zip(*pixels, strict=True))
    return classes, predicted, labels, draw(st.sets(st.integers(0, classes - 1)))


@given(labelled_images(), st.sampled_from([torch.int64, torch.int32, torch.int16]))
def test_matrix_and_scores_against_loops(images, dtype):
    classes, predicted, truth, seen = images
    confusion = ConfusionMatrix(classes)
    half = len(truth) // 2  # two images, one of them possibly without pixels
    for part in (slice(half), slice(half, None)):
        confusion.update(torch.tensor(predicted[part], dtype=dtype), torch.tensor(truth[part], dtype=dtype))
    assert confusion.matrix.tolist() == counted(predicted, truth, classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no mean of nothing
        scores = confusion.scores(sorted(seen))
        found = {name: getattr(scores, name) for name in naive_scores(predicted, truth, classes, seen)}
    for name, expected in naive_scores(predicted, truth, classes, seen).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-12, err_msg=name)
    assert scores.present.tolist() == [c in truth for c in range(classes)]


def test_a_class_that_is_only_predicted_is_in_one_mean_and_not_in_the_other():
    scores = Scores.of([[6, 0, 2, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert scores.iou[:3].tolist() == [0.75, 1.0, 0.0] and math.isnan(scores.iou[3])
    assert scores.present.tolist() == [True, True, False, False]
    assert scores.miou == (0.75 + 1) / 2
    assert scores.miou_nonzero_union == (0.75 + 1 + 0) / 3
    assert scores.pixel_accuracy == 10 / 12
    assert scores.mean_accuracy == (0.75 + 1) / 2
    assert math.isnan(scores.hiou) and math.isnan(scores.miou_seen) and scores.seen is None


def test_everything_ignored():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.randint(3, (5, 7)), torch.full((5, 7), -1))
    assert not confusion.matrix.any()
    scores = confusion.scores([0])
    names = ("miou", "miou_nonzero_union", "pixel_accuracy", "mean_accuracy", "miou_seen", "miou_unseen", "hiou")
    assert all(math.isnan(getattr(scores, name)) for name in names)


def test_one_class():
    confusion = ConfusionMatrix(1)
    confusion.update(torch.zeros(4, 4, dtype=torch.int64), torch.eye(4, dtype=torch.int64) - 1)
    assert confusion.matrix.tolist() == [[4]]
    assert confusion.scores().miou == 1


def test_hiou_of_zero_and_of_one_missing_half():
    matrix = [[5, 0, 0], [3, 0, 0], [0, 0, 0]]
    assert Scores.of(matrix, [0]).hiou == 0
    assert Scores.of([[0, 5, 0], [5, 0, 0], [0, 0, 0]], [0]).hiou == 0  # both halves are 0
    assert math.isnan(Scores.of(matrix, [0, 1]).hiou)  # the only unseen class is absent
    assert math.isnan(Scores.of(matrix, []).miou_seen)


def test_many_classes_and_images_of_different_sizes(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 1000)  # larger images are counted in parts
    confusion, expected = ConfusionMatrix(847), np.zeros((847, 847), np.int64)
    for size in ((3, 1), (90, 61), (250, 40)):
        truth, predicted = np.random.randint(-1, 847, size), np.random.randint(0, 847, size)
        confusion.update(predicted, truth.astype(np.int32))
        np.add.at(expected, (truth[truth >= 0], predicted[truth >= 0]), 1)
    assert (confusion.matrix.numpy() == expected).all()


def test_predictions_without_ground_truth_are_not_checked():
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([0, 255, -7]), torch.tensor([1, -1, -1]))
    assert confusion.matrix.tolist() == [[0, 0], [1, 0]]


def test_deterministic_mode_is_unchanged():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        confusion = ConfusionMatrix(847)  # comparing each pixel with each cell of the matrix would take 10 GB
        confusion.update(torch.randint(847, (120, 120)), torch.randint(847, (120, 120)))
        assert confusion.matrix.sum() == 120 * 120
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("predicted", "truth", "error", "words"),
    [
        ([0, 1], [0, 3], ValueError, ("truth", "-1..2", "0..3")),
        ([0, 1], [0, -2], ValueError, ("truth", "-1..2", "-2..0")),
        ([0, 3], [0, 1], ValueError, ("predicted", "0..2", "0..3")),
        ([0, -1], [0, 1], ValueError, ("predicted", "0..2", "-1..0")),
        ([0, 1, 1], [0, 1], ValueError, ("same shape", "(3,)", "(2,)")),
        ([0.0, 1.0], [0, 1], TypeError, ("predicted", "float32")),
        ([0, 1], [False, True], TypeError, ("truth", "bool")),
    ],
)
def test_bad_labels_are_refused_and_nothing_is_added(predicted, truth, error, words):
    confusion = ConfusionMatrix(3)
    with pytest.raises(error) as caught:
        confusion.update(torch.tensor(predicted), torch.tensor(truth))
    assert all(word in str(caught.value) for word in words)
    assert not confusion.matrix.any()


def test_unfit_arguments_are_refused():
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        ConfusionMatrix(0)
    with pytest.raises(ValueError, match=r"shape \(T, T\), got \(2, 3\)"):
        Scores.of(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"seen must hold indices in 0..1, got \[0, 2\]"):
        Scores.of(np.zeros((2, 2)), [0, 2])
