"""What upstream's released checkpoints call each parameter, and how they store it.

A rule renames: in its left side `#` is a number, `*` is anything and `(a|b)` a choice; `{0}`, `{1}`, ... on its right
side are what these matched. The first rule that matches a name decides. Where the layouts differ by more than a name:

- several of our tensors with one upstream name (q, k and v projections of Cascade-CLIP) are joined along dimension 0,
  in the order in which the model has them;
- `{row}` on the right side makes one upstream tensor of each row of ours (Cascade-CLIP's per-layer norms);
- `leading_ones` dimensions of size 1 stand before our shape upstream (padding class, prompts).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Rule(NamedTuple):
    ours: str
    upstream: str
    leading_ones: int = 0


def _under(prefix: str, *rules: tuple[str, str] | tuple[str, str, int]) -> list[Rule]:
    """Rules whose upstream names begin with `prefix`."""
    return [Rule(ours, prefix + upstream, *rest) for ours, upstream, *rest in rules]


CATSEG_RULES = [
    *_under(
        "sem_seg_head.predictor.clip_model.",
        ("clip.visual.*", "visual.{0}"),
        ("clip.text.*", "{0}"),
        ("clip.logit_scale", "logit_scale"),
    ),
    *_under(
        "sem_seg_head.predictor.transformer.",
        ("aggregator.cost_embedding.*", "conv1.{0}"),
        ("aggregator.appearance_projection.*", "guidance_projection.0.{0}"),
        ("aggregator.text_projection.*", "text_guidance_projection.0.{0}"),
        ("aggregator.decoder.guidance_projections.#.*", "decoder_guidance_projection.{0}.0.{1}"),
        ("aggregator.decoder.head.*", "head.{0}"),
    ),
    *_under(
        "sem_seg_head.predictor.transformer.layers.",
        ("aggregator.layers.#.spatial.guidance_norm.*", "{0}.swin_block.guidance_norm.{1}"),
        ("aggregator.layers.#.spatial.blocks.0.(norm1|norm2).*", "{0}.swin_block.block_1.{1}.{2}"),
        ("aggregator.layers.#.spatial.blocks.0.(q|k|v|proj).*", "{0}.swin_block.block_1.attn.{1}.{2}"),
        ("aggregator.layers.#.spatial.blocks.0.(fc1|fc2).*", "{0}.swin_block.block_1.mlp.{1}.{2}"),
        ("aggregator.layers.#.spatial.blocks.1.(norm1|norm2).*", "{0}.swin_block.block_2.{1}.{2}"),
        ("aggregator.layers.#.spatial.blocks.1.(q|k|v|proj).*", "{0}.swin_block.block_2.attn.{1}.{2}"),
        ("aggregator.layers.#.spatial.blocks.1.(fc1|fc2).*", "{0}.swin_block.block_2.mlp.{1}.{2}"),
        ("aggregator.layers.#.classes.(norm1|norm2).*", "{0}.attention.{1}.{2}"),
        ("aggregator.layers.#.classes.(q|k|v).*", "{0}.attention.attention.{1}.{2}"),
        ("aggregator.layers.#.classes.fc1.*", "{0}.attention.MLP.0.{1}"),
        ("aggregator.layers.#.classes.fc2.*", "{0}.attention.MLP.2.{1}"),
        ("aggregator.layers.#.classes.padding_token", "{0}.attention.padding_tokens", 2),
        ("aggregator.layers.#.classes.padding_guidance", "{0}.attention.padding_guidance", 2),
    ),
    *_under(
        "sem_seg_head.predictor.transformer.decoder1.",
        ("aggregator.decoder.stages.0.up.*", "up.{0}"),
        ("aggregator.decoder.stages.0.conv1.*", "conv.double_conv.0.{0}"),
        ("aggregator.decoder.stages.0.norm1.*", "conv.double_conv.1.{0}"),
        ("aggregator.decoder.stages.0.conv2.*", "conv.double_conv.3.{0}"),
        ("aggregator.decoder.stages.0.norm2.*", "conv.double_conv.4.{0}"),
    ),
    *_under(
        "sem_seg_head.predictor.transformer.decoder2.",
        ("aggregator.decoder.stages.1.up.*", "up.{0}"),
        ("aggregator.decoder.stages.1.conv1.*", "conv.double_conv.0.{0}"),
        ("aggregator.decoder.stages.1.norm1.*", "conv.double_conv.1.{0}"),
        ("aggregator.decoder.stages.1.conv2.*", "conv.double_conv.3.{0}"),
        ("aggregator.decoder.stages.1.norm2.*", "conv.double_conv.4.{0}"),
    ),
    Rule("guidance_upsample.0.*", "upsample1.{0}"),
    Rule("guidance_upsample.1.*", "upsample2.{0}"),
]

CASCADE_RULES = [
    *_under(
        "backbone.",
        ("image_encoder.clip.*.attn.(q|k|v)_proj_weight", "{0}.attn.in_proj_weight"),
        ("image_encoder.clip.*", "{0}"),
        ("image_encoder.norm_(weight|bias)", "ln_layers.{row}.{0}"),
        ("image_encoder.prompt_embeddings", "prompt_embeddings", 1),
        ("image_encoder.*", "{0}"),
    ),
    *_under(
        "text_encoder.",
        ("text_encoder.*.attn.(q|k|v)_proj_weight", "{0}.attn.in_proj_weight"),
        ("text_encoder.*", "{0}"),
    ),
    *_under(
        "decode_head.cascade_decoders.",
        ("head.decoders.#.layers.#.(q|k|v|proj).*", "{0}.layers.{1}.multihead_attn.{2}.{3}"),
        ("head.decoders.#.layers.#.unused.self_attn_(in_proj)_*", "{0}.layers.{1}.self_attn.{2}_{3}"),
        ("head.decoders.#.layers.#.unused.self_attn_(out_proj)_*", "{0}.layers.{1}.self_attn.{2}.{3}"),
        ("head.decoders.#.layers.#.unused.norm1_*", "{0}.layers.{1}.norm1.{2}"),
        ("head.decoders.#.layers.#.*", "{0}.layers.{1}.{2}"),
    ),
    Rule("head.query_projections.#.*", "decode_head.q_projs.{0}.{1}"),
    Rule("head.stage_weights.0", "decode_head.weights_s1"),
    Rule("head.stage_weights.1", "decode_head.weights_s2"),
]

# Buffers that upstream works out from its configuration and still saves, so they say nothing about the weights.
CATSEG_MASK = "sem_seg_head.predictor.transformer.layers.{}.swin_block.block_2.attn_mask"
CASCADE_EMPTY_WEIGHT = "decode_head.loss_decode.criterion.empty_weight"
_DERIVED = re.compile(rf"{re.escape(CATSEG_MASK).replace(re.escape('{}'), '[0-9]+')}|{re.escape(CASCADE_EMPTY_WEIGHT)}")


class Stored(NamedTuple):
    """How a checkpoint stores a tensor: `parts` are our tensors, or single rows of them, joined along dimension 0."""

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int | None], ...]


def own_layout(shapes: Mapping[str, Sequence[int]]) -> dict[str, Stored]:
    """The layout in which every tensor of a model is stored as it is."""
    return {name: Stored(tuple(shape), ((name, None),)) for name, shape in shapes.items()}


def upstream_layout(rules: Iterable[Rule], shapes: Mapping[str, Sequence[int]]) -> dict[str, Stored]:
    """Upstream's layout of a model.

    Args:
        rules: `CATSEG_RULES` or `CASCADE_RULES`. shapes: our names and shapes, in the order of the state dict.

    Raises:
        ValueError: no rule knows one of the names.
    """
    patterns = [(re.compile(_regex(rule.ours)), rule) for rule in rules]
    layout: dict[str, Stored] = {}
    for name, shape in shapes.items():
        matches = ((pattern.fullmatch(name), rule) for pattern, rule in patterns)
        match, rule = next((found for found in matches if found[0]), (None, None))
        if match is None or rule is None:
            raise ValueError(f"upstream's layout has no place for '{name}'.")
        by_row = "{row}" in rule.upstream
        for row in range(shape[0]) if by_row else (None,):
            upstream = rule.upstream.format(*match.groups(), row=row)
            stored = (*[1] * rule.leading_ones, *(shape[1:] if by_row else shape))
            parts: tuple[tuple[str, int | None], ...] = ((name, row),)
            if upstream in layout:
                before = layout[upstream]
                stored = (before.shape[0] + stored[0], *stored[1:])
                parts = (*before.parts, *parts)
            layout[upstream] = Stored(stored, parts)
    return layout


def is_derived(key: str) -> bool:
    """Whether an upstream key holds a buffer that follows from the configuration."""
    return _DERIVED.fullmatch(key) is not None


def _regex(pattern: str) -> str:
    return pattern.replace(".", r"\.").replace("#", "([0-9]+)").replace("*", "(.+)")


class Look(NamedTuple):
    """A kind of checkpoint: its telling keys with their shapes (None: any), and what to do with one."""

    name: str
    keys: Mapping[str, tuple[int, ...] | None]
    advice: str


_CATSEG_PATCHES = "sem_seg_head.predictor.clip_model.visual.conv1.weight"
_CASCADE_PROMPTS = "backbone.prompt_embeddings"
_THAT_MODEL = "load it with that model"
_THAT_CONFIGURATION = "load it into a model of the same configuration"
_OWN = "ovseg_fast.checkpoints.load reads it, into the model that it was saved from"
_HEADLESS = "it holds no segmentation head, get a checkpoint of the whole model"
LOOKS = (  # the first one whose keys are all there counts
    Look("catseg-vitb", {_CATSEG_PATCHES: (768, 3, 16, 16)}, _THAT_MODEL),
    Look("catseg-vitl", {_CATSEG_PATCHES: (1024, 3, 14, 14)}, _THAT_MODEL),
    Look("cascade-clip-vitb", {_CASCADE_PROMPTS: (1, 50, 768)}, _THAT_MODEL),
    Look("cascade-clip-vitb-context", {_CASCADE_PROMPTS: (1, 35, 768)}, _THAT_MODEL),
    Look("cascade-clip-vitb-voc", {_CASCADE_PROMPTS: (1, 10, 768)}, _THAT_MODEL),
    Look("CAT-Seg", {_CATSEG_PATCHES: None}, _THAT_CONFIGURATION),
    Look("Cascade-CLIP", {_CASCADE_PROMPTS: None}, _THAT_CONFIGURATION),
    Look("CAT-Seg in ovseg-fast's own layout", {"aggregator.cost_embedding.weight": None}, _OWN),
    Look("Cascade-CLIP in ovseg-fast's own layout", {"image_encoder.prompt_embeddings": None}, _OWN),
    Look("OpenAI's CLIP", {"visual.conv1.weight": None, "token_embedding.weight": None}, _HEADLESS),
    Look("Hugging Face's CLIP", {"vision_model.embeddings.class_embedding": None}, _HEADLESS),
)


def recognise(shapes: Mapping[str, Sequence[int]]) -> Look | None:
    """What a checkpoint with these upstream keys and shapes looks like, or None."""
    for look in LOOKS:
        if all(key in shapes and shape in (None, tuple(shapes[key])) for key, shape in look.keys.items()):
            return look
    return None
