"""The CAT-Seg-B head in both forms, on the same random weights and inputs.

Run as a program it reports the peak memory of one form in megabytes:

python benchmarks/head_forms.py {literal,rewritten} CLASSES
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import literal
from ovseg_fast.checkpoints import to_upstream
from ovseg_fast.models import CATSeg, CATSegConfig

PREFIX = "sem_seg_head.predictor.transformer."
# A one-layer encoder of the published widths: the head sees the same shapes, and nothing else is built.
CLIP = {
    "embed_dim": 512,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 384, "patch_size": 16, "width": 768, "layers": 9, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1},
}


def head_forms(classes: int, pooling: int = 2) -> dict[str, Callable[[], Tensor]]:
    """Both forms as functions without arguments that give logits (1, T, 96, 96)."""
    torch.manual_seed(classes)
    model = CATSeg(CATSegConfig(clip=CLIP)).eval()
    for parameter in model.aggregator.parameters():
        if parameter.dim() == 1:  # biases, norms and padding start at zero or one; give every term a share
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    weights = {
        name.removeprefix(PREFIX): tensor for name, tensor in to_upstream(model).items() if name.startswith(PREFIX)
    }
    image = torch.randn(1, 24, 24, 512)
    text = torch.nn.functional.normalize(torch.randn(classes, 1, 512), dim=-1)
    appearance = (torch.randn(1, 48, 48, 256), torch.randn(1, 96, 96, 128))
    upstream = [maps.permute(0, 3, 1, 2).contiguous() for maps in (image, *appearance)]
    return {
        "literal": lambda: literal.catseg_head(weights, upstream[0], text[None], *upstream[1:], pooling),
        "rewritten": lambda: model.aggregator(image, text, appearance, pooling),
    }


def peak_memory(run: Callable[[], Tensor]) -> float:
    """Megabytes by which the process's resident memory rises at most while `run` works (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


if __name__ == "__main__":
    form, count = sys.argv[1], int(sys.argv[2])
    with torch.no_grad():
        print(f"{peak_memory(head_forms(count)[form]):.1f}")
