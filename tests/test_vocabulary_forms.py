"""Names as people have them: invisible letters, Unicode forms, lists of other forms, very long ones."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from ovseg_fast import vocabulary
from ovseg_fast.vocabulary import check_classes, parse_classes, read_classes, tokenize
from test_vocabulary import refused, write

INVISIBLE = "\u200b \ufeff \u00ad \u2060 \u200e \u200f \u202a \u202e \u2066 \u2069 \u061c \u180e \u2063 \u3164 \u2800"


@pytest.mark.parametrize("letter", INVISIBLE.split(" "), ids=ascii)
def test_invisible_letters_go_with_the_white_space(letter: str) -> None:
    assert check_classes([f"{letter}cat", f"fire{letter} hydrant", f"gr{letter}ass {letter}"]) == [
        "cat",
        "fire hydrant",
        "grass",
    ]
    assert "empty name" in refused(check_classes, ["cat", letter])
    assert "empty name" in refused(check_classes, [f" {letter} {letter}"])
    message = refused(check_classes, ["cat", f"cat{letter}"])
    assert "differ only in letters that cannot be seen" in message
    assert "empty synonym" in refused(check_classes, [f"{letter}, cat"])


def test_joiners_stay_where_something_is_joined() -> None:
    names = ["👩\u200d🚀", "می\u200cخواهم", "❤\ufe0f"]
    assert check_classes(names) == names
    assert "empty name" in refused(check_classes, ["\u200d\u200c"])


def test_names_of_two_forms_are_told_apart() -> None:
    assert "NFC and NFD" in refused(check_classes, ["caf\u00e9", "cafe\u0301"])
    assert "upper and lower case" in refused(check_classes, ["cat", "Cat"])
    assert "only" not in refused(check_classes, ["fire hydrant", "fire  hydrant"])


@pytest.fixture
def warned(caplog) -> pytest.LogCaptureFixture:
    vocabulary._warn_of_same_prompts.cache_clear()
    caplog.set_level(logging.WARNING, logger="ovseg_fast")
    return caplog


def test_what_the_tokenizer_takes_for_the_same_is_said(warned) -> None:
    assert (tokenize([["ｃａｔ"]]) == tokenize([["cat"]])).all()
    check_classes(["ｃａｔ", "cat"])
    assert "same prompts" in warned.text


def test_many_names_of_the_same_prompts_are_one_warning(warned) -> None:
    check_classes([f"door, number {i}" for i in range(500)])
    (record,) = warned.records
    assert "and 498 more pairs" in record.getMessage()


FORMS = {
    "labels.txt": ("0: unlabeled\n1: person\n2: bicycle\n", "begins with a number"),
    "numbered.txt": ("1. cat\n2. dog\n", "begins with a number"),
    "objectInfo150.txt": ("Idx\tRatio\tName\n1\t0.1576\twall\n2\t0.1072\tbuilding, edifice\n", "begins with a number"),
    "line.txt": ("cat, grass, sky\n", "only line is one class, whose first synonym is 'cat'"),
    "semicolons.txt": ("cat; grass; sky", "only line is one class"),
    "json.txt": ('["cat", "grass"]\n', "only line is one class"),
    "lines.txt": ('[\n"cat",\n"grass"\n]', "quotes or brackets of '['"),
    "python.txt": ("'cat',\n'grass',\n", "quotes or brackets"),
    "names.csv": ('id,name\n0,"cat"\n1,"door, double door"\n', "begins with a number"),
    "quoted.csv": ('"cat"\n"door, double door"\n', "quotes or brackets"),
    "names.yaml": ("- cat\n- dog\n", "begins with a dash"),
    "named.yaml": ("names:\n  0: cat\n  1: dog\n", "begins with a number"),
    "bullets.md": ("* cat\n* dog\n", "begins with a dash"),
    "page.html": ("<li>cat</li>\n<li>dog</li>\n", "quotes or brackets"),
}


@pytest.mark.parametrize("name", FORMS)
def test_lists_of_other_forms_are_said_once(tmp_path: Path, warned, name: str) -> None:
    content, words = FORMS[name]
    read_classes(write(tmp_path / name, content))
    (record,) = warned.records
    assert words in record.getMessage() and name in record.getMessage()


@pytest.mark.parametrize("content", ["cat\nbird's nest\n3d printer\n", "door, double door\ncat", "cat", "7 up\ncola\n"])
def test_usual_lists_are_not_warned_of(tmp_path: Path, warned, content: str) -> None:
    read_classes(write(tmp_path / "a.txt", content))
    assert not warned.records


def test_a_python_list_on_the_command_line_is_said(warned) -> None:
    assert parse_classes("['green grass', 'star']") == ["['green grass'", "'star']"]
    (record,) = warned.records
    assert "quotes or brackets" in record.getMessage()
    assert parse_classes("bird's nest, cat") == ["bird's nest", "cat"] and len(warned.records) == 1


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        ("cat\n\ndog\n", 2, "blank"),
        ("cat\n# dog\ncow", 2, "a comment"),
        ("cat\ndog\n \u200b\n\ncow\n", 3, "blank"),
        ("\ncat\n", 1, "blank"),
        ("# names\ncat\n\ndog", 3, "blank"),
    ],
)
def test_a_gap_in_an_indexed_list_is_an_error(tmp_path: Path, content: str, line: int, what: str) -> None:
    path = write(tmp_path / "classes.txt", content)
    message = refused(lambda: read_classes(path, indexed=True))
    assert message == f"line {line} of '{path}' is {what}, but the labels count the lines, one class each."
    assert read_classes(path)


@pytest.mark.parametrize("content", ["cat\ndog", "cat\ndog\n\n  \n", "# my classes\n\ncat\ndog\n# the end\n"])
def test_an_indexed_list_may_have_a_head_and_an_end(tmp_path: Path, content: str) -> None:
    assert read_classes(write(tmp_path / "classes.txt", content), indexed=True) == ["cat", "dog"]


def test_a_huge_file_is_no_class_list(tmp_path: Path) -> None:
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(2**33)  # a hole: takes no room
    assert "8192 MiB" in refused(read_classes, tmp_path / "a.txt")


# Long ones


LONG = {
    "one word": "x" * 30_000,
    "words": "cat " * 30_000,
    "emoji": "😂" * 30_000,
    "combining letters": "e" + "\u0301\u0323" * 50_000,
    "damaged encoding": "Ã©" * 50_000,
    "entities": "&" + "amp;" * 30_000,
    "digits": "1" * 30_000,
    "zeros": "&#" + "0" * 5_000 + "65;",
}


@pytest.mark.parametrize("name", LONG)
def test_prompts_that_cannot_fit_are_refused_at_once(name: str) -> None:
    vocabulary._longest_token()  # loads the tokenizer
    started = time.perf_counter()
    (checked,) = check_classes([LONG[name]])
    message = refused(tokenize, [[f"A photo of a {checked} in the scene"]])
    assert time.perf_counter() - started < 1  # 18 s for one word, when it was tokenised first
    assert ("77 tokens" in message or "plain text" in message) and len(message) < 300


@pytest.mark.parametrize("text", ["😂" * 8 * 74, "&amp;#128514;" * 8 * 74])
def test_the_longest_prompts_that_fit_are_taken(text: str) -> None:
    assert len(vocabulary._encode(vocabulary._tokenizer(), text)) <= 75


def test_the_bound_refuses_nothing_that_fits() -> None:
    tokenizer, longest = vocabulary._tokenizer(), vocabulary._longest_token()
    for text in ("😂" * 600, "cat" * 75, "x" * 2400, "猫" * 75, "a " * 75):
        letters = len(text.replace(" ", "").encode())
        assert len(tokenizer.encode(text)) >= letters / longest
