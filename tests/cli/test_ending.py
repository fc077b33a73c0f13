"""How commands end: signals, closed pipes, full disks, lack of memory, letters that the terminal lacks."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from PIL import Image

from ovseg_fast.cli import main, options
from ovseg_fast.cli.ending import Commands


class Full(io.StringIO):
    """A stream that takes nothing, such as a closed pipe or a full disk, as told by one of its methods."""

    def __init__(self, number: int, told_by: str) -> None:
        super().__init__()
        setattr(self, told_by, self.fail)
        self.number = number

    def fail(self, text: str = "") -> int:
        raise OSError(self.number, os.strerror(self.number))


def command(function) -> click.Group:
    """`ovseg-fast`, with one more command."""
    group = Commands("ovseg-fast")
    group.add_command(click.Command("work", callback=function))
    return group


def ends(group: click.Group, *arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as caught:
        group.main(list(arguments), prog_name="ovseg-fast")
    return int(caught.value.code or 0)


def stream(monkeypatch: pytest.MonkeyPatch, **settings: str) -> io.BytesIO:
    """What stdout receives, with these settings of the terminal."""
    received = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(received, **settings))
    return received


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8"])
@pytest.mark.parametrize("text", ["猫.png -> out", os.fsdecode(b"caf\xe9.png") if os.name == "posix" else "ü"])
def test_output_never_fails_for_a_letter(monkeypatch, encoding: str, text: str) -> None:
    received = stream(monkeypatch, encoding=encoding, errors="strict")
    assert ends(command(lambda: print(text)), "work") == 0
    assert received.getvalue().rstrip() == text.encode(encoding, errors="backslashreplace")


@pytest.mark.parametrize("told_by", ["write", "flush"])
@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EPIPE, ""), (errno.ENOSPC, f"ovseg-fast: cannot write the output: {os.strerror(errno.ENOSPC)}.\n")],
)
def test_output_that_cannot_be_written(monkeypatch, capsys, number: int, said: str, told_by: str) -> None:
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdout", Full(number, told_by))
    assert ends(command(lambda: print("result")), "work") == 1
    assert capsys.readouterr().err == said


def test_closed_streams_swallow_everything(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert ends(command(lambda: print("result", file=sys.stdout)), "work") == 0
    assert ends(command(lambda: print("result", file=sys.stderr)), "work") == 0


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_like_ctrl_c(capsys, name: str) -> None:
    number, cleaned = getattr(signal, name), []

    def work() -> None:
        try:
            with options.exit_on_error(options.FAILED):
                os.kill(os.getpid(), number)
                time.sleep(10)
        finally:
            cleaned.append(True)

    before = signal.getsignal(number)
    handler = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    signal.signal(number, handler)  # a shell starts jobs in the background with some signals ignored
    try:
        assert ends(command(work), "work") == 130
        assert capsys.readouterr().err == "ovseg-fast: stopped.\n" and cleaned
        assert signal.getsignal(number) is handler
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(number, before)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_was_swallowed_comes_again(monkeypatch, capsys, name: str) -> None:
    monkeypatch.setattr("ovseg_fast.cli.ending.AGAIN", 0.05)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def work() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(10)
        time.sleep(10)

    try:
        assert ends(command(work), "work") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "ovseg-fast: stopped.\n"


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_second_signal_while_it_ends_changes_nothing(monkeypatch, capsys) -> None:
    echo = click.echo

    def impatient(*arguments: object, **keywords: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        echo(*arguments, **keywords)

    monkeypatch.setattr(click, "echo", impatient)
    assert ends(command(lambda: os.kill(os.getpid(), signal.SIGTERM)), "work") == 130
    assert capsys.readouterr().err == "ovseg-fast: stopped.\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that inherit the handlers of signals")
def test_a_worker_process_ends_as_if_there_were_no_handler() -> None:
    found = []

    def work() -> None:
        ready, begun = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(begun, b"!")
                time.sleep(10)
            finally:
                os._exit(0)
        os.read(ready, 1)  # Python drops what comes while it forks
        os.kill(child, signal.SIGTERM)
        found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    assert ends(command(work), "work") == 0
    assert found == [-signal.SIGTERM]


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_what_a_signal_does_to_workers_is_not_reported(capsys) -> None:
    def work() -> None:
        with options.exit_on_error(options.FAILED):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            finally:
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    assert ends(command(work), "work") == 130
    assert capsys.readouterr().err == "ovseg-fast: stopped.\n"


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_the_handler_that_pytorch_has_for_workers_does_not_report_them_either(capsys) -> None:
    def report(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGCHLD)
            time.sleep(0.01)

    before = signal.signal(signal.SIGCHLD, report)
    try:
        assert ends(command(work), "work") == 130
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert capsys.readouterr().err == "ovseg-fast: stopped.\n"


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_an_ignored_signal_stays_ignored(monkeypatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert ends(command(lambda: os.kill(os.getpid(), signal.SIGHUP)), "work") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "there is not enough memory."),
        (MemoryError("there is not enough memory to read 'a.pth'."), "there is not enough memory to read 'a.pth'."),
        (RuntimeError(f"{ALLOCATOR} allocate 972000000 bytes. Error code 12 (Cannot allocate memory)"), "972,000,000"),
        (MemoryError("Unable to allocate 1.21 GiB for an array with shape (9, 9) and data type float32"), "1.21 GiB"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
            "on the GPU for another",
        ),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    ],
)
def test_a_lack_of_memory_is_one_line(capsys, error: Exception, said: str) -> None:
    def fails() -> None:
        raise error

    def expected() -> None:
        with options.exit_on_error(options.FAILED):
            raise error

    for function in (fails, expected):
        assert ends(command(function), "work") == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("ovseg-fast: ") and said in lines[0] and lines[0].endswith(".")


def test_a_fault_of_the_package_keeps_its_traceback() -> None:
    def work() -> None:
        with options.exit_on_error(options.FAILED):
            raise KeyError("fault")

    with pytest.raises(KeyError, match="fault"):
        command(work).main(["work"], prog_name="ovseg-fast")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.png"), "No such file or directory: 'a.png'."),
        (ValueError("first line.\nmissing: key"), "first line."),
        (RuntimeError("Error(s) in loading:\n\tMissing key: a."), "Error(s) in loading: Missing key: a."),
        (
            ValueError(
                "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback\n  at\nValueError: 'a.png' is."
            ),
            "'a.png' is.",
        ),
        (ValueError(), "ValueError"),
    ],
)
def test_the_sentence_of_an_error_is_complete(error: Exception, said: str) -> None:
    assert options.sentence(error) == said


def test_help_tells_the_exit_codes(capsys) -> None:
    assert ends(main, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for code, meaning in options.EXIT_CODES.items():
        assert f"{code}: {meaning}" in text


@pytest.mark.skipif(not hasattr(signal, "SIGTERM") or os.name != "posix", reason="signals are POSIX's")
def test_a_terminated_segmentation_leaves_nothing_half_written(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    for number in range(200):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png", compress_level=0)
    arguments = ["segment", "photos", "-c", "cat, sky", "-m", "catseg-tiny", "--weights", "random"]
    environment = os.environ | {"PYTHONPATH": str(Path(options.__file__).parents[2])}
    command = [sys.executable, "-m", "ovseg_fast", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        began = time.monotonic()
        while not list(tmp_path.glob("out/*")):
            assert process.poll() is None and time.monotonic() - began < 120
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert told.replace("\r", "\n").splitlines()[-1] == "ovseg-fast: stopped."
    assert not list(tmp_path.glob("out/.ovseg-*"))
    for path in tmp_path.glob("out/*.png"):
        with Image.open(path) as picture:
            picture.load()
