"""The work in an operator's call, whatever computes it: bytes, floating-point operations, and the floor in time.

Bytes: each input read once, each result written once. Operations: the multiplications and additions of the products,
after the exact rewrites (guidance projected once for all classes, padding classes as constants); norms, activations and
softmax, a few per cent, are left out. A backward counts twice the operations; it reads inputs and the results'
gradients once and writes the inputs' gradients once.

python benchmarks/work.py     prints predictions.json beside the floors of its ceilings
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ovseg_fast as ovs
from samples import Sample, arguments, select, tensors

PREDICTIONS = json.loads(Path(__file__).with_name("predictions.json").read_text())


def _cost_volume(named: dict[str, Any]) -> int:
    image, text = named["image"], named["text"]
    return 2 * image.numel() * text.shape[0] * text.shape[1]


def _cost_embedding(named: dict[str, Any]) -> int:
    batch, height, width, _ = named["image"].shape
    outputs = batch * named["text"].shape[0] * height * width
    return _cost_volume(named) + 2 * outputs * named["weight"].numel()


def _spatial_aggregation(named: dict[str, Any]) -> int:
    x, weight = named["x"], named["fc1_weight"]
    channels = x.shape[-1]
    tokens = x.numel() // channels
    keys = min(named["window"], *x.shape[2:4]) ** 2
    guidance = 4 * named["guidance"].numel() * channels
    return guidance + tokens * (8 * channels**2 + 4 * keys * channels + 4 * weight.numel())


def _class_aggregation(named: dict[str, Any]) -> int:
    x, weight = named["x"], named["fc1_weight"]
    batch, classes, height, width, channels = x.shape
    tokens = batch * classes * (height // named["pooling"]) * (width // named["pooling"])
    guidance = 4 * named["guidance"].numel() * channels
    linear = 4 * channels * channels // named["heads"]
    return guidance + tokens * (6 * channels**2 + linear + 4 * weight.numel())


def _upsampling_decoder(named: dict[str, Any]) -> int:
    x, out = named["x"], named["norm1_weight"].numel()
    pixels = 4 * x.numel() // x.shape[-1]
    return pixels * (2 * 4 * x.shape[-1] * out + 2 * 9 * out * out)


def _encoder_block(named: dict[str, Any]) -> int:
    x, weights = named["x"], named["fc1_weight"]
    batch, tokens, channels = x.shape
    attention = 0 if named.get("dense") else 4 * channels**2 + 4 * tokens * channels
    return batch * tokens * (4 * channels**2 + attention + 4 * weights.numel())


def _layer_gather(named: dict[str, Any]) -> int:
    rows = named["hidden"][0].shape[0] * named["patches"]
    layers, channels, width = named["projection"].shape
    return 2 * rows * layers * width * (channels + ("weights" in named))


def _gaussian_aggregation(named: dict[str, Any]) -> int:
    return 2 * named["features"].numel()


def _mask_scores(named: dict[str, Any]) -> int:
    queries, memory = named["queries"], named["memory"]
    width = queries.shape[-1]
    return 2 * width * (queries.numel() + memory.numel()) + 2 * queries.numel() * memory.shape[1]


def _mask_attention(named: dict[str, Any]) -> int:
    queries, memory = named["queries"], named["memory"]
    width = queries.shape[-1]
    return 4 * width * (queries.numel() + memory.numel()) + 4 * queries.numel() * memory.shape[1]


def _label_map(named: dict[str, Any]) -> int:
    """Four taps of two operations a resizing, about ten for a sigmoid: windows, whole map, output."""
    classes = named["logits"].shape[1]
    positions, *sizes = named["placement"]
    window, canvas, size = (height * width for height, width in sizes)
    windows = len(positions) * window
    return classes * (18 * windows + (26 * canvas if named.get("whole") is not None else 0) + 8 * size)


def _mask_losses(named: dict[str, Any]) -> int:
    """Four taps of two operations, and about twenty for the losses of a pixel."""
    return 28 * named["logits"].shape[1] * named["labels"].numel()


OPERATIONS: dict[str, Callable[[dict[str, Any]], int]] = {
    "class_aggregation": _class_aggregation,
    "cost_embedding": _cost_embedding,
    "cost_volume": _cost_volume,
    "encoder_block": _encoder_block,
    "gaussian_aggregation": _gaussian_aggregation,
    "label_map": _label_map,
    "layer_gather": _layer_gather,
    "mask_attention": _mask_attention,
    "mask_losses": _mask_losses,
    "mask_scores": _mask_scores,
    "score_map": _label_map,
    "spatial_aggregation": _spatial_aggregation,
    "top_labels": _label_map,
    "upsampling_decoder": _upsampling_decoder,
}


def work(row: Sample, call: Any, results: Any, backward: bool = False) -> tuple[int, int]:
    """(bytes, operations) of one call of `row` that gave `results`, forward or forward and backward together."""
    named = arguments(row.function, call)
    operations = OPERATIONS[row.function](named)
    inputs, outputs = (sum(t.numel() * t.element_size() for t in tensors(part)) for part in (call, results))
    if backward:
        return 3 * inputs + 2 * outputs, 3 * operations
    return inputs + outputs, operations


def floor_us(moved: int, operations: int, ceilings: dict[str, float]) -> float:
    """The least microseconds in which a GPU of these ceilings moves the bytes and does the operations."""
    return max(moved / ceilings["terabytes_per_second"], operations / ceilings["bfloat16_teraflops"]) / 1e6


def prediction(row: Sample) -> dict[str, Any] | None:
    """What is expected of a row, None for all rows but one of each operator."""
    expected = PREDICTIONS["operators"].get(row.function)
    return expected if expected and expected["row"] == row.name else None


def main() -> None:
    """Print each prediction of the forward pass with its bytes, operations and floor. Nothing is computed."""
    ceilings = PREDICTIONS["ceilings"]
    print(
        "| operator | row | MB | GFLOP | floor, µs | Triton, µs | CUDA, µs |", "|---|---|--:|--:|--:|--:|--:|", sep="\n"
    )
    for row in select("bench"):
        if expected := prediction(row):
            with FakeTensorMode(), torch.no_grad(), ovs.backend("torch"):
                call = row.build(torch.Generator(), torch.bfloat16)
                moved, operations = work(row, call, row.run(call))
            times = [f"{expected[name][0]}" if expected[name] else "" for name in ("triton", "cuda")]
            work_done = f"{moved / 1e6:.1f} | {operations / 1e9:.2f} | {floor_us(moved, operations, ceilings):.1f}"
            print(f"| `{row.function}` | {row.name} | {work_done} | {' | '.join(times)} |")


if __name__ == "__main__":
    main()
