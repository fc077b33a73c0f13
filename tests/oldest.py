"""Runs tests with the oldest versions that pyproject.toml allows, in an environment of their own, `.venv/oldest`.

    python tests/oldest.py TEST ...

It holds the versions of constraints-oldest.txt and sees all else, torch above all, in the environment that runs this.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ROOT / "constraints-oldest.txt"
FOLDER = Path(sys.prefix) / "oldest"
PYTHON = FOLDER / "bin" / "python"


def build() -> None:
    """Make the environment, unless it is there as VERSIONS asks for."""
    done = FOLDER / VERSIONS.name
    if done.exists() and done.read_text() == VERSIONS.read_text():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
    inside = sysconfig.get_path("purelib", vars={"base": str(FOLDER), "platbase": str(FOLDER)})
    line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"  # after the environment's own packages
    Path(inside, "newest.pth").write_text(line)
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", VERSIONS]
    subprocess.run(pip, check=True)
    done.write_text(VERSIONS.read_text())


def main(tests: list[str]) -> int:
    if sys.version_info >= (3, 13):
        version = sys.version.split()[0]
        print(f"NOT RUN with the oldest versions: they have wheels for Python 3.10 to 3.12, this is {version}.")
        return 0
    build()
    return subprocess.run([PYTHON, "-m", "pytest", "-q", *tests], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
