"""Class lists that came with the datasets; those of the zero-shot splits are in tests/test_vocabulary.py."""

from __future__ import annotations

import pytest

from ovseg_fast.data import ADE20K_150, DATASETS, PASCAL_CONTEXT, PASCAL_VOC, PASCAL_VOC_20B, VOCABULARIES, Vocabulary
from ovseg_fast.evaluation.evaluate import prompts_of
from ovseg_fast.vocabulary import check_classes


def test_ade20k_150() -> None:
    assert len(ADE20K_150.classes) == 150 and ADE20K_150.unseen == ()
    assert check_classes(ADE20K_150.classes) == list(ADE20K_150.classes)
    # indices that the dataset's own table of objects counts from 1
    for number, name in {
        1: "wall",
        3: "sky",
        13: "person",
        21: "car",
        45: "chest of drawers",
        57: "pool table",
        79: "arcade machine",
        90: "television receiver",
        105: "fountain",
        128: "bicycle",
        150: "flag",
    }.items():
        assert ADE20K_150.classes[number - 1] == name


def test_background_of_voc_20b() -> None:
    assert PASCAL_VOC_20B.classes == ("background", *PASCAL_VOC.classes)
    names, index = prompts_of(PASCAL_VOC_20B.classes, {"background": PASCAL_VOC_20B.background})
    assert len(names) == len(index) == 59 and "background" not in names
    assert tuple(names[39:]) == PASCAL_VOC.classes and index[39:].tolist() == list(range(1, 21))
    assert set(names[:39]) == set(PASCAL_CONTEXT.classes) - {*PASCAL_VOC.classes, "table"}
    assert set(index[:39].tolist()) == {0}
    for name, label in zip(names[39:], index[39:].tolist(), strict=True):
        assert PASCAL_VOC_20B.classes[label] == name


@pytest.mark.parametrize("name", sorted(set(VOCABULARIES) - {"pascal-voc-20b"}))
def test_other_vocabularies_have_no_background(name: str) -> None:
    assert VOCABULARIES[name].background == ()


@pytest.mark.parametrize("name", DATASETS)
def test_mask_values_reach_every_class_once(name: str) -> None:
    known = DATASETS[name]
    if known.classes is None:
        assert all(convention.values == () for convention in known.conventions)
        return
    count = len(known.classes.classes) if isinstance(known.classes, Vocabulary) else known.classes
    for convention in known.conventions:
        assert sorted(value for value in convention.values if value >= 0) == list(range(count))
