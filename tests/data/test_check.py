from __future__ import annotations

import numpy as np
import pytest

from ovseg_fast.data import Problem, check_dataset, open_dataset, report
from ovseg_fast.data.check import KINDS


def check(tree, name: str = "folder") -> list[Problem]:
    return check_dataset(open_dataset(name, tree.root))


def only(problems: list[Problem], name: str, kind: str) -> str:
    """The sentence of the one problem there is."""
    assert [(problem.name, problem.kind) for problem in problems] == [(name, kind)], problems
    return problems[0].sentence


def test_sound_data_has_no_problem(own) -> None:
    assert check(own) == []
    assert report([]) == "no problem found."


def test_missing_files(own) -> None:
    (own.root / "masks/b.png").unlink()
    sentence = only(check(own), "b", "missing-mask")
    assert sentence == f"there is no mask '{own.root / 'masks/b.png'}' for image '{own.root / 'images/b.jpg'}'."
    own.mask("masks/b.png", own.values([1]))
    (own.root / "images/c.jpg").unlink()
    sentence = only(check(own), "c", "missing-image")
    assert sentence == f"there is no image '{own.root / 'images/c.jpg'}'; mask '{own.root / 'masks/c.png'}' has none."


def test_a_broken_link_is_a_missing_file(own) -> None:
    (own.root / "images/b.jpg").unlink()
    (own.root / "images/b.jpg").symlink_to("nowhere.jpg")
    (own.root / "masks/c.png").unlink()
    (own.root / "masks/c.png").symlink_to("nowhere.png")
    assert [(problem.name, problem.kind) for problem in check(own)] == [("b", "missing-image"), ("c", "missing-mask")]


def test_listed_pairs_that_are_not_there(tree) -> None:
    tree.image("JPEGImages/here.jpg")
    tree.mask("SegmentationClass/here.png", tree.values([0, 20]))
    tree.text("ImageSets/Segmentation/val.txt", "here", "gone")
    problems = check(tree, "pascal-voc")
    assert [(problem.name, problem.kind) for problem in problems] == [
        ("gone", "missing-image"),
        ("gone", "missing-mask"),
    ]
    assert problems[0].sentence.endswith("gone.jpg'; the list of this split names it.")


def test_truncated_and_unreadable_files(own) -> None:
    jpeg = own.image("images/a.jpg", size=(64, 64))
    jpeg.write_bytes(jpeg.read_bytes()[: jpeg.stat().st_size // 2])
    (own.root / "images/b.jpg").write_bytes(b"")
    (own.root / "masks/b.png").write_text("no image")
    problems = check(own)
    assert [(problem.name, problem.kind) for problem in problems] == [
        ("a", "unreadable-image"),
        ("b", "unreadable-image"),
        ("b", "unreadable-mask"),
    ]
    for problem, words in zip(
        problems, ("is damaged or truncated", "is empty (0 bytes)", "not in an image format"), strict=True
    ):
        assert words in problem.sentence


def test_mask_of_another_size_and_label_beyond_the_list(own) -> None:
    own.mask("masks/a.png", own.values([0, 1], size=(7, 8)))
    own.mask("masks/b.png", own.values([0, 1, 3, 254]))
    own.mask("masks/c.png", own.values([9], size=(2, 3)))
    problems = check(own)
    assert [(problem.name, problem.kind) for problem in problems] == [
        ("a", "size"),
        ("b", "label"),
        ("c", "size"),
        ("c", "label"),
    ]
    assert "is 8 x 7 pixels, its image" in problems[0].sentence and "9 x 7; expected" in problems[0].sentence
    assert "holds labels 3, 254, beyond the list of classes; expected 0..2" in problems[1].sentence


def test_empty_folders(tree) -> None:
    for folder in ("images", "masks"):
        (tree.root / folder).mkdir()
    tree.text("classes.txt", "cat")
    problems = check(tree)
    assert [(problem.name, problem.kind) for problem in problems] == [
        (str(tree.root / "images"), "empty"),
        (str(tree.root / "masks"), "empty"),
    ]
    assert problems[0].sentence == f"folder '{tree.root / 'images'}' holds no image."
    masks = f"folder '{tree.root / 'masks'}' holds no mask, that is, no file *.png or .tif or .tiff."
    assert problems[1].sentence == masks
    for name in "abc":  # not a problem for each of them
        tree.image(f"images/{name}.jpg")
    assert only(check(tree), str(tree.root / "masks"), "empty") == masks


def test_empty_list(tree) -> None:
    tree.image("JPEGImages/x.jpg")
    tree.mask("SegmentationClass/x.png", tree.values([0, 20]))
    tree.text("ImageSets/Segmentation/val.txt")
    sentence = only(check(tree, "pascal-voc"), "pascal-voc", "empty")
    assert sentence == "the list of this split of pascal-voc names no pair."


def test_image_and_mask_that_differ_in_case(own) -> None:
    image, mask = own.root / "images/B.jpg", own.root / "masks/b.png"
    (own.root / "images/b.jpg").rename(image)
    sentence = only(check(own), "B", "case")
    assert sentence == f"image '{image}', mask '{mask}' and the pair's name 'B' differ in upper and lower case; " + (
        "expected one spelling."
    )


def test_list_and_files_that_differ_in_case(tree) -> None:
    tree.image("JPEGImages/X.jpg")
    tree.mask("SegmentationClass/X.png", tree.values([0, 20]))
    tree.text("ImageSets/Segmentation/val.txt", "x")
    assert "the pair's name 'x' differ in upper and lower case" in only(check(tree, "pascal-voc"), "x", "case")


def test_pairs_that_differ_only_in_case(own) -> None:
    own.image("images/B.jpg")
    if len(list((own.root / "images").iterdir())) == 3:
        pytest.skip("this file system takes b.jpg and B.jpg for one file")
    own.mask("masks/B.png", own.values([0, 1]))
    assert "differs from 'B' only in upper and lower case" in only(check(own), "B", "case")


def test_two_images_of_one_name(own) -> None:
    own.image("images/b.png")
    own.mask("masks/c.tif", own.values([0]))
    problems = check(own)
    assert [(problem.name, problem.kind) for problem in problems] == [("b", "duplicate"), ("c", "duplicate")]
    assert (
        problems[0].sentence == f"images 'b.jpg', 'b.png' in '{own.root / 'images'}' share a name; the first is used."
    )
    assert problems[1].sentence.startswith("masks 'c.png', 'c.tif' in ")


def test_problems_come_in_the_order_of_the_pairs_and_the_sound_ones_stay_readable(tree) -> None:
    kinds = np.random.randint(0, 4, 40)
    expected = []
    tree.text("classes.txt", "cat", "grass")
    for index, kind in enumerate(kinds):
        name = f"{index:03}"
        tree.image(f"images/{name}.jpg")
        if kind != 1:
            tree.mask(
                f"masks/{name}.png", tree.values([0, 2 if kind == 2 else 1], size=(7, 8) if kind == 3 else (7, 9))
            )
        if kind:
            expected.append((name, ("", "missing-mask", "label", "size")[kind]))
    tree.mask("masks/000.png", tree.values([0, 1]))  # at least one mask
    expected = [pair for pair in expected if pair[0] != "000"]
    dataset = open_dataset("folder", tree.root)
    problems = check_dataset(dataset, workers=4)
    assert [(problem.name, problem.kind) for problem in problems] == expected
    broken = {problem.name for problem in problems}
    for index, pair in enumerate(dataset.pairs):
        if pair.name in broken:
            with pytest.raises(ValueError):
                dataset.read(index)
        else:
            dataset.read(index)


def test_report_names_every_problem_and_counts_the_kinds() -> None:
    problems = [
        Problem("a", "size", "mask is small."),
        Problem("b", "label", "label 7."),
        Problem("c", "size", "mask is large."),
    ]
    assert report(problems).splitlines() == [
        "a: mask is small.",
        "b: label 7.",
        "c: mask is large.",
        "3 problems (mask of another size: 2, label beyond the class list: 1).",
    ]
    assert report(problems[:1]).splitlines()[-1] == "1 problem (mask of another size: 1)."
    assert all(report([Problem("x", kind, "y.")]).endswith(f"1 problem ({words}: 1).") for kind, words in KINDS.items())


def test_progress_bar_counts_the_pairs(own, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    check_dataset(open_dataset("folder", own.root))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    check_dataset(open_dataset("folder", own.root), progress=True)
    assert "3/3" in capsys.readouterr().err


def test_a_drawn_dataset_has_no_files_to_check() -> None:
    with pytest.raises(ValueError, match="world is drawn from a seed, it has no files to check"):
        check_dataset(open_dataset("world"))
