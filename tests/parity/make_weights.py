"""Writes a checkpoint in upstream's format with made-up weights, those behind the golden numbers of this folder.

    python tests/parity/make_weights.py catseg-vitb made_up.pth

Nothing is trained: they stand in for released weights wherever only names, shapes and arithmetic count.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from ovseg_fast.files import write_whole

if __package__:
    from . import fill
else:  # run as a script
    import fill

# keys file and golden salt of each preset, and what its published training code wraps a state dict in
PRESETS = {
    "catseg-vitb": ("keys_catseg_vitb.json", "C", lambda state: {"model": state}),
    "catseg-vitl": ("keys_catseg_vitl.json", "D", lambda state: {"model": state}),
    "cascade-clip-vitb": ("keys_cascade_clip_vitb.json", "E", lambda state: {"state_dict": state, "meta": {}}),
}


def shapes(preset: str) -> dict[str, tuple[int, ...]]:
    """Upstream's names and shapes, derived buffers included, in its order."""
    keys = json.loads((Path(__file__).parent / PRESETS[preset][0]).read_text())
    return {name: tuple(shape) for name, shape in keys["state"].items()}


def state_dict(preset: str, salt: str | None = None) -> dict[str, torch.Tensor]:
    """Upstream's state dict, float32, by default with the salt of the golden numbers."""
    salt = PRESETS[preset][1] if salt is None else salt
    return {
        name: torch.from_numpy(derived(name, shape) if fill.is_buffer(name) else fill.fill(name, shape, salt))
        for name, shape in shapes(preset).items()
    }


def derived(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A buffer that follows from the configuration."""
    if name.endswith("empty_weight"):
        weight = np.ones(shape, np.float32)
        weight[-1] = 0.1
        return weight
    return shift_mask(windows=shape[0], window=round(shape[1] ** 0.5))


def shift_mask(windows: int, window: int) -> np.ndarray:
    """Swin's mask of a square map: (windows, window², window²), -100 between what only the shift made neighbours."""
    rows = round(windows**0.5)
    line = np.zeros(rows * window, int)  # three stretches along an axis
    line[-window:] = 1
    line[-(window // 2) :] = 2
    region = 3 * line[:, None] + line[None, :]
    tokens = region.reshape(rows, window, rows, window).transpose(0, 2, 1, 3).reshape(windows, window**2)
    return np.where(tokens[:, :, None] == tokens[:, None, :], 0, -100).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write made-up weights in upstream's format.")
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("path", type=Path, help="the file to write, as model.pth")
    parser.add_argument("--seed-salt", metavar="SALT", help="other weights for every salt [default: the goldens']")
    arguments = parser.parse_args()
    wrap = PRESETS[arguments.preset][2]
    state = state_dict(arguments.preset, arguments.seed_salt)
    try:
        write_whole(arguments.path, lambda temporary: torch.save(wrap(state), temporary))
    except OSError as error:
        parser.error(str(error))
    print(
        f"{arguments.path}: MADE-UP weights of {arguments.preset} in upstream's format. They are not trained; "
        "labels that they give mean nothing."
    )


if __name__ == "__main__":
    main()
