"""Evaluation of small folders with an untrained `catseg-tiny`: numbers, skipped images, files."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image

import ovseg_fast as ovs
from evaluation.photo_folder import CLASSES, ClassList, PhotoFolder, make_photos
from ovseg_fast.evaluation.evaluate import EvaluationError, evaluate
from ovseg_fast.evaluation.results import Evaluation
from ovseg_fast.evaluation.state import StateError


def build(name):
    """In float64: scores of an untrained model lie so close together that in float32 rounding picks some labels."""
    return ovs.Segmenter(ovs.build(name).double())


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(11)
    return build("catseg-tiny")


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos", 3, np.random.randint(2**31))


def run(segmenter, dataset, out=None, **options):
    return evaluate(segmenter, dataset, out, **{"mode": "whole", "progress": False, **options})


def counts(segmenter, dataset, classes, mode="whole"):
    """The confusion matrix by the public API and numpy."""
    matrix = np.zeros((len(classes), len(classes)), np.int64)
    for index in range(len(dataset)):
        image, truth = dataset.read(index)
        predicted = segmenter.segment(image, list(classes), mode=mode).labels
        np.add.at(matrix, (truth[truth >= 0], predicted[truth >= 0]), 1)
    return matrix


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_numbers(segmenter, photos, mode):
    result = run(segmenter, photos, mode=mode)
    expected = counts(segmenter, photos, CLASSES, mode)
    assert result.images == 3 and result.skipped == []
    assert result.scores.correct.tolist() == expected.diagonal().tolist()
    assert result.scores.truth.tolist() == expected.sum(1).tolist()
    assert result.scores.predicted.tolist() == expected.sum(0).tolist()
    assert result.absent == ["unicorn"]
    assert set(result.metrics) == {"miou", "miou_nonzero_union", "pixel_accuracy", "mean_accuracy"}
    assert result.settings["mode"] == mode and result.settings["model"] == "catseg-tiny"


def test_seen_and_unseen_by_the_vocabulary_or_by_the_caller(segmenter, photos):
    photos.vocabulary = ClassList(CLASSES, unseen=(1, 4))
    iou = run(segmenter, photos).scores.iou
    by_vocabulary = run(segmenter, photos).metrics
    assert by_vocabulary["miou_seen"] == pytest.approx(iou[[0, 2, 3]].mean())
    assert by_vocabulary["miou_unseen"] == pytest.approx(iou[1])  # "unicorn" is absent
    by_caller = run(segmenter, photos, seen=["sky", "unicorn"])
    assert by_caller.metrics["miou_seen"] == pytest.approx(iou[2])
    assert by_caller.settings["seen"] == ["sky", "unicorn"]


def test_cascade_clip_subtracts_its_offset_from_what_is_seen(photos):
    segmenter = build("cascade-clip-tiny")
    predicted = {}
    for seen in ([], ["cat", "grass"], ["sky", "wall", "unicorn"], None):
        result = run(segmenter, photos, seen=seen)
        predicted[str(seen)] = result.scores.predicted.tolist()
        image, _ = photos.read(0)
        alone = segmenter.segment(image, list(CLASSES), mode="whole", seen=seen).labels
        only = run(segmenter, photos, seen=seen, limit=1).scores
        assert only.truth.sum() == (photos.read(0)[1] >= 0).sum()
        assert only.predicted.tolist() == np.bincount(alone[photos.read(0)[1] >= 0], minlength=5).tolist()
    assert len({str(value) for value in predicted.values()}) > 1
    assert result.settings["seen_offset"] == 0.1 and result.settings["seen_offset_of"] == "seen classes of world"


def test_a_group_counts_as_its_class(segmenter, photos):
    names = ["cat", "grass", "ceiling", "floor", "wall", "unicorn"]
    result = run(segmenter, photos, groups={"sky": ["ceiling", "floor"]})
    matrix = np.zeros((5, 5), np.int64)
    for index in range(3):
        image, truth = photos.read(index)
        labels = np.array([0, 1, 2, 2, 3, 4])[segmenter.segment(image, names, mode="whole").labels]
        np.add.at(matrix, (truth[truth >= 0], labels[truth >= 0]), 1)
    assert result.scores.predicted.tolist() == matrix.sum(0).tolist()
    assert result.scores.correct.tolist() == matrix.diagonal().tolist()
    assert result.settings["groups"] == {"sky": ["ceiling", "floor"]}


def test_the_background_of_the_class_list_is_a_group(segmenter, photos):
    photos.vocabulary = ClassList(("background", *CLASSES[1:]), background=("ceiling", "floor"))
    result, same = run(segmenter, photos), run(segmenter, photos, groups={"background": ["ceiling", "floor"]})
    assert result.settings["groups"] == {"background": ["ceiling", "floor"]}
    assert result.scores.predicted.tolist() == same.scores.predicted.tolist()
    assert run(segmenter, photos, limit=1, groups={}).settings["groups"] == {}


def test_limit(segmenter, photos):
    result = run(segmenter, photos, limit=2)
    assert result.images == 2 and result.settings["limit"] == 2
    assert result.scores.truth.sum() == sum((photos.read(index)[1] >= 0).sum() for index in range(2))


def test_the_segmenter_is_unchanged(segmenter, photos):
    segmenter.model.train()
    run(segmenter, photos, limit=1)
    assert segmenter.model.training
    segmenter.model.eval()


# What cannot be used


def spoil(folder):
    """A truncated JPEG, a mask of another size, a label beyond the class list, an empty file; "000" stays sound."""
    image = Image.open(folder / "000.png")
    whole = folder / "whole.jpg"
    image.resize((300, 200)).save(whole)
    (folder / "001.png").write_bytes(whole.read_bytes()[:4000])  # formats are told by content
    whole.unlink()
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(folder / "002_mask.png")
    mask = np.array(Image.open(folder / "003_mask.png"))
    mask[:2, :3] = 7
    Image.fromarray(mask).save(folder / "003_mask.png")
    (folder / "004.png").write_bytes(b"")


REASONS = {"001": "truncated", "002": "its mask is 9 x 12", "003": "label 7 in 6 pixels, beyond the 5", "004": "empty"}


def test_unusable_pairs_are_named_and_the_rest_is_counted(segmenter, tmp_path, caplog):
    photos = make_photos(tmp_path, 6, 1)
    sound = [0, 5]
    truth = sum((photos.read(index)[1] >= 0).sum() for index in sound)
    spoil(tmp_path)
    with caplog.at_level(logging.WARNING):
        result = run(segmenter, photos, tmp_path / "result.json")
    assert result.images == 2 and result.scores.truth.sum() == truth
    assert [item.name for item in result.skipped] == list(REASONS)
    for item, record in zip(result.skipped, caplog.records, strict=True):
        assert REASONS[item.name] in item.reason and item.name in record.getMessage()
    stored = json.loads((tmp_path / "result.json").read_text())
    assert [item["name"] for item in stored["images"]["skipped"]] == list(REASONS)
    assert all(f"skipped: {name}: " in result.table() for name in REASONS)


def test_an_image_too_large_for_the_memory_is_skipped_other_failures_are_raised(segmenter, photos, monkeypatch):
    encode, failures = segmenter.encode, [None, torch.OutOfMemoryError("out of memory"), None]

    def fail(*arguments, **options):
        if error := failures.pop(0):
            raise error
        return encode(*arguments, **options)

    monkeypatch.setattr(segmenter, "encode", fail)
    assert run(segmenter, photos).skipped == [("001", "out of memory")]
    failures[:] = [None, RuntimeError("the device is gone")]
    with pytest.raises(RuntimeError, match="the device is gone"):
        run(segmenter, photos)


@pytest.mark.parametrize("labels", [np.full((4, 4, 1), 0), np.zeros(16, int), np.zeros((4, 4)), np.full((4, 4), -2)])
def test_labels_of_another_kind(segmenter, photos, labels, monkeypatch):
    monkeypatch.setattr(photos, "read", lambda index: (Image.new("RGB", (4, 4)), labels))
    with pytest.raises(EvaluationError, match=r"none of the 3 images .* the first, 000: its mask"):
        run(segmenter, photos)


def test_when_nothing_can_be_evaluated_an_earlier_result_stays(segmenter, photos, tmp_path):
    (tmp_path / "result.json").write_text("an earlier result")
    for pair in photos.pairs:
        pair.image.write_bytes(b"")
    with pytest.raises(EvaluationError, match=r"none of the 3 images of photo folder .* 000: .* is empty"):
        run(segmenter, photos, tmp_path / "result.json")
    assert (tmp_path / "result.json").read_text() == "an earlier result"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "result.json"]


def test_images_without_any_ground_truth(segmenter, photos, tmp_path):
    for pair in photos.pairs:
        Image.new("L", Image.open(pair.mask).size, 255).save(pair.mask)
    result = run(segmenter, photos, tmp_path / "result.json")
    assert result.images == 3 and all(math.isnan(value) for value in result.metrics.values())
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["miou"] is None
    assert "means over 0 of 5 classes" in result.table()


# On disk


class Stopped(BaseException):
    """As a keyboard interrupt: nothing catches it."""


class StopsAt(PhotoFolder):
    """A dataset that stops the run at an image."""

    def __init__(self, folder, stop):
        super().__init__(folder)
        self.stop, self.read_names = stop, []

    def read(self, index):
        if index == self.stop:
            raise Stopped
        self.read_names.append(self.pairs[index].name)
        return super().read(index)


def metrics_of(path):
    stored = json.loads(path.read_text())
    return {key: stored[key] for key in ("metrics", "classes", "images", "absent_classes")}


def test_a_stopped_run_resumes_to_the_same_numbers(segmenter, tmp_path):
    make_photos(tmp_path / "photos", 6, 3)
    (tmp_path / "photos" / "002.png").write_bytes(b"broken")
    run(segmenter, PhotoFolder(tmp_path / "photos"), tmp_path / "undisturbed.json")
    with pytest.raises(Stopped):
        run(segmenter, StopsAt(tmp_path / "photos", 4), tmp_path / "result.json", save_seconds=0)
    assert not (tmp_path / "result.json").exists()
    rest = StopsAt(tmp_path / "photos", None)
    run(segmenter, rest, tmp_path / "result.json")
    assert rest.read_names == ["002", "004", "005"]  # the broken one fails again
    assert metrics_of(tmp_path / "result.json") == metrics_of(tmp_path / "undisturbed.json")
    assert not list(tmp_path.glob("*.partial.npz"))


def test_a_skipped_image_counts_once_it_is_repaired(segmenter, tmp_path):
    make_photos(tmp_path / "photos", 4, 4)
    sound = (tmp_path / "photos" / "001.png").read_bytes()
    (tmp_path / "photos" / "001.png").write_bytes(b"broken")
    with pytest.raises(Stopped):
        run(segmenter, StopsAt(tmp_path / "photos", 3), tmp_path / "result.json", save_seconds=0)
    (tmp_path / "photos" / "001.png").write_bytes(sound)
    assert run(segmenter, PhotoFolder(tmp_path / "photos"), tmp_path / "result.json").images == 4


def test_progress_survives_a_result_that_cannot_be_written(segmenter, tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "photos", 3, 9)

    def fail(self, path):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "save", fail)
        with pytest.raises(OSError, match="the disk is full"):
            run(segmenter, photos, tmp_path / "result.json")
    again = StopsAt(tmp_path / "photos", 0)
    run(segmenter, again, tmp_path / "result.json")
    assert again.read_names == []
    run(segmenter, photos, tmp_path / "undisturbed.json")
    assert metrics_of(tmp_path / "result.json") == metrics_of(tmp_path / "undisturbed.json")


def test_restart_discards_progress(segmenter, tmp_path):
    make_photos(tmp_path / "photos", 3, 5)
    with pytest.raises(Stopped):
        run(segmenter, StopsAt(tmp_path / "photos", 2), tmp_path / "result.json", save_seconds=0)
    again = StopsAt(tmp_path / "photos", None)
    run(segmenter, again, tmp_path / "result.json", restart=True)
    assert again.read_names == ["000", "001", "002"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"mode": "slide"}, "mode"),
        ({"limit": 2}, "images"),
        ({"seen": ["cat"]}, "seen classes"),
        ({"groups": {"sky": ["cloud"]}}, "classes"),
        ({"weights": True}, "weights"),
        ({"folder": "elsewhere"}, "folder"),
    ],
)
def test_the_state_of_another_evaluation_is_refused(segmenter, tmp_path, change, word):
    photos = make_photos(tmp_path / "photos", 3, 6)
    with pytest.raises(Stopped):
        run(segmenter, StopsAt(tmp_path / "photos", 2), tmp_path / "result.json", save_seconds=0)
    before = (tmp_path / "result.partial.npz").read_bytes()
    other = build("catseg-tiny") if change.pop("weights", False) else segmenter
    if folder := change.pop("folder", None):
        photos.image_folder = folder
    with pytest.raises(StateError) as caught:
        run(other, photos, tmp_path / "result.json", **change)
    message = str(caught.value)
    assert f"of an evaluation with other {word};" in message and "--restart" in message and "\n" not in message
    assert (tmp_path / "result.partial.npz").read_bytes() == before


def test_a_state_without_images_is_ignored(segmenter, tmp_path):
    photos = make_photos(tmp_path / "photos", 2, 7)
    with pytest.raises(Stopped):
        run(segmenter, StopsAt(tmp_path / "photos", 0), tmp_path / "result.json", save_seconds=0)
    assert (tmp_path / "result.partial.npz").exists()
    assert run(segmenter, photos, tmp_path / "result.json", limit=1).images == 1


@pytest.mark.parametrize("content", [b"", b"no state", None])
def test_a_damaged_state_is_refused(segmenter, photos, tmp_path, content):
    partial = tmp_path / "result.partial.npz"
    if content is None:
        np.savez(partial, something=np.zeros(3))
    else:
        partial.write_bytes(content)
    with pytest.raises(
        StateError,
        match=r"result.partial.npz' is not the state of an evaluation, or is damaged; .* restart=True \(--restart\)",
    ):
        run(segmenter, photos, tmp_path / "result.json")
    assert run(segmenter, photos, tmp_path / "result.json", restart=True).images == 3


def test_earlier_results_are_kept(segmenter, photos, tmp_path):
    out = tmp_path / "new folder" / "result.json"
    run(segmenter, photos, out, limit=1)
    first = out.read_text()
    with pytest.raises(Stopped):
        run(segmenter, StopsAt(tmp_path / "photos", 2), out, save_seconds=0)
    assert out.read_text() == first  # only a finished one takes its place
    run(segmenter, photos, out)
    run(segmenter, photos, out, limit=2)
    assert json.loads(out.read_text())["images"]["evaluated"] == 2
    kept = sorted(path for path in out.parent.iterdir() if path != out)
    assert [json.loads(path.read_text())["images"]["evaluated"] for path in kept] == [1, 3]
    assert kept[0].read_text() == first and all(path.suffix == ".json" for path in kept)


def test_the_json_says_how_it_was_made(segmenter, photos, tmp_path):
    photos.vocabulary = ClassList(CLASSES, unseen=(1,))
    result = run(segmenter, photos, tmp_path / "result.json")
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored["format"] == "ovseg-fast evaluation"
    assert stored["metrics"] == pytest.approx(result.metrics)
    assert "detectron2" in stored["rules"]["miou"] and "no mean" in stored["rules"]["absent"]
    assert stored["absent_classes"] == ["unicorn"]
    assert stored["versions"]["ovseg-fast"] == ovs.__version__ and stored["versions"]["torch"] == torch.__version__
    assert stored["settings"]["operators"]["label_map"] == "torch"
    assert stored["settings"]["seen"] == ["cat", "sky", "wall", "unicorn"]
    cat, grass, *_, unicorn = stored["classes"]
    assert cat["iou"] == pytest.approx(result.scores.iou[0]) and cat["seen"] and not grass["seen"]
    assert unicorn["pixels"] == 0 and unicorn["accuracy"] is None and not unicorn["counted"]
    assert stored["seconds"] > 0


def test_the_table(segmenter, photos):
    photos.vocabulary = ClassList((*CLASSES[:4], "a" * 60), unseen=(1,))
    result = run(segmenter, photos)
    lines = result.table().splitlines()
    assert lines[0] == "catseg-tiny on photo folder, mode whole: 3 images"
    for number, name in enumerate(CLASSES[:4]):
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert f"{100 * result.scores.iou[number]:.2f}" in line
        assert line.endswith(" unseen" if name == "grass" else " seen")
    (absent,) = [line for line in lines if line.startswith("aaa")]
    assert "…" in absent and absent.split()[1:] == ["-", "-", "0.00", "seen"]
    assert any(line.split() == ["mIoU", f"{100 * result.metrics['miou']:.2f}"] for line in lines)
    assert any(line.split() == ["hIoU", f"{100 * result.metrics['hiou']:.2f}"] for line in lines)
    assert f"not counted, being absent from the ground truth: {'a' * 60}" in lines


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "tiled"}, ("'slide' or 'whole'", "'tiled'")),
        ({"limit": 0}, ("limit", "0")),
        ({"seen": ["dog"]}, ("seen", "['dog']")),
        ({"seen": "cat"}, ("seen", "'cat'")),
        ({"out": "result.txt"}, (".json", "result.txt")),
        ({"out": "folder.json"}, ("folder.json", "is a folder")),
    ],
)
def test_unfit_arguments_are_refused(segmenter, photos, tmp_path, options, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises((ValueError, TypeError)) as caught:
        run(segmenter, photos, **options)
    assert all(word in str(caught.value) for word in words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.json", "photos"]


def test_an_empty_dataset_is_refused(segmenter, tmp_path):
    with pytest.raises(ValueError, match="dataset photo folder is empty"):
        run(segmenter, PhotoFolder(tmp_path))


def test_an_unwritable_folder_is_reported_before_the_first_image(segmenter, tmp_path):
    make_photos(tmp_path / "photos", 1, 8)
    (tmp_path / "result.partial.npz").mkdir()
    photos = StopsAt(tmp_path / "photos", None)
    with pytest.raises(OSError, match=r"result.partial.npz"):
        run(segmenter, photos, tmp_path / "result.json", restart=True)
    assert photos.read_names == []
