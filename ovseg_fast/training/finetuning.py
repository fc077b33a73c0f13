"""Which parameters are trained: the fine-tuning policies of the encoders, see `SegmentationModel.policies`.

| policy | of CAT-Seg's CLIP | of Cascade-CLIP's prompted image encoder and text encoder |
|---|---|---|
| `attention` | queries and values of both encoders (published) | the same; prompts; per-layer norms, projections |
| `prompt` | | prompts, their projection, their norm (published) |
| `full` | everything | everything |
| `none` | nothing | nothing |

Everything else is always trained: CAT-Seg's aggregator and guidance convolutions, Cascade-CLIP's head.
"""

from __future__ import annotations

import re

from ..models import SegmentationModel
from ..models.base import check_model


def set_trainable(model: SegmentationModel, policy: str | None = None) -> list[str]:
    """Let exactly the parameters of a policy, by default the published one, require gradients; returns their names.

    Some of these are never read, as published: queries and keys of CAT-Seg's last image block, whose attention is left
    out, and all of Cascade-CLIP's last decoder layers but their scores. They get no gradient, so distributed training
    needs `find_unused_parameters=True`.

    Raises:
        TypeError: `model` is something else. ValueError: the method has no such policy.
    """
    check_model(model)
    policy = model.policy if policy is None else policy
    patterns = {**model.policies, "full": "", "none": "(?!)"}
    if policy not in patterns:
        raise ValueError(f"policy of {type(model).__name__} must be one of {', '.join(patterns)}, got {policy!r}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(model.clip_prefixes) or bool(re.search(patterns[policy], name))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
