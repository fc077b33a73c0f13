"""The command line: one file a command, `main` puts them together."""

from .main import main as main
