"""Registers, stack, shared memory and instructions of every CUDA C++ kernel, from the built library: no GPU is needed.

    python tests/native/resources.py            prints the table

Shared memory is what a kernel declares, and on sm_90 and newer a kilobyte that the system reserves.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "ovseg_fast" / "libovseg.so"
OPERATION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)")
LOOKED_AT = re.compile(r"\w*MMA|STL|LDL")  # tensor cores and local memory

Table = dict[str, dict[str, dict[str, int]]]  # kernel -> architecture -> what it uses


def disassembler() -> str | None:
    """NVIDIA's cuobjdump: of the CUDA toolkit, or the one that comes with Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = util.find_spec("triton")
    bundled = Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    return str(bundled) if bundled and bundled.exists() else None


def name_reader() -> str | None:
    """A program that makes C++ names readable."""
    return next((found for name in ("cu++filt", "c++filt", "llvm-cxxfilt") if (found := shutil.which(name))), None)


def readable(names: list[str]) -> dict[str, str]:
    """Mangled kernel names -> "file.cu: kernel<float>"."""
    reader = name_reader()
    assert reader is not None
    lines = subprocess.run([reader], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {name: _shortened(name, line) for name, line in zip(names, lines.splitlines(), strict=True)}


def _shortened(name: str, line: str) -> str:
    line = line.replace("(anonymous namespace)::", "").replace("ovseg::", "").removeprefix("void ")
    line = re.sub(r"\((?:int|unsigned int|long|bool)\)", "", line).replace("__nv_bfloat16", "bfloat16")
    line = line.replace("__half", "half")
    depth, kernel = 0, ""
    for letter in line:
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and not depth:
            break
        kernel += letter
    file = re.search(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+)_cu_[0-9a-f]{8}", name)
    return f"{file[1]}.cu: {kernel}" if file else kernel


def resources(library: Path) -> Table:
    """What each kernel uses on each architecture. Spilled registers lie on the stack."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    architecture = name = ""
    for line in _dump("--dump-resource-usage", library):
        if start := re.match(r"arch = (\w+)", line):
            architecture = start[1]
        elif start := re.match(r"\s*Function (\w+):", line):
            name = start[1]
        elif usage := dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)):
            numbers = {"registers": usage["REG"], "stack": usage["STACK"], "shared": usage["SHARED"]}
            assert usage["LOCAL"] == "0", name
            found.setdefault(name, {})[architecture] = {key: int(value) for key, value in numbers.items()}
    names = readable(list(found))
    assert len(set(names.values())) == len(names), "two kernels of one readable name"
    return {names[name]: found[name] for name in sorted(found, key=names.__getitem__)}


def instructions(library: Path) -> dict[str, dict[str, Counter[str]]]:
    """Kernel -> architecture -> how many instructions of tensor cores and of local memory it has, by name."""
    found: dict[str, dict[str, Counter[str]]] = {}
    architecture = ""
    counter: Counter[str] = Counter()
    for line in _dump("-sass", library):
        if line.startswith("arch = "):
            architecture = line.split()[-1]
        elif "Function : " in line:
            counter = found.setdefault(line.split()[-1], {}).setdefault(architecture, Counter())
        elif (operation := OPERATION.match(line)) and LOOKED_AT.match(operation[1]):
            counter[operation[1]] += 1
    names = readable(list(found))
    return {names[name]: found[name] for name in sorted(found, key=names.__getitem__)}


def _dump(option: str, library: Path) -> Iterator[str]:
    tool = disassembler()
    assert tool is not None
    with subprocess.Popen([tool, option, library], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    assert process.returncode == 0


if __name__ == "__main__":
    if not LIBRARY.exists() or disassembler() is None or name_reader() is None:
        sys.exit("this takes ovseg_fast/libovseg.so (`make venv`, with nvcc), cuobjdump (CUDA or triton) and c++filt")
    measured = resources(LIBRARY)
    for label, row in measured.items():
        for architecture, usage in row.items():
            print(f"{label:<64}{architecture:<8}" + "  ".join(f"{name} {value}" for name, value in usage.items()))
