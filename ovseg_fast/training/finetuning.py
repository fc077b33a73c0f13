"""Which parameters are trained: the fine-tuning policies of CLIP, and what each method trains beside it.

| policy | of CAT-Seg's CLIP | of Cascade-CLIP's prompted image encoder and text encoder |
|---|---|---|
| `attention` | query and value projection weights of both encoders | the same; prompts; per-layer norms, projections |
| `prompt` | (it has no prompts) | what has "prompt" in its name: prompts, their projection, their norm |
| `full` | everything | everything |
| `none` | nothing | nothing |

All else is always trained: CAT-Seg's aggregator and guidance convolutions, Cascade-CLIP's head. CAT-Seg was published
with `attention` (arXiv 2303.11797, section 3.5), Cascade-CLIP with `prompt` (arXiv 2406.00670, section 3.2): there the
per-layer norms and projections of the gathered blocks stay as they are, although no CLIP checkpoint holds them.
"""

from __future__ import annotations

import re

from ..models import CascadeCLIP, CATSeg

POLICIES = ("attention", "prompt", "full", "none")

_QUERY_OR_VALUE = re.compile(r"\.attn\.[qv]_proj_weight$")
_GATHER = ("image_encoder.norm_weight", "image_encoder.norm_bias", "image_encoder.proj_layers")
_ENCODERS = {CATSeg: ("clip.",), CascadeCLIP: ("image_encoder.", "text_encoder.")}


def published_policy(model: CATSeg | CascadeCLIP) -> str:
    """The policy that a model's method was published with, `"attention"` or `"prompt"`.

    Raises:
        TypeError: `model` is something else.
    """
    _check_model(model)
    return "attention" if isinstance(model, CATSeg) else "prompt"


def set_trainable(model: CATSeg | CascadeCLIP, policy: str | None = None) -> list[str]:
    """Let exactly the parameters of a policy require gradients.

    Some that do are never read, as published: queries and keys of CAT-Seg's last image block, whose attention is left
    out, and all of Cascade-CLIP's last decoder layers but their scores. They get no gradient, which distributed
    training has to be told (`find_unused_parameters=True`).

    Args:
        model: its parameters' `requires_grad` is set.
        policy: `"attention"`, `"prompt"`, `"full"` or `"none"`, see the table above; by default the method's own.

    Returns:
        Names of the trainable parameters, in the model's order.

    Raises:
        TypeError: `model` is something else.
        ValueError: there is no such policy, or it is `"prompt"` and the model has no prompts.
    """
    policy = published_policy(model) if policy is None else policy
    _check_model(model)
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}.")
    if policy == "prompt" and isinstance(model, CATSeg):
        raise ValueError(
            "policy 'prompt' trains visual prompts, which CATSeg does not have; use 'attention' or 'none'."
        )
    encoders = next(prefixes for kind, prefixes in _ENCODERS.items() if isinstance(model, kind))
    trainable = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(encoders) or _trains(policy, name)
        if parameter.requires_grad:
            trainable.append(name)
    return trainable


def _trains(policy: str, name: str) -> bool:
    """Whether a policy trains a parameter of the encoders."""
    if policy == "attention":
        return bool(_QUERY_OR_VALUE.search(name)) or "prompt" in name or name in _GATHER
    return policy == "full" or (policy == "prompt" and "prompt" in name)


def _check_model(model: object) -> None:
    if not isinstance(model, tuple(_ENCODERS)):
        raise TypeError(f"model must be a CATSeg or a CascadeCLIP, got {type(model).__name__}.")
