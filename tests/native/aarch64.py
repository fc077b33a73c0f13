"""Runs the CPU kernels for AArch64 on an emulated machine, in place of this machine's own."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from native import emulated
from ovseg_fast import native

EMULATOR = ("qemu-aarch64-static", "qemu-aarch64")
SYSTEM = f"/usr/{emulated.AARCH64}"  # the libraries that come with the cross compiler
SECONDS = 300  # after which a test's process hangs
THREADS = 3
GAP = 64  # bytes of NaN, of either dtype, around every tensor


def build_caller(folder: Path) -> Path:
    """Compiles calls.cpp for AArch64."""
    options = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{emulated.ROOT / 'csrc'}")
    source, caller = Path(__file__).with_name("calls.cpp"), folder / "calls"
    subprocess.run([emulated.AARCH64_COMPILER, *options, source, "-o", caller], check=True)
    return caller


class Memory:
    """The memory of one call as the other machine has it at `start`."""

    def __init__(self, start: int) -> None:
        self.start, self.content = start, bytearray()
        self.storages: dict[int, tuple[torch.UntypedStorage, int]] = {}  # by where they lie here; where they lie there

    def add(self, data: bytes, like: int = 0) -> int:
        """The address of a copy of these bytes, aligned like the address `like`."""
        self.content += b"\xff" * (GAP + (like - len(self.content)) % 64)
        self.content += data
        return self.start + len(self.content) - len(data)

    def word(self, argument: Any) -> Any:
        """An argument as the other machine takes it: tensors and arrays are copied, with all of their storages."""
        if isinstance(argument, Tensor):
            storage = argument.untyped_storage()
            here = storage.data_ptr()
            if here not in self.storages:
                there = self.add(ctypes.string_at(here, storage.nbytes()), here)
                self.storages[here] = storage, there
            return self.storages[here][1] + argument.data_ptr() - here
        if isinstance(argument, (list, tuple)):
            return self.add(struct.pack(f"<{len(argument)}q", *map(self.word, argument)))
        if isinstance(argument, ctypes.Array):
            return self.add(bytes(argument))
        return 0 if argument is None else argument

    def take_back(self, content: bytes) -> None:
        """Brings what the call wrote into the tensors; it may have written nothing else."""
        for here, (storage, there) in self.storages.items():
            place = slice(there - self.start, there - self.start + storage.nbytes())
            self.content[place] = content[place]
            ctypes.memmove(here, content[place], storage.nbytes())
        assert self.content == content, "it wrote beside its tensors"


class Machine:
    """A process on an emulated machine that holds the library."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.called = process, set[str]()
        (self.start,) = struct.unpack("<q", self.read(8))

    def read(self, size: int) -> bytes:
        data = self.process.stdout.read(size)
        assert len(data) == size, f"the emulated process ended with {self.process.wait()}"
        return data

    def call(self, name: str, *arguments: Any, kind: str) -> None:
        """In place of `native.call`."""
        assert kind == "cpu"
        memory = Memory(self.start)
        words, types = [memory.word(argument) for argument in arguments], native.CPU_FUNCTIONS[name]
        if issubclass(types[0], ctypes.Structure):
            words = [memory.add(bytes(types[0](*words)))]
        dtype = next(argument.dtype for argument in arguments if isinstance(argument, Tensor))
        words += [native.DTYPE_CODES[dtype], THREADS, 0]
        memory.add(b"")
        codes = "".join("d" if kind is native.REAL else "q" for kind in types)
        size = len(memory.content)
        self.process.stdin.write(struct.pack(f"<64sqq{codes}", name.encode(), len(types), size, *words))
        self.process.stdin.write(memory.content)
        self.process.stdin.flush()
        (error,) = struct.unpack("<q", self.read(8))
        memory.take_back(self.read(size))
        assert error == 0
        self.called.add(name)


@contextmanager
def machine(caller: Path, library: Path) -> Iterator[Machine]:
    emulator = next(filter(None, map(shutil.which, EMULATOR)), None)
    if emulator is None:
        pytest.skip(f"there is no {EMULATOR[0]} to run code for AArch64 with")
    command = [emulator, "-L", SYSTEM, caller, library]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            yield Machine(process)
        finally:
            timer.cancel()
            process.kill()
