"""What csrc/ovseg.h declares, read from its text."""

from __future__ import annotations

import re
from pathlib import Path

HEADER = (Path(__file__).resolve().parent.parent / "csrc" / "ovseg.h").read_text()
ABOUT_ITSELF = {"ovseg_abi_version", "ovseg_error_string", "ovseg_architectures"}


def declared() -> dict[str, list[str]]:
    """Function -> its parameters."""
    code = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL)
    found = re.findall(r"OVSEG_API [\w *]+?\b(ovseg_\w+)\(([^)]*)\);", code)
    return {name: [parameter.strip() for parameter in parameters.split(",")] for name, parameters in found}


DECLARED = declared()
OPERATOR_FUNCTIONS = {name: parameters for name, parameters in DECLARED.items() if name not in ABOUT_ITSELF}


def defined(name: str) -> int:
    """The number that the header gives a name."""
    value = re.search(rf"\b{name}\s*=?\s*(-?\d+)", HEADER)
    assert value is not None, name
    return int(value[1])
