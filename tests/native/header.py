"""What csrc/ovseg.h and csrc/cpu/ovseg_cpu.h declare, read from their texts."""

from __future__ import annotations

import re
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
HEADER = (CSRC / "ovseg.h").read_text()
CPU_HEADER = (CSRC / "cpu" / "ovseg_cpu.h").read_text()
ABOUT_ITSELF = {"ovseg_abi_version", "ovseg_error_string", "ovseg_architectures"}
CPU_ABOUT_ITSELF = {"ovseg_abi_version", "ovseg_error_string", "ovseg_cpu_isa", "ovseg_cpu_choose"}


def code(header: str) -> str:
    """A header without its comments."""
    return re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)


def split(declaration: str) -> list[str]:
    """ "const void *x, *y" -> "const void *x", "const void *y"."""
    first, *others = (word.strip() for word in declaration.split(","))
    kind = re.match(r"[\w ]*\b(?=\*| \*|\w+$)", first)
    assert kind is not None, declaration
    return [first, *(f"{kind[0].strip()} {other}" for other in others)]


def structs(header: str) -> dict[str, list[str]]:
    """Params struct -> its fields."""
    found = re.findall(r"typedef struct \{(.*?)\} (\w+);", code(header), re.DOTALL)
    return {name: [field for line in body.split(";") if line.strip() for field in split(line)] for body, name in found}


def declared(header: str) -> dict[str, list[str]]:
    """Function -> its parameters."""
    found = re.findall(r"OVSEG_API [\w *]+?\b(ovseg_\w+)\(([^)]*)\);", code(header))
    return {name: [parameter.strip() for parameter in parameters.split(",")] for name, parameters in found}


def flat(parameters: list[str]) -> list[str]:
    """Parameters with the fields of a params struct in its place."""
    struct = re.fullmatch(r"const (\w+_params) \*params", parameters[0])
    return [*STRUCTS[struct[1]], *parameters[1:]] if struct else parameters


STRUCTS = structs(HEADER) | structs(CPU_HEADER)
DECLARED = declared(HEADER)
CPU_DECLARED = declared(CPU_HEADER)  # beside those of ovseg.h that it has
OPERATOR_FUNCTIONS = {name: flat(parameters) for name, parameters in DECLARED.items() if name not in ABOUT_ITSELF}
CPU_OPERATOR_FUNCTIONS = {
    name: flat(parameters) for name, parameters in CPU_DECLARED.items() if name not in CPU_ABOUT_ITSELF
}


def name_of(parameter: str) -> str:
    return parameter.split()[-1].lstrip("*")


def defined(name: str) -> int:
    """The number that the headers give a name."""
    value = re.search(rf"\b{name}\s*=?\s*(-?\d+)", HEADER + CPU_HEADER)
    assert value is not None, name
    return int(value[1])
