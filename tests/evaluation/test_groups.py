"""Several names for one class."""

from __future__ import annotations

import pytest

from ovseg_fast.evaluation.evaluate import prompts_of


def test_names_and_the_class_each_counts_as():
    names, index = prompts_of(["cat", "background", "sky"], {"background": ["wall", "floor"]})
    assert names == ["cat", "wall", "floor", "sky"]
    assert index.tolist() == [0, 1, 1, 2]


def test_without_groups_each_class_is_its_own_name():
    names, index = prompts_of(("cat", "sky"), {})
    assert names == ["cat", "sky"] and index.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"dog": ["poodle"]}, ("'dog'", "none of them")),
        ({"cat": []}, ("groups['cat']", "at least one name")),
        ({"cat": "kitten"}, ("groups['cat']", "'kitten'")),
        ({"cat": ["kitten", "sky"]}, ("'sky'", "more than once")),
    ],
)
def test_bad_groups_are_refused(groups, words):
    with pytest.raises(ValueError) as caught:
        prompts_of(["cat", "sky"], groups)
    assert all(word in str(caught.value) for word in words)
