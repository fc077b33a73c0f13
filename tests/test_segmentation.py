"""The result of segmenting one image: labels, scores on demand, files."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ovseg_fast.segmentation import Segmentation
from ovseg_fast.visualize import overlay, palette

WIDTH, HEIGHT = 60, 50


class Scores:
    """Counts how often it is asked."""

    def __init__(self, classes: int) -> None:
        self.value = np.random.rand(classes, HEIGHT, WIDTH).astype(np.float32)
        self.calls = 0

    def __call__(self) -> np.ndarray:
        self.calls += 1
        return self.value


def result(classes: int = 3, scores: Scores | None = None) -> Segmentation:
    image = Image.fromarray(np.random.randint(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    labels = np.random.randint(0, classes, (HEIGHT, WIDTH))
    labels[:20] = classes - 1
    names = [f"class {i}" for i in range(classes)]
    return Segmentation(image, names, labels, scores or Scores(classes))


def test_labels_and_classes() -> None:
    image = Image.new("RGB", (WIDTH, HEIGHT))
    labels = np.random.randint(0, 3, (HEIGHT, WIDTH))
    out = Segmentation(image, ("cat", "dog", "猫"), labels, Scores(3))
    assert out.image is image and out.classes == ["cat", "dog", "猫"]
    assert out.labels.dtype == np.int32 and np.array_equal(out.labels, labels)


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (np.full((HEIGHT, WIDTH), -1), ValueError, r"0\.\.2 for 3 classes"),
        (np.full((HEIGHT, WIDTH), 3), ValueError, r"0\.\.2 for 3 classes"),
        (np.zeros((HEIGHT, WIDTH)), TypeError, "integers, got float64"),
        (np.zeros((WIDTH, HEIGHT), int), ValueError, "50 x 60"),
    ],
)
def test_labels_must_fit(labels: np.ndarray, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Segmentation(Image.new("RGB", (WIDTH, HEIGHT)), ["a", "b", "c"], labels, Scores(3))


def test_scores_are_computed_once_and_only_when_asked_for(tmp_path: Path) -> None:
    scores = Scores(3)
    out = result(3, scores)
    out.overlay()
    out.save(tmp_path / "a.png")
    out.save(tmp_path / "a.npz")
    out.save_labels(tmp_path / "b.png")
    repr(out)
    out.counts()
    assert scores.calls == 0
    assert np.array_equal(out.scores, scores.value) and out.scores.dtype == np.float32
    assert out.scores is out.scores
    assert scores.calls == 1


def test_scores_of_other_kinds_become_float32_arrays() -> None:
    value = torch.rand(3, HEIGHT, WIDTH, dtype=torch.float64)
    out = Segmentation(
        Image.new("RGB", (WIDTH, HEIGHT)), ["a", "b", "c"], np.zeros((HEIGHT, WIDTH), int), lambda: value
    )
    assert isinstance(out.scores, np.ndarray) and out.scores.dtype == np.float32
    assert np.allclose(out.scores, value.numpy())


def test_top_sorts_the_scores_by_default() -> None:
    scores = np.array([0.2, 0.5, 0.3, 0.5], np.float32)[:, None, None].repeat(HEIGHT, 1).repeat(WIDTH, 2)
    image = Image.new("RGB", (WIDTH, HEIGHT))
    out = Segmentation(image, ["a", "b", "c", "d"], np.ones((HEIGHT, WIDTH), int), lambda: scores)
    labels, best = out.top(3)
    assert labels.dtype == np.int32 and best.dtype == np.float32
    assert (labels == np.array([1, 3, 2])[:, None, None]).all()
    assert (best == np.array([0.5, 0.5, 0.3], np.float32)[:, None, None]).all()
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"k must be in 1\.\.4, the number of classes, got {k}"):
            out.top(k)


def test_scores_release_what_computed_them() -> None:
    scores = Scores(3)
    kept = weakref.ref(scores)
    out = result(3, scores)
    del scores
    assert kept() is not None
    assert out.scores.any()
    assert kept() is None


def test_failing_scores_can_be_retried() -> None:
    answers = [MemoryError("full"), np.zeros((2, HEIGHT, WIDTH)), np.ones((3, HEIGHT, WIDTH))]

    def compute():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    out = Segmentation(Image.new("RGB", (WIDTH, HEIGHT)), ["a", "b", "c"], np.zeros((HEIGHT, WIDTH), int), compute)
    with pytest.raises(MemoryError):
        _ = out.scores
    with pytest.raises(ValueError, match=r"\(3, 50, 60\) \(T, H, W\), got \(2, 50, 60\)"):
        _ = out.scores
    assert (out.scores == 1).all()


def test_counts() -> None:
    labels = np.zeros((HEIGHT, WIDTH), int)
    labels[:10] = 2
    out = Segmentation(Image.new("RGB", (WIDTH, HEIGHT)), ["a", "b", "c", "d"], labels, Scores(4))
    assert out.counts().tolist() == [40 * WIDTH, 0, 10 * WIDTH, 0]
    out = result(300)
    assert out.counts().sum() == HEIGHT * WIDTH and len(out.counts()) == 300


@pytest.mark.parametrize("alpha", [0.5, 0.2])
@pytest.mark.parametrize("legend", [True, False])
def test_overlay(alpha: float, legend: bool) -> None:
    out = result()
    expected = overlay(out.image, out.labels, out.classes, alpha, legend)
    assert np.array_equal(np.asarray(out.overlay(alpha, legend)), np.asarray(expected))


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.jpg", "a.JPEG"])
def test_save_overlay(tmp_path: Path, name: str) -> None:
    out = result()
    out.save(tmp_path / name, alpha=0.8)
    saved = Image.open(tmp_path / name)
    expected = np.asarray(out.overlay(0.8)).astype(int)
    lossless = name.lower().endswith("png")
    assert saved.format == ("PNG" if lossless else "JPEG")
    assert np.abs(np.asarray(saved) - expected).mean() <= (0 if lossless else 20)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("classes", [3, 256, 300])
@pytest.mark.parametrize("scores", [False, True])
def test_npz_round_trip(tmp_path: Path, classes: int, scores: bool) -> None:
    out = result(classes)
    out.classes[0] = "猫, Crème brûlée"
    out.save(str(tmp_path / "a.npz"), scores=scores)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert set(arrays) == ({"labels", "classes", "scores"} if scores else {"labels", "classes"})
        assert arrays["labels"].dtype == np.int32 and np.array_equal(arrays["labels"], out.labels)
        assert arrays["classes"].tolist() == out.classes
        if scores:
            assert arrays["scores"].dtype == np.float32 and np.array_equal(arrays["scores"], out.scores)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("classes", [3, 256, 300])
def test_label_png_round_trip(tmp_path: Path, classes: int) -> None:
    out = result(classes)
    out.save_labels(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), out.labels)
        if classes <= 256:
            assert image.mode == "P"
            assert np.array_equal(np.asarray(image.convert("RGB")), palette(classes)[out.labels])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["a", "a.txt", "a.npy", "a.gif", ".png"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"\.png or \.jpg \(overlay\) or \.npz \(labels\), got '.*'\.$"):
        result().save(tmp_path / name)
    with pytest.raises(ValueError, match=r"must end in \.png"):
        result().save_labels(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_labels_are_saved_losslessly_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.png.*change the labels"):
        result().save_labels(tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []


def test_scores_do_not_go_into_a_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.npz"):
        result().save(tmp_path / "a.png", scores=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.npz", "labels.png"])
def test_missing_folder(tmp_path: Path, name: str) -> None:
    out = result()
    save = out.save_labels if name == "labels.png" else out.save
    with pytest.raises(FileNotFoundError, match=r"the folder '.*no' does not exist"):
        save(tmp_path / "no" / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.npz", "labels.png"])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch, name: str) -> None:
    def fail(file, *arguments, **options):
        if isinstance(file, Image.Image):
            file = arguments[0]
        if isinstance(file, Path):
            file.write_bytes(b"half")
        else:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / name).write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", fail)
    monkeypatch.setattr(np, "savez_compressed", fail)
    out = result()
    save = out.save_labels if name == "labels.png" else out.save
    with pytest.raises(OSError, match=f"cannot write '.*{name}': No space left on device"):
        save(tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b"old"}


def test_failing_scores_leave_no_file(tmp_path: Path) -> None:
    def fail():
        raise MemoryError("full")

    out = Segmentation(Image.new("RGB", (WIDTH, HEIGHT)), ["a"], np.zeros((HEIGHT, WIDTH), int), fail)
    with pytest.raises(MemoryError):
        out.save(tmp_path / "a.npz", scores=True)
    assert list(tmp_path.iterdir()) == []


def test_repr_is_short() -> None:
    labels = np.zeros((HEIGHT, WIDTH), int)
    labels[:15] = 1
    image = Image.new("RGB", (WIDTH, HEIGHT))
    two = Segmentation(image, ["cat", "dog", "cow"], labels, Scores(3))
    assert repr(two) == "<Segmentation 60 x 50, 3 classes: cat 70 %, dog 30 %>"
    assert repr(result(300)).endswith(", …>") and len(repr(result(300))) < 100
