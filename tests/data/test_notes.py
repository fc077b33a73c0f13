"""What is allowed in a dataset but hardly meant: classes without pixels, masks of 0 and 255, files passed over."""

from __future__ import annotations

import numpy as np
import pytest

from ovseg_fast import images
from ovseg_fast.data import class_pixels, examine, open_dataset


def notes(tree) -> list[str]:
    problems, found = examine(open_dataset("folder", tree.root))
    assert problems == []
    return found


def test_sound_data_has_no_note(own) -> None:
    assert notes(own) == []
    counted = class_pixels(open_dataset("folder", own.root))
    values = [np.asarray(images.Image.open(path)) for path in sorted((own.root / "masks").iterdir())]
    assert counted.pixels.tolist() == [sum(int((value == k).sum()) for value in values) for k in range(3)]
    assert (counted.masks, counted.binary, counted.notes()) == (3, 0, [])


def test_classes_without_any_pixel_are_listed(own) -> None:
    own.text("classes.txt", "cat", "grass", "sky", "tree", "car")
    assert notes(own) == ["no pixel of the split shows 2 of the 5 classes: tree, car."]
    own.text("classes.txt", "cat", "grass", "sky", *(f"thing {i}" for i in range(20)))
    assert notes(own)[0].endswith(
        "20 of the 23 classes: " + ", ".join(f"thing {i}" for i in range(10)) + " and 10 more."
    )


def test_masks_of_0_and_255_alone(own) -> None:
    own.text("classes.txt", "background", "object")
    for name in "abc":
        own.mask(f"masks/{name}.png", own.values([0, 255]))
    assert notes(own) == [
        "3 of 3 masks hold 0 and 255 alone; 255 is no class: write 1 for class 1, 'object'.",
        "no pixel of the split shows 1 of the 2 classes: object.",
    ]


def test_some_masks_of_0_and_255_are_said_a_few_are_not(own) -> None:
    own.mask("masks/a.png", own.values([0, 255]))
    assert notes(own) == ["1 of 3 masks hold 0 and 255 alone; 255 is no class: write 1 for class 1, 'grass'."]
    for index in range(20):
        own.image(f"images/{index}.jpg")
        own.mask(f"masks/{index}.png", own.values([0, 1, 2, 255]))
    assert notes(own) == []


@pytest.mark.parametrize("values", [[0, 0], [255, 255], [0, 1], [0, 1, 255]])
def test_other_masks_are_not_binary(own, values: list[int]) -> None:
    for name in "ab":
        own.mask(f"masks/{name}.png", own.values(values))
    assert not any("alone" in note for note in notes(own))


def test_one_class_and_no_class_may_be_0_and_255(own) -> None:
    own.text("classes.txt", "object")
    for name in "abc":
        own.mask(f"masks/{name}.png", own.values([0, 255]))
    assert notes(own) == []


def test_255_may_be_a_class(own) -> None:
    own.text("classes.txt", *(f"class {i}" for i in range(256)))
    for name in "abc":
        own.mask(f"masks/{name}.png", own.values([0, 255]))
    assert not any("alone" in note for note in notes(own))


def test_masks_without_any_class(own) -> None:
    for name in "abc":
        own.mask(f"masks/{name}.png", own.values([255]))
    assert notes(own) == ["no pixel of the split shows any class: every one holds a value that means no class."]


def test_a_sample_says_how_large_it_was(own) -> None:
    for name in ("a", "b", "c", *range(10)):
        own.image(f"images/{name}.jpg")
        own.mask(f"masks/{name}.png", own.values([0]))
    (own.root / "masks/0.png").write_text("broken")
    counted = class_pixels(open_dataset("folder", own.root), sample=5)
    assert counted.masks == 4 and not counted.whole  # the broken one is left out
    assert counted.notes()[-1].startswith("no pixel of 4 masks shows ")
    assert class_pixels(open_dataset("folder", own.root), sample=500).whole
    assert class_pixels(open_dataset("world")).notes() == []


def test_broken_masks_give_no_note(own) -> None:
    for name in "abc":
        (own.root / f"masks/{name}.png").write_text("broken")
    problems, found = examine(open_dataset("folder", own.root))
    assert len(problems) == 3 and found == []


def test_files_passed_over_are_noted(own, monkeypatch) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    for name in ("images/x.heic", "images/y.dng", "masks/a.bmp", "masks/.hidden"):
        (own.root / name).write_bytes(b"x")
    assert notes(own) == [
        f"2 files (.heic: 1, .dng: 1) in '{own.root / 'images'}' were passed over; install pillow-heif to read HEIC "
        "images.",
        f"1 file (.bmp: 1) in '{own.root / 'masks'}' was passed over.",
    ]


@pytest.mark.parametrize("what", ["load_image", "read_mask", "fit"])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")])
def test_a_pair_too_large_for_the_memory_is_named_and_the_rest_is_checked(own, monkeypatch, what, error) -> None:
    from ovseg_fast.data import check

    original = getattr(check, what)

    def fail(first, *arguments):
        if "b.jpg" in str(first) or "b.png" in str(first):
            raise error
        return original(first, *arguments)

    monkeypatch.setattr(check, what, fail)
    own.mask("masks/c.png", own.values([0, 7]))
    problems, _ = examine(open_dataset("folder", own.root))
    assert [(problem.name, problem.kind) for problem in problems] == [("b", "memory"), ("c", "label")]
    assert problems[0].sentence.endswith("' is too large for the memory.")
