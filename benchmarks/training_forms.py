"""A training step of CAT-Seg ViT-B (loss, and gradients of all that the published policy trains; batch 1, 384 × 384) in
two forms, on the same random weights and inputs: literal (the published formula) and rewritten (this package).

As a program it prints one step's seconds and the peak memory above the weights in megabytes:

python benchmarks/training_forms.py {literal,rewritten} CLASSES
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from head_forms import peak_memory

from full_models import literal_catseg_loss, upstream_trainable
from ovseg_fast.checkpoints import to_upstream
from ovseg_fast.models import build
from ovseg_fast.training.finetuning import set_trainable

PROMPT_TOKENS = 10  # `A photo of a {} in the scene` has nine and the name's


class TrainingStep:
    """The model, one image, its labels and T prompts; `literal` and `rewritten` each do a step and return the loss."""

    def __init__(self, classes: int, preset: str = "catseg-vitb") -> None:
        torch.manual_seed(classes)
        self.model = build(preset).train()
        set_trainable(self.model)
        side = self.model.config.image_size
        self.images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
        blocks = torch.randint(-1, classes, (1, side // 16, side // 16))
        self.labels = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
        self.tokens = torch.zeros(classes, 1, 77, dtype=torch.int64)
        self.tokens[..., :PROMPT_TOKENS] = torch.randint(1, 49000, (classes, 1, PROMPT_TOKENS))
        self.tokens[..., 0], self.tokens[..., PROMPT_TOKENS] = 49406, 49407
        names = set(upstream_trainable(self.model))
        self.weights = {
            name: tensor.requires_grad_(name in names) if tensor.is_floating_point() else tensor
            for name, tensor in to_upstream(self.model).items()
        }

    def literal(self) -> Tensor:
        loss = literal_catseg_loss(self.model, self.weights, self.images.float(), self.labels, self.tokens)
        trained = [tensor for tensor in self.weights.values() if tensor.requires_grad]
        torch.autograd.grad(loss, trained, allow_unused=True)
        return loss.detach()

    def rewritten(self) -> Tensor:
        loss = self.model.loss(self.images, self.labels, self.model.encode_text(self.tokens))["loss"]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        torch.autograd.grad(loss, trained, allow_unused=True)
        return loss.detach()


def timed(run: Callable[[], Tensor]) -> tuple[float, float]:
    """Seconds and peak megabytes of one call."""
    start = time.perf_counter()
    megabytes = peak_memory(run)
    return time.perf_counter() - start, megabytes


if __name__ == "__main__":
    form, count = sys.argv[1], int(sys.argv[2])
    step = TrainingStep(count)
    print("{:.2f} {:.1f}".format(*timed(getattr(step, form))))
