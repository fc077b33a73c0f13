"""The CPU kernels by other compilers than this installation's: GCC for AArch64."""

from __future__ import annotations

from native import emulated
from native.header import CPU_ABOUT_ITSELF
from native.test_cpu_library import apart
from native.test_library import tool
from ovseg_fast import native


def test_aarch64_library_is_compiled_without_a_warning() -> None:
    """And exports the same functions, and shares no code between instruction sets."""
    library = emulated.build_cpu_for_aarch64()
    assert "AArch64" in tool("readelf", "--file-header", library)
    symbols = tool("nm", "--dynamic", "--defined-only", library)
    assert {line.split()[-1] for line in symbols.splitlines()} == {*CPU_ABOUT_ITSELF, *native.CPU_FUNCTIONS}
    assert apart(library.parent)
