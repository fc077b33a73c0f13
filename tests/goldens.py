"""Reader of `tests/parity`: stored numbers, the weights behind them, and what those are called in the operators."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ovseg_fast import backends
from parity import fill
from tolerances import GOLDEN_OPERATOR_GRADIENT, GOLDEN_OUTPUT, ZERO_GRADIENT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # goldens are compared where the operators would run
PARITY = Path(__file__).parent / "parity"
# Softmax takes no notice of these biases, so their gradients are nothing but rounding.
CANCELLED = (".attn.k.bias", "layers.0.multihead_attn.k.bias", "layers.1.multihead_attn.k.bias")
SALTS = {"catseg_ops": "A", "catseg_aggregator": "B", "catseg_vitb": "C", "catseg_vitl": "D", "cascade_clip": "E"}


class Golden:
    """Stored numbers of one case.

    Attributes:
        store: the arrays as `parity.fill` packs them; facts: what the JSON beside them holds; salt: of its weights and
            inputs.
    """

    def __init__(self, case: str) -> None:
        with np.load(PARITY / f"{case}.npz") as store:
            self.store = dict(store)
        self.facts: dict[str, Any] = json.loads((PARITY / f"{case}.json").read_text())
        self.salt = SALTS[case]

    def __contains__(self, name: str) -> bool:
        return name in self.store or f"{name}.val" in self.store

    def error(self, name: str, value: Tensor | np.ndarray) -> float:
        """Relative error of `value` over the stored positions of `name`."""
        return fill.rel_err(self.store, name, value.detach().cpu().numpy() if isinstance(value, Tensor) else value)

    def agreement(self, name: str, labels: Tensor | np.ndarray) -> float:
        """Share of the stored positions at which the labels are the stored ones."""
        return float((np.asarray(labels).reshape(-1)[self.store[f"{name}.idx"]] == self.store[f"{name}.val"]).mean())

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix` in the names that start with it."""
        return [name[len(prefix) :] for name in fill.names(self.store) if name.startswith(prefix)]

    def randn(self, name: str, shape: tuple[int, ...] | list[int]) -> Tensor:
        return torch.from_numpy(fill.randn(name, shape, self.salt)).to(DEVICE)

    def image(self, name: str, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        return fill.image(name, height, width, self.salt)

    def images(self, name: str, height: int, width: int) -> Tensor:
        """(1, 3, height, width) uint8."""
        return torch.from_numpy(self.image(name, height, width)).permute(2, 0, 1).unsqueeze(0).to(DEVICE)

    def tokens(self, count: int, name: str = "tokens") -> Tensor:
        """(count, 77) int64."""
        return torch.from_numpy(fill.tokens(count, self.salt, name)).to(DEVICE)

    def assert_summaries(
        self,
        name: str,
        gradients: Mapping[str, Tensor | None],
        limit: float,
        projected: Mapping[str, Tensor | None] | None = None,
    ) -> None:
        """Check norm and random projection of every gradient in `facts[name]`, to a relative error.

        `gradients` come by published names and in published shapes; `projected`, by default the same, are projected.
        """
        summaries = self.facts[name]
        assert not [other for other in summaries["grad_none"] if gradients.get(other) is not None]
        for parameter, norm in summaries["grad_norm"].items():
            gradient = gradients[parameter]
            if norm == 0:  # what is never read may have zeros there and none here
                assert gradient is None or not gradient.any(), parameter
                continue
            assert gradient is not None, parameter
            if parameter.endswith(CANCELLED):
                of_weight = gradients[parameter.replace("bias", "weight")]
                assert of_weight is not None
                assert gradient.norm() <= ZERO_GRADIENT * of_weight.norm(), parameter
                continue
            gradient = gradient.double()
            assert abs(float(gradient.norm()) - norm) <= limit * norm, parameter
            direction = self.randn(f"dot.{parameter}", tuple(gradient.shape)).double()
            if projected is not None:
                gradient = projected[parameter]
                assert gradient is not None, parameter
            projection = float((gradient.double() * direction).sum())
            assert abs(projection - summaries["grad_dot"][parameter]) <= limit * norm, parameter

    def assert_sampled(self, prefix: str, gradients: Mapping[str, Tensor | None], limit: float) -> None:
        """Check the gradients of which some positions are stored, as `prefix` and the published name."""
        errors = {
            name: self.error(prefix + name, gradient)
            for name, gradient in gradients.items()
            if gradient is not None and f"{prefix}{name}.stat" in self.store
        }
        assert errors and all(error <= limit for error in errors.values()), errors

    def leaves(self, op: str) -> dict[str, Tensor]:
        """Inputs, called `in.<name>`, and weights of an operation of `catseg_ops`, all in upstream's layout."""
        prompts = 3 if op.endswith("p3") else 1
        inputs = self.facts["ops"][op]["inputs"]
        leaves = {f"in.{name}": self.randn(f"{op}.in.{name}", shape) for name, shape in inputs.items()}
        leaves |= aggregator_weights(self.salt, prompts)
        return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


@cache
def golden(case: str) -> Golden:
    return Golden(case)


@cache
def shapes(keys: str) -> dict[str, list[int]]:
    """Shape of everything in a model's published checkpoint."""
    return json.loads((PARITY / f"keys_{keys}.json").read_text())["state"]


def weight(name: str, shape: tuple[int, ...] | list[int], salt: str) -> Tensor:
    # np.array: a scalar comes as a numpy number
    return torch.from_numpy(np.array(fill.fill(name, shape, salt))).to(DEVICE)


def filled(keys: str, prefix: str, salt: str, *, full_names: bool = True) -> dict[str, Tensor]:
    """All parameters below `prefix`, keyed by the rest of their names and filled by the full name or by that rest."""
    weights = {}
    for full, shape in shapes(keys).items():
        if full.startswith(prefix) and not fill.is_buffer(full):
            short = full.removeprefix(prefix)
            weights[short] = weight(full if full_names else short, shape, salt)
    assert weights, f"{keys} has nothing below {prefix}"
    return weights


def aggregator_weights(salt: str, prompts: int = 1) -> dict[str, Tensor]:
    """CAT-Seg's aggregator as `catseg_ops` and `catseg_aggregator` use it: alone, so its names have no prefix."""
    weights = filled("catseg_vitb", "sem_seg_head.predictor.transformer.", salt, full_names=False)
    weights["conv1.weight"] = weight("conv1.weight", (128, prompts, 7, 7), salt)
    return weights


class TieBreakingReLU:
    """ReLU that counts inputs which are zero within rounding, and takes the chosen ones to lie on the other side.

    ReLU has no derivative at 0: where rounding decides the side of an input, either gradient is right.
    """

    TIE = 3e-6  # what 128 products of order 1 leave of rounding in float32
    MOVES = 5e-3  # the most that one was seen to move a gradient by (4.7e-3, in the decoder), rounded up

    def __init__(self, flipped: tuple[int, ...] = ()) -> None:
        self.flipped, self.count = flipped, 0
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        ties = (x.detach().abs() < self.TIE).flatten().nonzero().flatten()
        gate = (x.detach() > 0).contiguous()
        for position in ties.tolist():
            gate.view(-1)[position] ^= self.count in self.flipped
            self.count += 1
        out = x * gate
        if out.requires_grad:
            out.retain_grad()
        self.outputs.append((out, ties))
        return out

    def that_matter(self) -> list[int]:
        """Numbers of the ties that have a gradient to stop or let through; those of padded classes have none."""
        first, found = 0, []
        for out, ties in self.outputs:
            if out.grad is not None:
                found += [first + int(tie) for tie in out.grad.flatten()[ties].nonzero()]
            first += len(ties)
        return found


def assert_gradients(
    op: str, function: Callable[[Mapping[str, Tensor]], Tensor], output: float = GOLDEN_OUTPUT
) -> None:
    """Check an operation of `catseg_ops` and every gradient stored of it.

    `function` takes its inputs, called `in.<name>`, and weights by upstream's names and gives the result in upstream's
    layout, to a relative error of `output`.
    """
    if backends.requested() == "cpu":  # its kernels have no gradients
        case = golden("catseg_ops")
        with torch.no_grad():
            assert case.error(f"{op}.out", function(case.leaves(op))) <= output
        return
    relu = TieBreakingReLU()
    errors = gradient_errors(op, function, relu, output)
    if backends.requested() == "triton":
        # A kernel's ReLU cannot be told a side: where the PyTorch form meets ties, one of them may move the gradients.
        with backends.backend("torch"):
            gradient_errors(op, function, relu, output)
        assert max(errors.values()) <= (relu.MOVES if relu.count else GOLDEN_OPERATOR_GRADIENT), errors
        return
    if GOLDEN_OPERATOR_GRADIENT < max(errors.values()) <= 2 * relu.MOVES:
        ties = relu.that_matter()
        choices = chain(combinations(ties, 1), combinations(ties, 2))
        tried = (gradient_errors(op, function, TieBreakingReLU(flipped), output) for flipped in choices)
        errors = next((other for other in tried if max(other.values()) <= GOLDEN_OPERATOR_GRADIENT), errors)
    assert max(errors.values()) <= GOLDEN_OPERATOR_GRADIENT, errors


def gradient_errors(
    op: str, function: Callable[[Mapping[str, Tensor]], Tensor], relu: TieBreakingReLU, output: float
) -> dict[str, float]:
    """Relative errors of the stored gradients. The output, and gradients that are noise only, are checked at once."""
    case = golden("catseg_ops")
    leaves = case.leaves(op)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "relu", relu)
        patch.setattr("ovseg_fast.layers.recompute.recomputes", lambda x: False)  # relu counts, and once only
        out = function(leaves)
    assert case.error(f"{op}.out", out) <= output
    (out * case.randn(f"{op}.cot", tuple(out.shape))).sum().backward()
    stored = case.names(f"{op}.grad.")
    assert {name for name in leaves if name.startswith("in.")} <= set(stored) <= set(leaves)
    errors = {}
    for name in stored:
        gradient = leaves[name].grad
        assert gradient is not None, name
        if name.endswith(CANCELLED):
            of_weight = leaves[name.replace("bias", "weight")].grad
            assert of_weight is not None
            assert gradient.norm() <= ZERO_GRADIENT * of_weight.norm(), name
        else:
            errors[name] = case.error(f"{op}.grad.{name}", gradient)
    return errors


# --- names: of an operator's parameter -> of the published checkpoint's entry ---


def _pairs(**modules: str) -> dict[str, str]:
    return {f"{ours}_{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in ("weight", "bias")}


SPATIAL = _pairs(
    norm1="norm1",
    q="attn.q",
    k="attn.k",
    v="attn.v",
    proj="attn.proj",
    norm2="norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
)
CLASSES = {
    **_pairs(norm1="norm1", q="attention.q", k="attention.k", v="attention.v", norm2="norm2", fc1="MLP.0", fc2="MLP.2"),
    "padding_token": "padding_tokens",
    "padding_guidance": "padding_guidance",
}
STAGE = {
    "up_weight": "up.weight",
    "up_bias": "up.bias",
    "conv1_weight": "conv.double_conv.0.weight",
    "norm1_weight": "conv.double_conv.1.weight",
    "norm1_bias": "conv.double_conv.1.bias",
    "conv2_weight": "conv.double_conv.3.weight",
    "norm2_weight": "conv.double_conv.4.weight",
    "norm2_bias": "conv.double_conv.4.bias",
}
ATTENTION = _pairs(q="q", k="k", v="v", proj="proj")


def to_operator(names: Mapping[str, str], weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Parameters of an operator from published names; the padding class loses its two leading axes of size 1."""
    ours = {}
    for name, theirs in names.items():
        tensor = weights[prefix + theirs]
        ours[name] = tensor[0, 0] if name.startswith("padding_") else tensor
    return ours


def to_published(names: Mapping[str, str], arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back, from an operator's arguments to what the literal forms take."""
    return {
        theirs: arguments[name][None, None] if name.startswith("padding_") else arguments[name]
        for name, theirs in names.items()
        if name in arguments
    }


# --- names: of the published checkpoints -> of the layers' state dicts ---

Rules = tuple[tuple[str, str], ...]

AGGREGATOR_RULES: Rules = (
    (r"^conv1\.", "cost_embedding."),
    (r"^guidance_projection\.0\.", "appearance_projection."),
    (r"^text_guidance_projection\.0\.", "text_projection."),
    (r"^decoder_guidance_projection\.(\d)\.0\.", r"decoder.guidance_projections.\1."),
    (r"^decoder1\.", "decoder.stages.0."),
    (r"^decoder2\.", "decoder.stages.1."),
    (r"^head\.", "decoder.head."),
    (r"\.conv\.double_conv\.0\.", ".conv1."),
    (r"\.conv\.double_conv\.1\.", ".norm1."),
    (r"\.conv\.double_conv\.3\.", ".conv2."),
    (r"\.conv\.double_conv\.4\.", ".norm2."),
    (r"\.swin_block\.block_1\.", ".spatial.blocks.0."),
    (r"\.swin_block\.block_2\.", ".spatial.blocks.1."),
    (r"\.swin_block\.", ".spatial."),
    (r"\.attention\.attention\.", ".classes."),
    (r"\.attention\.MLP\.0\.", ".classes.fc1."),
    (r"\.attention\.MLP\.2\.", ".classes.fc2."),
    (r"\.attention\.padding_tokens$", ".classes.padding_token"),
    (r"\.attention\.", ".classes."),
    (r"\.(attn|mlp)\.", "."),
)
CASCADE_RULES: Rules = (
    (r"^weights_s1$", "stage_weights.0"),
    (r"^weights_s2$", "stage_weights.1"),
    (r"^q_projs\.", "query_projections."),
    (r"^cascade_decoders\.", "decoders."),
    (r"\.multihead_attn\.", "."),
    (r"\.self_attn\.in_proj_", ".unused.self_attn_in_proj_"),
    (r"\.self_attn\.out_proj\.", ".unused.self_attn_out_proj_"),
    (r"\.norm1\.", ".unused.norm1_"),
)


def layer_name(rules: Rules, name: str) -> str:
    """Name in our layer's state dict of a published entry."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def layer_state(rules: Rules, weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """State of the layer `prefix` (our name, with its dot) from published weights, with their gradient's way back."""
    renamed = {layer_name(rules, name): weight for name, weight in weights.items() if not name.startswith("in.")}
    return {
        name.removeprefix(prefix): weight[0, 0] if ".padding_" in name else weight
        for name, weight in renamed.items()
        if name.startswith(prefix)
    }


def published_state(rules: Rules, names: Iterable[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: what the literal forms take, from a layer of any size; `names` are those of a published model."""
    ours = {name: layer_name(rules, name) for name in names}
    weights = {name: state[own] for name, own in ours.items() if own in state}
    assert len(weights) == len(state), sorted(set(state) - set(ours.values()))
    return {name: weight[None, None] if ".padding_" in name else weight for name, weight in weights.items()}


def cascade_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of `head_eval` in our layout: features (7, 2, S, E), global embeddings (2, E), text (20, E)."""

    def unit(name: str, *shape: int) -> Tensor:
        return torch.from_numpy(fill.unit(fill.randn(f"head.in.{name}", shape, "E"), 1)).to(DEVICE)

    features = torch.stack([unit(f"feat{i}", 2, 512, 32, 32).flatten(2).transpose(1, 2) for i in range(7)])
    return features, unit("global", 2, 512), unit("text", 20, 512)


def cascade_queries(weights: Mapping[str, Tensor], stage: int) -> Tensor:
    """The queries (2, 20, E) of a stage's first layer in `head_eval`."""
    _, image, text = cascade_inputs()
    relation = torch.cat([image[:, None] * text, text.expand(2, -1, -1)], -1)
    return F.linear(relation, weights[f"q_projs.{stage}.weight"], weights[f"q_projs.{stage}.bias"])
