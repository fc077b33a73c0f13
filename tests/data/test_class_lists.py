"""Class lists that came with the datasets; those of the zero-shot splits are in tests/test_vocabulary.py."""

from __future__ import annotations

import pytest

from ovseg_fast.data import ADE20K_150, DATASETS, PASCAL_CONTEXT, PASCAL_VOC, PASCAL_VOC_20B, VOCABULARIES, Vocabulary
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
    prompts, labels = PASCAL_VOC_20B.prompts, PASCAL_VOC_20B.prompt_labels
    assert len(prompts) == len(labels) == 59 and "background" not in prompts
    assert prompts[:20] == PASCAL_VOC.classes and labels[:20] == tuple(range(1, 21))
    assert set(prompts[20:]) == set(PASCAL_CONTEXT.classes) - {*PASCAL_VOC.classes, "table"}
    assert set(labels[20:]) == {0}
    for prompt, label in zip(prompts[:20], labels[:20], strict=True):
        assert PASCAL_VOC_20B.classes[label] == prompt


@pytest.mark.parametrize("name", sorted(set(VOCABULARIES) - {"pascal-voc-20b"}))
def test_without_a_background_prompts_are_the_classes(name: str) -> None:
    known = VOCABULARIES[name]
    assert known.prompts == known.classes and known.prompt_labels == tuple(range(len(known.classes)))


@pytest.mark.parametrize("name", DATASETS)
def test_mask_values_reach_every_class_once(name: str) -> None:
    known = DATASETS[name]
    if known.classes is None:
        assert all(convention.values == () for convention in known.conventions)
        return
    count = len(known.classes.classes) if isinstance(known.classes, Vocabulary) else known.classes
    for convention in known.conventions:
        assert sorted(value for value in convention.values if value >= 0) == list(range(count))
