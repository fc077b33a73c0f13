"""Damaged files: each is refused in one sentence that names it, or read exactly as it was written.

    python benchmarks/torture/mutations.py [--states 3000] [--checkpoints 1500] [--seed N]

Evaluation states, checkpoints of training runs, own safetensors files and upstream's PyTorch files are damaged at
random: bits flipped, cut short, bytes inserted, blocks swapped or zeroed, anywhere or where the format's headers lie.
Prints what came of them, and exits with 1 if any gave an error of another kind or other numbers. PyTorch's format
before 1.6 has no checksum, so that flipped numbers cannot be told there; only errors count.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ovseg_fast import checkpoints
from ovseg_fast.checkpoints.tensors import bytes_of, write_safetensors
from ovseg_fast.evaluation.state import FORMAT, StateError
from ovseg_fast.evaluation.state import State as EvaluationState
from ovseg_fast.training.state import State as TrainingState

HEADER = 1000  # bytes at both ends, where headers and directories lie
READ, REFUSED, ERROR, OTHER = "read as written", "refused", "another error", "other numbers"


class Kind(NamedTuple):
    """A kind of file: its bytes, how it is read into something that `==` compares, and the error that refuses it."""

    name: str
    content: bytes
    read: Callable[[Path], Any]
    refusal: type[Exception]
    has_checksum: bool = True


def damage(content: bytes, chance: random.Random) -> bytes:
    """The content with one random change."""
    changed, size = bytearray(content), len(content)
    at = chance.choice(
        (chance.randrange(size), chance.randrange(HEADER) % size, size - 1 - chance.randrange(HEADER) % size)
    )
    length = chance.choice((1, 4, 16, 200, 3000))
    match chance.choice(("flip", "flip", "flip", "cut", "insert", "swap", "zero", "remove", "append")):
        case "flip":
            for place in {at, *(chance.randrange(size) for _ in range(chance.choice((0, 0, 1, 8))))}:
                changed[place] ^= 1 << chance.randrange(8)
        case "cut":
            del changed[at:]
        case "insert":
            changed[at:at] = chance.choice((bytes(length), chance.randbytes(length)))
        case "swap":
            other = chance.randrange(size)
            first, second = changed[at : at + length], changed[other : other + length]
            changed[at : at + len(second)], changed[other : other + len(first)] = second, first
        case "zero":
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        case "remove":
            del changed[at : at + length]
        case "append":
            changed += chance.randbytes(length)
    return bytes(changed)


def attempt(kind: Kind, path: Path, expected: Any) -> tuple[str, str]:
    """What comes of reading the file, and a few words on what should not be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = kind.read(path)
    except kind.refusal as error:
        text = str(error)
        whole = str(path) in text and text.endswith(".") and "\n" not in text
        return (REFUSED, "") if whole else (ERROR, f"not a sentence: {text!r}")
    except Exception as error:
        return ERROR, f"{type(error).__name__}: {error}"
    if found == expected or not kind.has_checksum:
        return READ, ""
    return OTHER, "read as other numbers"


def as_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    """Equal for equal tensors, NaN included."""
    return {name: (tensor.dtype, tuple(tensor.shape), bytes(bytes_of(tensor))) for name, tensor in tensors.items()}


def read_checkpoint(path: Path) -> Any:
    """As `checkpoints.load` does, which also asks for the classes of an own file."""
    state, _ = checkpoints.read(path)
    checkpoints.classes(path)
    return as_bytes(state)


def evaluation_state(folder: Path, chance: random.Random) -> Kind:
    numbers = np.random.default_rng(chance.randrange(2**31))
    fingerprint = {"state format": FORMAT, "weights": "0123456789abcdef", "mode": "slide", "dataset": "folder"}
    state = EvaluationState.new(fingerprint, classes=12, images=40)
    state.matrix += numbers.integers(0, 10**6, (12, 12))
    state.done[:25] = True
    state.stamps += numbers.integers(0, 10**18, (40, 4))
    state.seconds = 3.25
    names, stamps = [f"image {number}" for number in range(40)], state.stamps.copy()

    def read(path: Path) -> Any:
        found = EvaluationState.load(path, fingerprint, names, stamps)
        return found and [found.fingerprint, found.seconds, *(part.tolist() for part in (found.matrix, found.done))]

    state.save(folder / "state.npz")
    return Kind("evaluation state", (folder / "state.npz").read_bytes(), read, StateError)


def training_state(folder: Path, tensors: dict[str, torch.Tensor]) -> Kind:
    parts = {"state": {0: {"step": torch.tensor(7.0), "exp_avg": tensors["layer.weight"].square()}}, "param_groups": []}
    config = {"model": "catseg-tiny", "steps": 10, "data": {"dataset": "folder", "root": "data"}}
    TrainingState(7, tensors, parts, None, config, None, {"threads": 1}).save(folder / "checkpoint.pt")

    def read(path: Path) -> Any:
        found = TrainingState.load(path)
        moments = as_bytes(found.optimizer["state"][0])
        return found.step, as_bytes(found.model), moments, found.config, found.environment

    return Kind("training checkpoint", (folder / "checkpoint.pt").read_bytes(), read, ValueError)


def checkpoint_kinds(folder: Path) -> list[Kind]:
    tensors = {"layer.weight": torch.randn(60, 40), "layer.bias": torch.randn(60).half(), "count": torch.arange(7)}
    metadata = {"format": "ovseg-fast", "version": "1", "preset": "catseg-tiny", "classes": '["cat", "grass"]'}
    write_safetensors(folder / "own", tensors, metadata)
    training = {"iteration": np.int64(3), "meta": {"score": np.float64(0.4), "palette": np.zeros((3, 3), np.uint8)}}
    torch.save({"model": tensors} | training, folder / "zip")
    torch.save({"state_dict": tensors} | training, folder / "legacy", _use_new_zipfile_serialization=False)
    error = checkpoints.CheckpointError
    return [
        training_state(folder, tensors),
        Kind("own safetensors", (folder / "own").read_bytes(), read_checkpoint, error),
        Kind("PyTorch, zipped", (folder / "zip").read_bytes(), read_checkpoint, error),
        Kind("PyTorch before 1.6", (folder / "legacy").read_bytes(), read_checkpoint, error, has_checksum=False),
    ]


def main(states: int, checkpoints: int, seed: int | None = None) -> int:
    """Damage so many evaluation states, and so many checkpoints of all kinds; returns the exit code."""
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    chance = random.Random(seed)
    torch.manual_seed(seed)
    wrong = 0
    print(f"seed {seed}\n{'':<22}" + "".join(f"{title:>17}" for title in (READ, REFUSED, ERROR, OTHER)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = [(evaluation_state(folder, chance), states)]
        kinds += [(kind, -(-checkpoints // 4)) for kind in checkpoint_kinds(folder)]
        for kind, count in kinds:
            path = folder / f"damaged{'.npz' if kind.refusal is StateError else '.pth'}"
            path.write_bytes(kind.content)
            expected = kind.read(path)
            results: Counter[str] = Counter()
            examples = []
            for _ in range(count):
                content = damage(kind.content, chance)
                path.unlink()  # the earlier one may be mapped into the memory
                path.write_bytes(content)
                result, words = attempt(kind, path, expected)
                results[result] += 1
                if words:
                    examples.append(words)
            print(f"{kind.name:<22}" + "".join(f"{results[title]:>17}" for title in (READ, REFUSED, ERROR, OTHER)))
            print("".join(f"    {words[:200]}\n" for words in sorted(set(examples))[:5]), end="")
            wrong += results[ERROR] + results[OTHER]
    return int(wrong > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--states", type=int, default=3000)
    parser.add_argument("--checkpoints", type=int, default=1500)
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()
    sys.exit(main(arguments.states, arguments.checkpoints, arguments.seed))
