"""Several names for one class, and the published background of PASCAL VOC."""

from __future__ import annotations

import pytest

from ovseg_fast.data.vocabularies import PASCAL_CONTEXT, PASCAL_VOC
from ovseg_fast.evaluation.groups import VOC_BACKGROUND, prompts_of, published_groups


def test_names_and_the_class_each_counts_as():
    names, index = prompts_of(["cat", "background", "sky"], {"background": ["wall", "floor"]})
    assert names == ["cat", "wall", "floor", "sky"]
    assert index.tolist() == [0, 1, 1, 2]


def test_without_groups_each_class_is_its_own_name():
    names, index = prompts_of(("cat", "sky"))
    assert names == ["cat", "sky"] and index.tolist() == [0, 1]


def test_the_background_of_pascal_voc():
    (background,) = VOC_BACKGROUND.values()
    assert len(background) == 39 and {"sky", "grass", "wall"} <= set(background)
    assert not {*background} & {*PASCAL_VOC.classes, "table", "background"}
    assert set(background) < set(PASCAL_CONTEXT.classes)
    names, index = prompts_of(["background", *PASCAL_VOC.classes], VOC_BACKGROUND)
    assert len(names) == 59 and (index == 0).sum() == 39


def test_only_these_classes_have_it_by_default():
    assert published_groups([*PASCAL_VOC.classes, "background"]) is VOC_BACKGROUND
    assert published_groups(["background", *PASCAL_VOC.classes]) is VOC_BACKGROUND
    assert published_groups(PASCAL_VOC.classes) == {}
    assert published_groups(["background", "cat"]) == {}


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"dog": ["poodle"]}, ("'dog'", "none of them")),
        ({"cat": []}, ("groups['cat']", "at least one name")),
        ({"cat": "kitten"}, ("groups['cat']", "'kitten'")),
        ({"cat": ["kitten", "sky"]}, ("'sky'", "more than once")),
    ],
)
def test_unfit_groups_are_refused(groups, words):
    with pytest.raises(ValueError) as caught:
        prompts_of(["cat", "sky"], groups)
    assert all(word in str(caught.value) for word in words)
