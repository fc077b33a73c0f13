"""The CUDA C++ kernels as a library that runs them on the CPU, see csrc/emulator; built when first needed."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # the virtual environment's cmake and ninja


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def build(sanitized: bool = False) -> Path:
    """Brings the library up to date, one process at a time; its path. `sanitized` sees wrong accesses, slowly."""
    folder = ROOT / "build" / ("sanitized" if sanitized else "emulated")
    options = ["-DOVSEG_EMULATED=ON", f"-DOVSEG_SANITIZE={'ON' if sanitized else 'OFF'}"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", ROOT / "csrc", "-B", folder, "-G", "Ninja", *options],
            ["cmake", "--build", folder],
        ):
            run = subprocess.run(command, env={**os.environ, "PATH": PATH}, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-3000:]
    return folder / "libovseg-emulated.so"
