"""Libraries for tests alone, built when first needed: the CUDA C++ kernels as one that runs them on the CPU, see
csrc/emulator, and the CPU kernels with a sanitizer, for AArch64, or by clang."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # the virtual environment's cmake and ninja
AARCH64 = "aarch64-linux-gnu"
AARCH64_COMPILER = f"{AARCH64}-g++"
AARCH64_SYSTEM = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
SANITIZERS = {"address": "libasan.so", "thread": "libtsan.so", "undefined": "libubsan.so"}


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def build(sanitized: bool = False) -> Path:
    """Brings the emulated library up to date; its path. `sanitized` sees wrong accesses, slowly."""
    folder = ROOT / "build" / ("sanitized" if sanitized else "emulated")
    make(ROOT / "csrc", folder, "-DOVSEG_EMULATED=ON", f"-DOVSEG_SANITIZE={'ON' if sanitized else 'OFF'}")
    return folder / "libovseg-emulated.so"


def build_cpu(sanitizer: str) -> Path:
    """Brings the CPU kernels with this sanitizer up to date; the library's path."""
    folder = ROOT / "build" / f"cpu-{sanitizer}"
    make(ROOT / "csrc" / "cpu", folder, f"-DOVSEG_SANITIZE={sanitizer}")
    return folder / "libovseg_cpu.so"


def build_cpu_by(compiler: str, folder: str, *options: str) -> Path:
    """Brings the CPU kernels by another compiler up to date, without a warning; the library's path."""
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler} to compile the CPU kernels with")
    path = ROOT / "build" / folder
    make(ROOT / "csrc" / "cpu", path, f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_CXX_FLAGS=-Werror", *options)
    return path / "libovseg_cpu.so"


def make(source: Path, folder: Path, *options: str) -> None:
    """Builds a project in a folder, one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", source, "-B", folder, "-G", "Ninja", *options],
            ["cmake", "--build", folder],
        ):
            run = subprocess.run(command, env={**os.environ, "PATH": PATH}, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-3000:]


def sanitizer(name: str) -> str:
    """The sanitizer's own library, which has to be loaded before Python's own memory is asked for."""
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    command = [str(compiler()), f"-print-file-name={SANITIZERS[name]}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"this compiler brings no {SANITIZERS[name]}")
    return found
