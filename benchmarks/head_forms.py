"""The CAT-Seg-B head in its forms, on the same random weights and inputs: literal (the published formula), rewritten
(the PyTorch form), compile (torch.compile of that), triton and cuda (the kernels).

As a program it prints the peak memory of one form in megabytes:

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
import ovseg_fast as ovs
from ovseg_fast.checkpoints import to_upstream
from ovseg_fast.models import CATSeg, CATSegConfig, build

PREFIX = "sem_seg_head.predictor.transformer."
# A small encoder of the published widths: the head sees the published shapes, and little else is built.
CLIP = {
    "embed_dim": 512,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 384, "patch_size": 16, "width": 768, "layers": 9, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1},
}


class Head:
    """The CAT-Seg head with random weights and random inputs, as this package and as the literal form take them.

    Attributes: `model`; `image`, `text`, `appearance` its inputs; `weights` and `upstream` those of the literal form.
    """

    def __init__(self, classes: int, device: str, dtype: torch.dtype, tiny: bool) -> None:
        torch.manual_seed(classes)
        model = build("catseg-tiny") if tiny else CATSeg(CATSegConfig(clip=CLIP))
        for parameter in model.aggregator.parameters():
            if parameter.dim() == 1:  # biases, norms and padding start at zero or one; give every term a share
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        self.model = model.eval().to(device, dtype)
        side, width = model.map_size // 4, model.clip.visual.embed_dim
        image = torch.randn(1, side, side, width)
        text = torch.nn.functional.normalize(torch.randn(classes, 1, width), dim=-1)
        first, second = model.config.decoder_appearance
        maps = torch.randn(1, 2 * side, 2 * side, first), torch.randn(1, 4 * side, 4 * side, second)
        self.image, self.text, *self.appearance = (tensor.to(device, dtype) for tensor in (image, text, *maps))
        self.window, self.heads, self.pad_length = model.config.window, model.config.heads, model.config.pad_length
        self.weights = {
            name.removeprefix(PREFIX): tensor for name, tensor in to_upstream(model).items() if name.startswith(PREFIX)
        }
        self.upstream = [t.permute(0, 3, 1, 2).contiguous() for t in (self.image, *self.appearance)]

    def literal(self, pooling: int, weights: dict[str, Tensor] | None = None) -> Tensor:
        image, *maps = self.upstream
        sizes = {"pad_len": self.pad_length, "window": self.window, "heads": self.heads}
        return literal.catseg_head(weights or self.weights, image, self.text[None], *maps, pooling, **sizes)

    def package(self, pooling: int, backend: str, aggregator: Callable[..., Tensor] | None = None) -> Tensor:
        with ovs.backend(backend):
            return (aggregator or self.model.aggregator)(self.image, self.text, self.appearance, pooling)


def head_forms(
    classes: int,
    pooling: int = 2,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tiny: bool = False,
    compiled: bool = False,
) -> dict[str, Callable[[], Tensor]]:
    """Forms of inference, as functions without arguments that give logits (1, T, 96, 96)."""
    head = Head(classes, device, dtype, tiny)

    def inference(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return function()

        return run

    forms = {
        "literal": inference(lambda: head.literal(pooling)),
        "rewritten": inference(lambda: head.package(pooling, "torch")),
        "triton": inference(lambda: head.package(pooling, "triton")),
        "cuda": inference(lambda: head.package(pooling, "cuda")),
    }
    if compiled:
        optimised = torch.compile(head.model.aggregator)
        forms["compile"] = inference(lambda: head.package(pooling, "torch", optimised))
    return forms


def training_forms(
    classes: int, device: str = "cpu", dtype: torch.dtype = torch.float32, tiny: bool = False
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Forms of a training step of the head (loss on its logits, gradients of all its weights), class pooling 2."""
    head = Head(classes, device, dtype, tiny)
    parameters = list(head.model.aggregator.parameters())
    leaves = {name: tensor.detach().clone() for name, tensor in head.weights.items()}
    for tensor in leaves.values():
        tensor.requires_grad_(tensor.is_floating_point())
    trained = [tensor for tensor in leaves.values() if tensor.requires_grad]

    def step(logits: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
        loss = torch.nn.functional.softplus(logits.float()).mean()
        return torch.autograd.grad(loss, weights, allow_unused=True)

    return {
        "literal": lambda: step(head.literal(2, leaves), trained),
        "rewritten": lambda: step(head.package(2, "torch"), parameters),
        "triton": lambda: step(head.package(2, "triton"), parameters),
        "cuda": lambda: step(head.package(2, "cuda"), parameters),
    }


def peak_memory(run: Callable[[], Tensor]) -> float:
    """Largest rise of the process's resident memory during `run`, in megabytes (Linux)."""
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
