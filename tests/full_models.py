"""The full-size models with the golden numbers' weights, and the goldens themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ovseg_fast as ovs
from goldens import DEVICE
from parity import fill

PARITY = Path(__file__).parent / "parity"
SALTS = {"catseg_vitb": "C", "catseg_vitl": "D", "cascade_clip": "E"}


def upstream_weights(keys_file: str, salt: str) -> dict[str, Tensor]:
    """Every parameter of a keys file under its upstream name, filled as the goldens' were."""
    state = json.loads((PARITY / keys_file).read_text())["state"]
    return {
        name: torch.from_numpy(np.array(fill.fill(name, shape, salt)))
        for name, shape in state.items()
        if not fill.is_buffer(name)
    }


def full_model(preset: str, keys_file: str, salt: str) -> torch.nn.Module:
    """A preset with the goldens' weights, in evaluation mode."""
    model = ovs.build(preset)
    ovs.checkpoints.load_upstream(model, upstream_weights(keys_file, salt))
    return model.eval().to(DEVICE)


class Goldens:
    """The stored tensors of one case."""

    def __init__(self, case: str) -> None:
        self.store = np.load(PARITY / f"{case}.npz")
        self.facts = json.loads((PARITY / f"{case}.json").read_text())
        self.salt = SALTS[case]

    def error(self, name: str, value: Tensor | np.ndarray) -> float:
        """Relative error over the stored positions."""
        return fill.rel_err(self.store, name, value.detach().cpu().numpy() if isinstance(value, Tensor) else value)

    def image(self, name: str, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        return fill.image(name, height, width, self.salt)

    def images(self, name: str, height: int, width: int) -> Tensor:
        """(1, 3, height, width) uint8."""
        return torch.from_numpy(self.image(name, height, width)).permute(2, 0, 1).unsqueeze(0).to(DEVICE)

    def tokens(self, count: int, name: str = "tokens") -> Tensor:
        """(count, 77) int64."""
        return torch.from_numpy(fill.tokens(count, self.salt, name)).to(DEVICE)
