"""Class names, the prompts made of them, and the tokens of the prompts."""

from __future__ import annotations

import json
import logging
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import compat
from .files import read_text

if TYPE_CHECKING:
    from torch import Tensor

CONTEXT_LENGTH = 77  # tokens of CLIP's text encoder, with start and end token
LONGEST_FILE = 64 * 2**20  # bytes of a file of class names
LONGEST_PREPARED = 250  # letters of a name that are normalised, which takes time with the square of the accents

# Letters that nobody sees and that come along from the web, PDF files and spreadsheets. Not the joiners U+200C and
# U+200D, which emoji and scripts need.
_INVISIBLE = dict.fromkeys(
    [*map(ord, "\xad\u034f\u061c\u180e\u200b\u200e\u200f\u2800\u3164\ufeff\uffa0\ufffc"), *range(0x202A, 0x202F)]
) | dict.fromkeys([*range(0x2060, 0x2070), *range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0020)])
_NOT_ALONE = {0x200C: None, 0x200D: None, **dict.fromkeys(range(0xFE00, 0xFE10))}  # joiners, variation selectors
_NUMBERED = re.compile(r"(?:\d+(?:[:.,;)\]|]|\s+\S)|[-*•–—]\s*\S)")

logger = logging.getLogger(__name__)


def parse_classes(text: str) -> list[str]:
    """Class names from one line, `"cat, grass, sky"`, or with synonyms, `"door, double door; cat"`.

    Raises:
        TypeError, ValueError: as `check_classes`.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string of class names such as 'cat, grass, sky', got {type(text).__name__}.")
    names = check_classes(text.split(";" if ";" in text else ",") if text.strip() else [])
    _warn_of_quotes("the list of classes", names)
    return names


def read_classes(path: str | os.PathLike[str], *, indexed: bool = False) -> list[str]:
    """Class names from a file: a .json array of names, or text with one class per line, see `files.read_text`.

    Blank lines of a text and lines that begin with # are ignored. A text that looks like another form of list (numbered
    lines, a line of all names, a table, quotes) is taken as it is, with one warning.

    Args:
        indexed: labels count the lines, so a blank line or a comment between the names is an error.

    Raises:
        FileNotFoundError: no such file. OSError: it cannot be read.
        ValueError: a folder, not text, not a JSON array of names, or names that `check_classes` refuses.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"there is no file of class names '{file}'.")
    if file.is_dir():
        raise ValueError(f"'{file}' is a folder, expected a file of class names.")
    if (size := file.stat().st_size) > LONGEST_FILE:
        raise ValueError(f"'{file}' is {size / 2**20:.0f} MiB, too large for a list of class names.")
    text = read_text(file, "class names")
    if file.suffix.lower() == ".json":
        names = _json_names(text, file)
    else:
        names = _lines(text, file, indexed)
    try:
        names = check_classes(names)
    except ValueError as error:
        raise ValueError(f"class names in '{file}': {error}") from None
    if file.suffix.lower() != ".json":
        _warn_of_form(f"'{file}'", names, text)
    return names


def tidy_name(entry: str) -> str:
    """A name without invisible letters and with single spaces; empty if there is nothing to see in it."""
    name = " ".join(entry.translate(_INVISIBLE).split())
    return name if name.translate(_NOT_ALONE).strip() else ""


def check_classes(names: Sequence[str]) -> list[str]:
    """Class names with tidied white space and without invisible letters; one warning if some share their first synonym,
    and so their prompts.

    Args:
        names: a list or tuple of T names, at least one. A name can be a list of synonyms, as `"door, double door"`.

    Raises:
        TypeError: not a list or tuple of strings.
        ValueError: no name, an empty one, one with control characters, or a repeated one (ignoring case).
    """
    if isinstance(names, str):
        cure = "write ['cat', 'grass'], or split a string with parse_classes('cat, grass')"
        raise TypeError(f"classes must be a list of names, got the string {_short(names)}; {cure}.")
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"classes must be a list of names such as ['cat', 'grass'], got {type(names).__name__}.")
    if not names:
        raise ValueError("classes must hold at least one name, got none.")

    tidy: list[str] = []
    positions: dict[str, int] = {}
    alike: list[tuple[str, str]] = []
    prompted: dict[str, str] = {}  # first synonym -> first class that has it
    for position, entry in enumerate(names, 1):
        at = f"at position {position}"
        if not isinstance(entry, str):
            raise TypeError(f"classes must hold strings, got {type(entry).__name__} {at}.")
        name = tidy_name(entry)
        if not name:
            raise ValueError(f"classes must not hold an empty name, got {_short(entry)} {at}.")
        if not prompt_name(name):
            raise ValueError(f"a class must not begin with an empty synonym, got {_short(name)} {at}.")
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            raise ValueError(f"class names must not hold control characters, got {_short(ascii(name))} {at}.")
        key, synonym = _same(name), _same(prompt_name(name), "NFKC")
        if key in positions:
            first = positions[key]
            only = _difference(names[first - 1], entry)
            raise ValueError(f"classes must differ, got {_short(name)} {at} and before at {first}{only}.")
        positions[key] = position
        if (same := prompted.setdefault(synonym, name)) != name:
            alike.append((same, name))
        tidy.append(name)
    if alike:
        _warn_of_same_prompts(*alike[0], len(alike) - 1)
    return tidy


def prompt_name(entry: str) -> str:
    """The name in the prompts: the first synonym, "door" for "door, double door", as published."""
    return entry.split(",", 1)[0].strip()


def check_seen(seen: Collection[str], names: Sequence[str], of: str) -> None:
    """Raises TypeError or ValueError if `seen` is no list of some of the names, which are those `of` something."""
    wrong = f"seen must be a list of names out of {of}, got {seen!r}."
    if isinstance(seen, str) or not isinstance(seen, Collection):
        raise TypeError(wrong)
    if any(name not in names for name in seen):
        raise ValueError(wrong)


def check_templates(templates: Iterable[str]) -> tuple[str, ...]:
    """Sentences with one `{}` each, at least one.

    Raises:
        TypeError: `templates` is a string, or holds something else. ValueError: no template, or one without exactly one
            `{}`.
    """
    if isinstance(templates, str):
        raise TypeError(f"templates must be a list of sentences, got the string {_short(templates)}.")
    if not isinstance(templates, Iterable):
        raise TypeError(f"templates must be a list of sentences, got {type(templates).__name__}.")
    templates = tuple(templates)
    if not templates:
        raise ValueError("templates must hold at least one sentence with a {}, got none.")
    for template in templates:
        if not isinstance(template, str):
            raise TypeError(f"templates must hold sentences, got {type(template).__name__}.")
        if template.count("{}") != 1:
            raise ValueError(f"a template must hold {{}} exactly once, got {_short(template)}.")
    return templates


def fill_templates(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Prompts: P templates, sentences with one `{}`, filled with the first synonym of T names -> T lists of P prompts.

    Raises:
        TypeError, ValueError: as `check_templates`.
    """
    templates = check_templates(templates)
    # Not str.format: a template may hold other braces.
    return [[template.replace("{}", prompt_name(name)) for template in templates] for name in names]


def tokenize(prompts: Sequence[Sequence[str]]) -> Tensor:
    """T lists of P prompts -> (T, P, 77) int64 tokens: byte-pair encoding between a start and an end token, then zeros.

    Raises:
        ValueError: a prompt exceeds 77 tokens or spells out a special token, there is none, or the lists differ in
            length.
    """
    import torch

    counts = {len(row) for row in prompts}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"prompts must be T lists of P prompts each, got lists of {sorted(counts) or 'no'} prompts.")
    tokenizer = _tokenizer()
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    tokens = torch.zeros(len(prompts), counts.pop(), CONTEXT_LENGTH, dtype=torch.int64, device="cpu")
    for t, row in enumerate(prompts):
        for p, prompt in enumerate(row):
            words = _encode(tokenizer, prompt)
            if (count := len(words) + 2) > CONTEXT_LENGTH:
                limit = f"CLIP's {CONTEXT_LENGTH} tokens"
                raise ValueError(f"a prompt must fit into {limit}, got {count} for {_short(prompt)}.")
            if start in words or end in words:
                raise ValueError(f"a prompt must not spell out CLIP's special tokens, got {_short(prompt)}.")
            tokens[t, p, :count] = torch.tensor([start, *words, end], device="cpu")
    return tokens


@lru_cache(maxsize=1024)  # once, however often a list is checked
def _warn_of_same_prompts(first: str, second: str, more: int) -> None:
    pairs = f" (and {more} more pairs)" if more else ""
    names = _short(first), _short(second), pairs
    logger.warning("classes %s and %s have the same first synonym, and so the same prompts%s", *names)


def _warn_of_quotes(where: str, names: Sequence[str]) -> None:
    marks = tuple("\"'[]{}<>|“”`")
    found = [name for name in names if name.startswith(marks) or name.endswith(marks)]
    if found:
        logger.warning("%s: the quotes or brackets of %s are taken as part of the name", where, _short(found[0]))


def _warn_of_form(where: str, names: Sequence[str], text: str) -> None:
    """One warning if lines of text look like another form of list than one name per line."""
    rows = names[1:] if len(names) > 2 else names  # a table may have a head
    if all(_NUMBERED.match(name) for name in rows):
        kind = "dash" if not rows[0][0].isdigit() else "number"
        form = f"every line begins with a {kind}, which is taken as part of the name, as in {_short(rows[0])}"
    elif len(names) == 1 and ("," in names[0] or ";" in names[0]):
        form = f"its only line is one class, whose first synonym is {_short(prompt_name(names[0]))}; write one per line"
    elif len(names) > 1 and all(re.search(r"\S\t+\S|[:=]\s*\d+$", line.strip()) for line in text.strip().split("\n")):
        form = f"every line looks like the row of a table, all of which is taken as the name, as in {_short(names[0])}"
    else:
        _warn_of_quotes(where, names)
        return
    logger.warning("%s: %s", where, form)


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return compat.open_clip().SimpleTokenizer()  # a slow import: only if there is something to tokenise


@lru_cache(maxsize=1)
def _longest_token() -> int:
    """Bytes of the longest token; the vocabulary writes each byte as one letter."""
    return max(len(token.removesuffix("</w>")) for token in _tokenizer().encoder)


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a prompt. Encoding takes time with the square of its length, so what cannot fit is refused before."""
    most = (CONTEXT_LENGTH - 2) * _longest_token()
    letters = sum(map(len, prompt.split()))
    if letters <= 4 * most:  # beyond, even a prompt of HTML entities, which shrink, is too long
        try:
            prepared = tokenizer.clean_fn(prompt)
        except ValueError as error:  # an HTML entity of thousands of digits
            raise ValueError(f"a prompt must be plain text, got {_short(prompt)} ({error}).") from None
        letters = sum(len(word.encode("utf-8", "surrogatepass")) for word in prepared.split())
    if letters > most:
        least = -(-letters // _longest_token()) + 2
        limit = f"CLIP's {CONTEXT_LENGTH} tokens"
        raise ValueError(f"a prompt must fit into {limit}, got at least {least} for {_short(prompt)}.")
    return tokenizer.encode(prompt)


def _lines(text: str, file: Path, indexed: bool) -> list[str]:
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    used = [(number, line) for number, line in lines if tidy_name(line) and not line.startswith("#")]
    if indexed and used:
        # A comment above the names is harmless; anything between them would shift the indices.
        first = used[0][0] if lines[0][1].startswith("#") else 1
        for expected, (number, _) in enumerate(used, first):
            if number != expected:
                what = "a comment" if lines[expected - 1][1].startswith("#") else "blank"
                rule = "the labels count the lines, one class each"
                raise ValueError(f"line {expected} of '{file}' is {what}, but {rule}.")
    return [line for _, line in used]


def _json_names(text: str, file: Path) -> list[str]:
    try:
        names = json.loads(text)
    except ValueError as error:
        raise ValueError(f"'{file}' is not valid JSON ({error}).") from None
    except RecursionError:
        raise ValueError(f"'{file}' must be a JSON array of names, got deeply nested values.") from None
    except MemoryError:
        raise ValueError(f"'{file}' must be a JSON array of names, got more than fits into memory.") from None
    if not isinstance(names, list):
        raise ValueError(f"'{file}' must be a JSON array of names, got {_json_kind(names)}.")
    for position, name in enumerate(names, 1):
        if not isinstance(name, str):
            raise ValueError(f"'{file}' must be a JSON array of names, got {_json_kind(name)} at position {position}.")
    return names


def _json_kind(value: object) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _same(name: str, form: Literal["NFC", "NFKC"] = "NFC") -> str:
    """Equal for names that differ only in case or in how accents are encoded, which CLIP's tokenizer ignores; with
    NFKC also for those that it takes for the same, such as full-width letters and ligatures."""
    return (unicodedata.normalize(form, name) if len(name) <= LONGEST_PREPARED else name).casefold()


def _difference(one: str, two: str) -> str:
    """For a sentence about two names that count as the same."""
    if one.split() == two.split():
        return ""
    if one.translate(_INVISIBLE).split() == two.translate(_INVISIBLE).split():
        return "; they differ only in letters that cannot be seen"
    one, two = tidy_name(one), tidy_name(two)
    if unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", two):
        return "; they differ only in how accents are encoded (Unicode's NFC and NFD)"
    return "; they differ only in upper and lower case"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
