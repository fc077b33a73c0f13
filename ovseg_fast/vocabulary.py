"""Class names, the prompts made of them, and the tokens of the prompts."""

from __future__ import annotations

import json
import logging
import os
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import compat

if TYPE_CHECKING:
    from torch import Tensor

CONTEXT_LENGTH = 77  # tokens of CLIP's text encoder, with start and end token

logger = logging.getLogger(__name__)


def parse_classes(text: str) -> list[str]:
    """Class names from one line, `"cat, grass, sky"`, or with synonyms, `"door, double door; cat"`.

    Raises:
        TypeError, ValueError: as `check_classes`.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string of class names such as 'cat, grass, sky', got {type(text).__name__}.")
    return check_classes(text.split(";" if ";" in text else ",") if text.strip() else [])


def read_classes(path: str | os.PathLike[str]) -> list[str]:
    """Class names from a UTF-8 file: a .json array of names, or text with one class per line.

    Blank lines of a text and lines that begin with # are ignored.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, not UTF-8, not a JSON array of names, or names that `check_classes` refuses.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"there is no file of class names '{file}'.")
    if file.is_dir():
        raise ValueError(f"'{file}' is a folder, expected a file of class names.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"'{file}' is not UTF-8, expected class names, one per line.") from None
    if file.suffix.lower() == ".json":
        names = _json_names(text, file)
    else:
        lines = (line.strip() for line in text.splitlines())
        names = [line for line in lines if line and not line.startswith("#")]
    try:
        return check_classes(names)
    except ValueError as error:
        raise ValueError(f"class names in '{file}': {error}") from None


def check_classes(names: Sequence[str]) -> list[str]:
    """Class names with tidied white space; one warning if two share their first synonym, and so their prompts.

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
    prompted: dict[str, str] = {}  # first synonym -> first class that has it
    for position, entry in enumerate(names, 1):
        at = f"at position {position}"
        if not isinstance(entry, str):
            raise TypeError(f"classes must hold strings, got {type(entry).__name__} {at}.")
        name = " ".join(entry.split())
        if not name:
            raise ValueError(f"classes must not hold an empty name, got {_short(entry)} {at}.")
        if not prompt_name(name):
            raise ValueError(f"a class must not begin with an empty synonym, got {_short(name)} {at}.")
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            raise ValueError(f"class names must not hold control characters, got {_short(ascii(name))} {at}.")
        key, synonym = _same(name), _same(prompt_name(name))
        if key in positions:
            raise ValueError(f"classes must differ, got {_short(name)} {at} and before at {positions[key]}.")
        positions[key] = position
        if (first := prompted.setdefault(synonym, name)) != name:
            _warn_of_same_prompts(first, name)
        tidy.append(name)
    return tidy


def prompt_name(entry: str) -> str:
    """The name in the prompts: the first synonym, "door" for "door, double door", as published."""
    return entry.split(",", 1)[0].strip()


def fill_templates(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Prompts: P templates, sentences with one `{}`, filled with the first synonym of T names -> T lists of P prompts.

    Raises:
        TypeError: `templates` is a string. ValueError: no template, or one without exactly one `{}`.
    """
    if isinstance(templates, str):
        raise TypeError(f"templates must be a list of sentences, got the string {_short(templates)}.")
    if not templates:
        raise ValueError("templates must hold at least one sentence with a {}, got none.")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"a template must hold {{}} exactly once, got {_short(template)}.")
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
            words = tokenizer.encode(prompt)
            if (count := len(words) + 2) > CONTEXT_LENGTH:
                limit = f"CLIP's {CONTEXT_LENGTH} tokens"
                raise ValueError(f"a prompt must fit into {limit}, got {count} for {_short(prompt)}.")
            if start in words or end in words:
                raise ValueError(f"a prompt must not spell out CLIP's special tokens, got {_short(prompt)}.")
            tokens[t, p, :count] = torch.tensor([start, *words, end], device="cpu")
    return tokens


@lru_cache(maxsize=1024)  # once, however often a list is checked
def _warn_of_same_prompts(first: str, second: str) -> None:
    names = _short(first), _short(second)
    logger.warning("classes %s and %s have the same first synonym, and so the same prompts", *names)


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return compat.open_clip().SimpleTokenizer()  # a slow import: only if there is something to tokenise


def _json_names(text: str, file: Path) -> list[str]:
    try:
        names = json.loads(text)
    except ValueError as error:
        raise ValueError(f"'{file}' is not valid JSON ({error}).") from None
    except RecursionError:
        raise ValueError(f"'{file}' must be a JSON array of names, got deeply nested values.") from None
    if not isinstance(names, list):
        raise ValueError(f"'{file}' must be a JSON array of names, got {_json_kind(names)}.")
    for position, name in enumerate(names, 1):
        if not isinstance(name, str):
            raise ValueError(f"'{file}' must be a JSON array of names, got {_json_kind(name)} at position {position}.")
    return names


def _json_kind(value: object) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _same(name: str) -> str:
    """Equal for names that differ only in case or in how accents are encoded, which CLIP's tokenizer ignores."""
    return unicodedata.normalize("NFC", name).casefold()


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
