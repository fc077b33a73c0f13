"""Class names, prompts, tokens, and the benchmarks' class lists."""

from __future__ import annotations

import dataclasses
import html
import json
import logging
from pathlib import Path

import ftfy
import pytest
import regex
import torch
from hypothesis import given
from hypothesis import strategies as st

from ovseg_fast import vocabulary
from ovseg_fast.data import COCO_STUFF, PASCAL_CONTEXT, PASCAL_VOC, VOCABULARIES, Vocabulary
from ovseg_fast.models import cascade_clip, catseg
from ovseg_fast.vocabulary import (
    check_classes,
    fill_templates,
    parse_classes,
    prompt_name,
    read_classes,
    tokenize,
)

START, END = 49406, 49407

# Class names


def refused(function, *arguments, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        function(*arguments)
    message = str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in message and message.endswith(".")
    return message


def test_names_are_tidied() -> None:
    names = ["  cat ", "fire\t hydrant", "potted\u00a0plant", "Crème brûlée", "猫"]
    assert check_classes(names) == ["cat", "fire hydrant", "potted plant", "Crème brûlée", "猫"]
    assert check_classes(tuple(names)) == check_classes(names)


@given(st.lists(st.text("ab ,ß\u00e9\t", min_size=1, max_size=5), min_size=1, max_size=5))
def test_check_classes_changes_nothing_more_when_repeated(names: list[str]) -> None:
    try:
        once = check_classes(names)
    except ValueError:
        return
    assert check_classes(once) == once and len(once) == len(names)
    assert all(prompt_name(name) for name in once)


@pytest.mark.parametrize("names", [[], ()])
def test_no_class(names) -> None:
    assert "at least one" in refused(check_classes, names)


def test_a_bare_string_is_answered_with_how_to_go_on() -> None:
    message = refused(check_classes, "cat, grass", error=TypeError)
    assert "'cat, grass'" in message and "parse_classes" in message and "['cat', 'grass']" in message


@pytest.mark.parametrize("names", [None, {"cat", "dog"}, {"cat": 1}, iter(["cat"]), 5])
def test_other_containers(names) -> None:
    assert type(names).__name__ in refused(check_classes, names, error=TypeError)


@pytest.mark.parametrize("entry", [None, 3, b"cat", ["cat"]])
def test_entry_that_is_no_string(entry) -> None:
    message = refused(check_classes, ["cat", entry], error=TypeError)
    assert "position 2" in message and type(entry).__name__ in message


@pytest.mark.parametrize("entry", ["", "   ", "\t\n", "\u00a0"])
def test_empty_name(entry: str) -> None:
    message = refused(check_classes, ["cat", "dog", entry])
    assert "empty" in message and "position 3" in message


@pytest.mark.parametrize("entry", [",", ", cat", " ,"])
def test_empty_first_synonym(entry: str) -> None:
    message = refused(check_classes, ["dog", entry])
    assert "empty synonym" in message and "position 2" in message


@pytest.mark.parametrize("entry", ["ca\0t", "cat\x1b[0m", "\ud800"])
def test_control_characters(entry: str) -> None:
    message = refused(check_classes, ["dog", entry])
    assert "control characters" in message and "position 2" in message
    message.encode()  # can be printed


@pytest.mark.parametrize("again", ["cat", "CAT", " Cat ", "caT"])
def test_duplicate(again: str) -> None:
    message = refused(check_classes, ["dog", "cat", "cow", again])
    assert "position 4" in message and "at 2" in message


def test_duplicate_after_tidying_and_in_another_form() -> None:
    refused(check_classes, ["fire hydrant", "fire  hydrant"])
    refused(check_classes, ["caf\u00e9", "cafe\u0301"])
    refused(check_classes, ["straße", "STRASSE"])
    assert check_classes(["cat", "cats"]) == ["cat", "cats"]


def test_same_first_synonym_is_allowed_and_said_once(caplog) -> None:
    vocabulary._warn_of_same_prompts.cache_clear()
    names = ["door, double door", "window", "Door, gate"]
    with caplog.at_level(logging.WARNING, logger="ovseg_fast"):
        assert check_classes(names) == names
        assert check_classes(names) == names
        check_classes(["door, double door", "gate, door"])
    assert len(caplog.records) == 1
    assert "door, double door" in caplog.text and "Door, gate" in caplog.text


def test_long_names_are_cut_in_messages() -> None:
    assert len(refused(check_classes, ["x" * 10_000, "x" * 10_000])) < 300


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat, grass, sky", ["cat", "grass", "sky"]),
        ("cat", ["cat"]),
        (" cat ,fire  hydrant\n", ["cat", "fire hydrant"]),
        ("door, double door; cat", ["door, double door", "cat"]),
        ("cat; grass", ["cat", "grass"]),
    ],
)
def test_parse_classes(text: str, names: list[str]) -> None:
    assert parse_classes(text) == names


def test_parse_classes_refuses() -> None:
    assert "at least one" in refused(parse_classes, "")
    assert "at least one" in refused(parse_classes, "  \n")
    assert "position 2" in refused(parse_classes, "cat,,sky")
    assert "position 3" in refused(parse_classes, "cat, sky,")
    assert "position 2" in refused(parse_classes, "cat, cat")
    assert "list" in refused(parse_classes, ["cat"], error=TypeError)


# Files


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


TEXT = "# my classes\n\ncat\r\n  fire  hydrant \n# grass\ndoor, double door\n猫\n   \nrock #1"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["a.txt", "a", "a.csv"])
def test_text_file(tmp_path: Path, name: str, mark: str) -> None:
    expected = ["cat", "fire hydrant", "door, double door", "猫", "rock #1"]
    assert read_classes(write(tmp_path / name, mark + TEXT)) == expected
    assert read_classes(str(tmp_path / name)) == expected


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["a.json", "a.JSON"])
def test_json_file(tmp_path: Path, name: str, mark: str) -> None:
    names = ["cat", "door, double door", "# no comment", "猫"]
    assert read_classes(write(tmp_path / name, mark + json.dumps(names))) == names
    assert read_classes(write(tmp_path / name, mark + json.dumps(names, ensure_ascii=False))) == names


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ('{"0": "cat"}', "an object"),
        ('"cat"', "a string"),
        ("3", "a number"),
        ("null", "null"),
        ('["cat", 3]', "a number at position 2"),
        ('["cat", ["dog"]]', "an array at position 2"),
        ('["cat", true]', "true or false at position 2"),
        ('["cat",', "not valid JSON"),
        ("", "not valid JSON"),
        ("cat\ndog", "not valid JSON"),
        ("[" * 100_000, "nested"),
        ("[" + "1" * 10_000 + "]", ""),
        ("[]", "at least one"),
        ('["cat", ""]', "position 2"),
        ('["cat", "Cat"]', "position 2"),
        ('["cat", "\\ud800"]', "control characters"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, content: str, word: str) -> None:
    path = write(tmp_path / "a.json", content)
    message = refused(read_classes, path)
    assert word in message and str(path) in message


@pytest.mark.parametrize("content", ["", "\n\n", "# only a comment\n"])
def test_text_file_without_names(tmp_path: Path, content: str) -> None:
    message = refused(read_classes, write(tmp_path / "a.txt", content))
    assert "at least one" in message and "a.txt" in message


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n", "Löwe".encode("latin-1")])
@pytest.mark.parametrize("name", ["a.txt", "a.json"])
def test_other_encodings_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    assert "UTF-8" in refused(read_classes, write(tmp_path / name, content))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_of_any_encoding_that_says_what_it_is(tmp_path: Path, encoding: str, end: str) -> None:
    path = write(tmp_path / "a.txt", end.join(["cat  ", "", "Löwe", " "]).encode(encoding))
    assert read_classes(path) == ["cat", "Löwe"]
    path = write(tmp_path / "a.json", json.dumps(["cat", "Löwe"], ensure_ascii=False).encode(encoding))
    assert read_classes(path) == ["cat", "Löwe"]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "a.txt" in refused(read_classes, tmp_path / "a.txt", error=FileNotFoundError)
    assert "is a folder" in refused(read_classes, tmp_path)


# Prompts


@pytest.mark.parametrize(
    ("entry", "name"),
    [("door, double door", "door"), ("door", "door"), ("fire hydrant,hydrant", "fire hydrant"), ("a , b, c", "a")],
)
def test_prompt_name(entry: str, name: str) -> None:
    assert prompt_name(entry) == name == prompt_name(name)


def test_templates_are_the_published_ones() -> None:
    assert fill_templates(["cat"], catseg.TEMPLATES) == [["A photo of a cat in the scene"]]
    assert fill_templates(["cat"], cascade_clip.VOC_TEMPLATES) == [["a photo of a cat"]]
    sizes = ["", "small ", "medium ", "large "]
    expected = [f"a photo of a {size}cat." for size in sizes] + [f"This is a photo of a {size}cat." for size in sizes]
    expected += ["a cat in the scene.", "a photo of a cat in the scene."]
    expected += ["There is a cat in the scene.", "There is the cat in the scene."]
    expected += ["This is a cat in the scene.", "This is the cat in the scene.", "This is one cat in the scene."]
    assert fill_templates(["cat"], cascade_clip.TEMPLATES) == [expected]
    assert len(cascade_clip.TEMPLATES) == 15


def test_fill_templates_gives_classes_by_prompts() -> None:
    prompts = fill_templates(["cat", "door, double door", "{0}"], ("a {}", "{} {x}"))
    assert prompts == [["a cat", "cat {x}"], ["a door", "door {x}"], ["a {0}", "{0} {x}"]]


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "{0}", ""])
def test_template_without_exactly_one_place(template: str) -> None:
    assert repr(template) in refused(fill_templates, ["cat"], ["a {}", template])


def test_no_template_or_a_bare_one() -> None:
    assert "at least one" in refused(fill_templates, ["cat"], [])
    assert "'a {}'" in refused(fill_templates, ["cat"], "a {}", error=TypeError)


# Tokens


@pytest.mark.parametrize(
    ("prompt", "words"),  # as OpenAI's tokenizer gives them
    [
        ("a diagram", [320, 22697]),
        ("a dog", [320, 1929]),
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("  A photo\tof a &amp;lt;CAT ", [320, 1125, 539, 320, 283, 2368]),
    ],
)
def test_known_tokens(prompt: str, words: list[int]) -> None:
    tokens = tokenize([[prompt]])
    assert tokens.dtype == torch.int64 and tokens.shape == (1, 1, 77)
    assert tokens[0, 0].tolist() == [START, *words, END] + [0] * (75 - len(words))


@pytest.mark.parametrize("templates", [catseg.TEMPLATES, cascade_clip.TEMPLATES])
def test_tokens_are_open_clips_own(templates: tuple[str, ...]) -> None:
    import open_clip

    prompts = fill_templates(COCO_STUFF.classes, templates)
    tokens = tokenize(prompts)
    assert tokens.shape == (171, len(templates), 77)
    expected = open_clip.get_tokenizer("ViT-B-16")([prompt for row in prompts for prompt in row])
    assert torch.equal(tokens.flatten(0, 1), expected)


def openai_clean(text: str) -> str:
    """How OpenAI's tokenizer prepares a text: repair, unescape HTML twice, single spaces, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip().lower()


@given(st.text(max_size=20) | st.text("aÀß é&ltgamp;#39'’ ﬁ\u00a0\u2003", max_size=20))
def test_open_clip_cleans_as_openai_does(text: str) -> None:
    assert vocabulary._tokenizer().clean_fn(text) == openai_clean(text)


def test_longest_prompt_that_fits_and_one_more() -> None:
    tokens = tokenize([["cat " * 75]])[0, 0]
    assert tokens[0] == START and (tokens[1:76] == 2368).all() and tokens[76] == END
    message = refused(tokenize, [["a dog"], ["cat " * 76]])
    assert "77" in message and "78" in message and "cat cat" in message


@pytest.mark.parametrize("name", ["<end_of_text>", "<start_of_text>", "cat &lt;END_of_text&gt; dog"])
def test_special_tokens_cannot_be_spelt_out(name: str) -> None:
    assert "special tokens" in refused(tokenize, [[f"a {name}"]])


@pytest.mark.parametrize("prompts", [[], [[]], [["a"], ["b", "c"]], [["a"], []]])
def test_prompts_must_be_a_full_table(prompts: list[list[str]]) -> None:
    assert "T lists of P prompts" in refused(tokenize, prompts)


# The benchmarks' class lists


@pytest.mark.parametrize(
    ("known", "count", "first", "last", "unseen"),
    [
        (PASCAL_VOC, 20, "aeroplane", "tvmonitor", "pottedplant, sheep, sofa, train, tvmonitor"),
        (
            PASCAL_CONTEXT,
            59,
            "aeroplane",
            "wood",
            "aeroplane, bird, boat, cat, cow, motorbike, sofa, tvmonitor, fence, keyboard",
        ),
        (
            COCO_STUFF,
            171,
            "person",
            "wood",
            "cow, giraffe, suitcase, frisbee, skateboard, carrot, scissors, cardboard, clouds, grass, playingfield, "
            "river, road, tree, wall-concrete",
        ),
    ],
)
def test_vocabularies(known: Vocabulary, count: int, first: str, last: str, unseen: str) -> None:
    assert len(known.classes) == count and (known.classes[0], known.classes[-1]) == (first, last)
    assert check_classes(known.classes) == list(known.classes)
    assert [known.classes[index] for index in known.unseen] == unseen.split(", ")
    assert set(known.seen) == set(known.classes) - set(unseen.split(", "))
    assert list(known.seen) == sorted(known.seen, key=known.classes.index)
    assert VOCABULARIES[known.name] is known


def test_order_of_the_vocabularies() -> None:
    assert set(VOCABULARIES) == {"pascal-voc", "pascal-voc-20b", "pascal-context", "coco-stuff", "ade20k-150", "world"}
    assert PASCAL_CONTEXT.classes[:20] == tuple("table" if n == "diningtable" else n for n in PASCAL_VOC.classes)
    stuff = COCO_STUFF.classes[80:]
    assert len(stuff) == 91 and list(stuff) == sorted(stuff)
    assert COCO_STUFF.classes[79] == "toothbrush"


def test_vocabulary_is_frozen_and_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PASCAL_VOC.name = "other"
    assert Vocabulary("mine", ("a", "b")).seen == ("a", "b")
    for unseen in [(2,), (-1,), (0, 0)]:
        with pytest.raises(ValueError, match="unseen"):
            Vocabulary("mine", ("a", "b"), unseen)
