"""What csrc/ovseg.h declares, read from its text."""

from __future__ import annotations

import re
from pathlib import Path

HEADER = (Path(__file__).resolve().parents[2] / "csrc" / "ovseg.h").read_text()
CODE = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL)
ABOUT_ITSELF = {"ovseg_abi_version", "ovseg_error_string", "ovseg_architectures"}


def split(declaration: str) -> list[str]:
    """ "const void *x, *y" -> "const void *x", "const void *y"."""
    first, *others = (word.strip() for word in declaration.split(","))
    kind = re.match(r"[\w ]*\b(?=\*| \*|\w+$)", first)
    assert kind is not None, declaration
    return [first, *(f"{kind[0].strip()} {other}" for other in others)]


def structs() -> dict[str, list[str]]:
    """Params struct -> its fields."""
    found = re.findall(r"typedef struct \{(.*?)\} (\w+);", CODE, re.DOTALL)
    return {name: [field for line in body.split(";") if line.strip() for field in split(line)] for body, name in found}


def declared() -> dict[str, list[str]]:
    """Function -> its parameters."""
    found = re.findall(r"OVSEG_API [\w *]+?\b(ovseg_\w+)\(([^)]*)\);", CODE)
    return {name: [parameter.strip() for parameter in parameters.split(",")] for name, parameters in found}


def flat(parameters: list[str]) -> list[str]:
    """Parameters with the fields of a params struct in its place."""
    struct = re.fullmatch(r"const (\w+_params) \*params", parameters[0])
    return [*STRUCTS[struct[1]], *parameters[1:]] if struct else parameters


STRUCTS = structs()
DECLARED = declared()
OPERATOR_FUNCTIONS = {name: flat(parameters) for name, parameters in DECLARED.items() if name not in ABOUT_ITSELF}


def name_of(parameter: str) -> str:
    return parameter.split()[-1].lstrip("*")


def defined(name: str) -> int:
    """The number that the header gives a name."""
    value = re.search(rf"\b{name}\s*=?\s*(-?\d+)", HEADER)
    assert value is not None, name
    return int(value[1])
