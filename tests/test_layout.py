"""The promises of the folder layout: one operator, one name, the same places; arrows that run one way."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import bench_operators
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ovseg_fast"
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *ROOT.glob("docs/*.md")]
OPERATORS = sorted(path.stem for path in (PACKAGE / "ops").glob("[!_]*.py"))

# From the user down to the kernels; a module may import from its own level and from those further down.
LEVELS = (
    ("cli",),
    ("demo", "tiny"),
    ("segmenter", "training", "evaluation", "accelerate"),
    ("checkpoints",),
    ("models",),
    ("layers",),
    ("segmentation", "visualize", "images", "vocabulary", "data"),
    ("ops",),
    ("backends",),
    ("cuda", "cpu", "kernels"),
    ("native",),
    ("arguments", "compat", "files", "fonts", "weights"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def listed_files() -> list[Path]:
    """What git tracks; without a repository (an unpacked archive) what lies here."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0 and listing.stdout:
        return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    made = {".git", ".venv", "build", "__pycache__"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not made & {*path.relative_to(ROOT).parts}]


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def dotted_name(path: Path) -> str:
    """The name that a file is imported by."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "ovseg_fast")
    return ".".join(parts)


def imports(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, inside functions too; "from a import b" gives "a.b"."""
    package = dotted_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def part(module: str) -> str:
    """The part of the package that a full name belongs to: "ovseg_fast.ops.cost_volume" is of "ops"."""
    names = module.split(".")
    return names[1] if names[0] == "ovseg_fast" and len(names) > 1 else ""


def test_there_are_operators() -> None:
    assert {"cost_volume", "spatial_aggregation", "class_aggregation"} <= set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("place", ["tests/ops/test_{}.py", "tests/samples/{}.py", "tests/literal/{}.py"])
def test_operator_has_all_its_places(operator: str, place: str) -> None:
    assert (ROOT / place.format(operator)).is_file(), f"operator {operator} lacks {place.format(operator)}"


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_is_benchmarked(operator: str) -> None:
    """By its rows of the published size, which `bench_operators.py` times."""
    assert operator in {row.operator for row in bench_operators.ROWS}


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_file_defines_its_operator(operator: str) -> None:
    tree = ast.parse((PACKAGE / "ops" / f"{operator}.py").read_text())
    assert operator in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    "pattern",
    [
        "kernels/[!_]*.py",
        "ovseg_fast/cuda/[!_]*.py",
        "ovseg_fast/cpu/[!_]*.py",
        "tests/ops/test_*.py",
        "tests/samples/[!_]*.py",
    ],
)
def test_kernel_and_test_files_are_named_after_an_operator(pattern: str) -> None:
    """`X.py`, or `X_<part>.py` beside it."""
    names = {path.stem.removeprefix("test_") for path in ROOT.glob(pattern)}
    starts = tuple(f"{operator}_" for operator in OPERATORS)
    assert [name for name in names - set(OPERATORS) if not name.startswith(starts)] == []


CPU_SHARED = {"library", "operators", "pool"}  # sources of csrc/cpu that are of no operator


@pytest.mark.parametrize("pattern", ["csrc/*.cu", "csrc/cpu/*.cpp"])
def test_native_sources_are_named_after_an_operator(pattern: str) -> None:
    """`<operator>.cu`, or `<operator>_<part>.cu` beside it, such as its backward; likewise of a part that operators
    share, which is named after its file in ops/common."""
    sources = {path.stem for path in ROOT.glob(pattern)} - (CPU_SHARED if "/cpu/" in pattern else set())
    whole = (sources & set(OPERATORS)) | {path.stem for path in (PACKAGE / "ops" / "common").glob("*.py")}
    assert [name for name in sources - whole if not name.startswith(tuple(f"{operator}_" for operator in whole))] == []


@pytest.mark.parametrize(("folder", "pattern"), [("cuda", "csrc/*.cu"), ("cpu", "csrc/cpu/*.cpp")])
def test_native_sources_and_their_launchers_come_together(folder: str, pattern: str) -> None:
    launchers = {path.stem for path in (PACKAGE / folder).glob("[!_]*.py")}
    assert launchers and launchers == {path.stem for path in ROOT.glob(pattern)} & set(OPERATORS)


@pytest.mark.parametrize(
    "path",
    sorted(path for pattern in ("*.cu", "device/*", "cpu/*.cpp", "cpu/*.h") for path in ROOT.glob(f"csrc/{pattern}")),
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_native_sources_begin_with_what_they_compute_or_assume(path: Path) -> None:
    """Of a kernel the formula, of a header the layout in memory and lanes that it assumes."""
    text = path.read_text()
    comment = list(itertools.takewhile(lambda line: line.startswith(("//", "/*", " *")), text.splitlines()))
    assert comment and re.match(r"(//|/\*) [A-Z]", comment[0]), "begin with a comment"
    if path.suffix == ".h" or path.suffix == ".cuh":
        assert re.search(r"#pragma once|#ifndef \w+_H\n", text)
    elif path.stem not in CPU_SHARED:
        assert any(line.startswith("//     ") for line in comment), "state the formula, indented"


def test_native_sources_keep_to_120_columns() -> None:
    lines = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in listed_files()
        if path.is_relative_to(ROOT / "csrc") and path.suffix != ".md"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120
    }
    assert lines == set()


def test_device_headers_are_used_and_use_nothing_above_them() -> None:
    users = [*ROOT.glob("csrc/*.cu"), *ROOT.glob("csrc/device/*")]
    included = {Path(name).name for path in users for name in re.findall(r'#include "([^"]+)"', path.read_text())}
    assert {path.name for path in ROOT.glob("csrc/device/*")} <= included
    for path in ROOT.glob("csrc/device/*"):
        assert path.suffix in (".cuh", ".h")
        assert not [name for name in re.findall(r'#include "([^"]+)"', path.read_text()) if name.endswith(".cu")]


def test_only_the_platform_header_knows_the_emulator() -> None:
    """Elsewhere kernels are CUDA C++ as it is; what the emulator needs lies in csrc/emulator."""
    sources = [*ROOT.glob("csrc/*.cu"), *ROOT.glob("csrc/device/*")]
    emulation = re.compile(r'#include ".*emulator|emulator::|__CUDACC__')
    knowing = [path.name for path in sources if emulation.search(path.read_text())]
    assert knowing == ["platform.cuh"]


def test_operators_for_cpus_leave_the_standard_library_alone() -> None:
    """The linker keeps one copy of its templates and inline functions for all instruction sets, see csrc/cpu/isa.h."""
    allowed = {"immintrin.h", "stddef.h", "stdint.h", "string.h"}
    for path in [*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/cpu/*.h")]:
        if path.stem not in {"library", "pool"} or path.suffix == ".h":
            assert set(re.findall(r"#include <(.+)>", path.read_text())) <= allowed, path.name


def test_readme_names_every_operator_and_is_short() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [operator for operator in OPERATORS if f"`{operator}`" not in readme] == []
    assert len(readme.splitlines()) <= 130


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_a_document_lead_somewhere(path: Path) -> None:
    """Files and folders of the repository, and headings in them."""
    text = path.read_text()
    broken = []
    for link in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]:
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (heading and heading not in headings(target)):
            broken.append(link)
    assert broken == []


def headings(document: Path) -> set[str]:
    """The anchors of a Markdown file, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


def test_every_part_of_the_package_has_a_level() -> None:
    parts = {path.name.removesuffix(".py") for path in PACKAGE.glob("[!_.]*") if path.suffix in ("", ".py")}
    assert parts <= set(LEVEL), f"give {sorted(parts - set(LEVEL))} a level in LEVELS"


@pytest.mark.parametrize("path", python_files("ovseg_fast", "kernels"), ids=dotted_name)
def test_imports_run_one_way(path: Path) -> None:
    own = part(dotted_name(path))
    if own in ("__init__", "__main__"):  # the front doors: parts of every level, handed out lazily
        return
    wrong = [name for name in imports(path) if part(name) in LEVEL and LEVEL[part(name)] < LEVEL[own]]
    assert wrong == [], f"{own} must not import from the levels above it"


def test_nothing_outside_models_asks_which_method_a_model_is() -> None:
    name = r"[\"'](cat-seg|cascade-clip|catseg-\w+)"
    asks = re.compile(rf"isinstance\(.*(CATSeg|CascadeCLIP)|[=!]= ?{name}|{name}[\"'] ?[=!]=")
    found = [
        f"{dotted_name(path)}:{number}"
        for path in python_files("ovseg_fast")
        if part(dotted_name(path)) != "models"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if asks.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("path", python_files("kernels"), ids=dotted_name)
def test_kernels_import_nothing_of_the_package_but_kernels(path: Path) -> None:
    assert [name for name in imports(path) if name.startswith("ovseg_fast") and part(name) != "kernels"] == []


def test_kernels_are_imported_by_their_installed_name_only() -> None:
    users = python_files("ovseg_fast", "kernels", "tests", "benchmarks")
    wrong = [dotted_name(path) for path in users for name in imports(path) if name.split(".")[0] == "kernels"]
    assert wrong == [], "`import kernels` gives a second copy of every module; import ovseg_fast.kernels"


def test_package_imports_nothing_of_tests_and_benchmarks() -> None:
    outside = {
        "tests",
        "benchmarks",
        "literal",
        "samples",
        "layouts",
        "tolerances",
        "parity",
        "pytest",
        "hypothesis",
    }
    wrong = [
        (dotted_name(path), name)
        for path in python_files("ovseg_fast", "kernels")
        for name in imports(path)
        if name.split(".")[0] in outside
    ]
    assert wrong == []


def test_no_file_names_a_machine_path() -> None:
    machine_path = re.compile(r"(?<![\w.])/((work|farm|root)[./]|(home|Users|tmp)/\w)")
    found = []
    for path in listed_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            if machine_path.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []
