"""What a process of a distributed loss does, in a module that a new process finds by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

import ovseg_fast as ovs


def loss_of_one(
    rank: int, store: Path, state: dict[str, Tensor], images: Tensor, labels: Tensor, text: Tensor, results: Any
) -> None:
    """Every second image is this process's; its losses go into `results[rank]`."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = ovs.build("cascade-clip-tiny").double().eval()
    model.load_state_dict(state)
    with torch.no_grad():
        losses = model.loss(images[rank::2], labels[rank::2], text)
    results[rank] = {name: float(loss) for name, loss in losses.items()}
    distributed.destroy_process_group()
