"""Models by name: the published ones, small ones of the same make, and whatever is registered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..layers.cascade_head import DecoderLayer
from ..ops.common.attention import prepare_attention
from .base import SegmentationModel
from .cascade_clip import CascadeCLIP, CascadeCLIPConfig
from .catseg import CATSeg, CATSegConfig
from .clip import PACKAGED, SplitAttention
from .token_table import CLIP_TOKENS


@dataclass(frozen=True)
class Preset:
    """A model by name.

    Attributes:
        name: what `ovseg_fast.load` takes.
        model: the method. config: the first argument of its constructor.
        weights_file: its file in the method's `hub_space`, or None.
        note: one line for `ovseg-fast info`.
        mark_shape: shape of the method's `mark` tensor, if that tells its checkpoints from those of other presets.
    """

    name: str
    model: type[SegmentationModel]
    config: Any
    weights_file: str | None = None
    note: str = ""
    mark_shape: tuple[int, ...] | None = None

    @property
    def packaged(self) -> Path | None:
        """The file of its weights in this package, or None."""
        file = PACKAGED / f"{self.name}.safetensors"
        return file if file.is_file() else None


PRESETS: dict[str, Preset] = {}


def register(preset: Preset) -> Preset:
    """Make a preset known to `build`, `ovseg_fast.load` and the command line; returns it.

    Raises:
        ValueError: there is a preset of that name.
    """
    if preset.name in PRESETS:
        raise ValueError(f"name must be that of a new preset, {preset.name!r} is taken.")
    PRESETS[preset.name] = preset
    return preset


def get_preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError that lists the names."""
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name]


def build(name: str, *, clip_pretrained: str | Path | None = None, attention: str = "sdpa") -> SegmentationModel:
    """A model with random weights.

    Args:
        name: a preset, such as `"catseg-vitb"`.
        clip_pretrained: initial weights of CLIP: a tag of open_clip's (`"openai"`, downloaded), a file, or `"world"`
            for the tiny CLIP in this package.
        attention: plain attention, in CLIP's encoders and the PyTorch form of mask attention: `"sdpa"`, PyTorch's own,
            or `"xformers"`, its memory-efficient kernels.

    Raises:
        ValueError: there is no such preset or attention. ImportError: xformers is not installed.
    """
    preset = get_preset(name)
    prepare_attention(attention)
    model = preset.model(preset.config, clip_pretrained)
    for module in model.modules():
        if isinstance(module, (SplitAttention, DecoderLayer)):
            module.attention = attention
    model.preset = name
    return model


TINY_WORLD: dict[str, Any] = {  # the CLIP of the made-up world
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 96, "patch_size": 8, "width": 64, "layers": 6, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": CLIP_TOKENS, "width": 64, "heads": 4, "layers": 2},
}

TINY_CATSEG = CATSegConfig(
    clip=TINY_WORLD,
    image_size=96,
    guidance_blocks=(1, 3),
    channels=32,
    guidance=32,
    heads=2,
    window=6,
    pad_length=32,
    decoder_appearance=(32, 16),
    decoder_guidance=(16, 8),
    decoder_channels=(32, 16),
    slide_canvas=128,
    slide_window=96,
)
TINY_CASCADE = CascadeCLIPConfig(
    clip=TINY_WORLD,
    image_size=96,
    prompts=4,
    stages=((1, 2), (3, 4)),
    heads=4,
    hidden=128,
    stride=80,
    training_classes="world",
)
VITL = CATSegConfig(clip="ViT-L-14-336-quickgelu", image_size=336, guidance_blocks=(7, 15))
CONTEXT = CascadeCLIPConfig(prompts=35, training_classes="pascal-context")
VOC = CascadeCLIPConfig(prompts=10, training_classes="pascal-voc")
CASCADE = "Cascade-CLIP, CLIP ViT-B/16, "

for _preset in (
    Preset("catseg-vitb", CATSeg, CATSegConfig(), "model_base.pth", "CAT-Seg, CLIP ViT-B/16 at 384", (768, 3, 16, 16)),
    Preset("catseg-vitl", CATSeg, VITL, "model_large.pth", "CAT-Seg, CLIP ViT-L/14 at 336", (1024, 3, 14, 14)),
    Preset("cascade-clip-vitb", CascadeCLIP, CascadeCLIPConfig(), None, CASCADE + "COCO-Stuff (50 prompts)", (50, 768)),
    Preset("cascade-clip-vitb-context", CascadeCLIP, CONTEXT, None, CASCADE + "PASCAL Context (35 prompts)", (35, 768)),
    Preset("cascade-clip-vitb-voc", CascadeCLIP, VOC, None, CASCADE + "PASCAL VOC (10 prompts)", (10, 768)),
    Preset("catseg-tiny", CATSeg, TINY_CATSEG, None, "CAT-Seg, small, trained on the procedural world"),
    Preset(
        "cascade-clip-tiny", CascadeCLIP, TINY_CASCADE, None, "Cascade-CLIP, small, trained on the procedural world"
    ),
):
    register(_preset)
