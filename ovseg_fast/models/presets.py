"""The published models by name, and small ones of the same make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..layers.cascade_head import DecoderLayer
from ..ops.common.attention import prepare_attention
from .cascade_clip import CascadeCLIP, CascadeCLIPConfig
from .catseg import CATSeg, CATSegConfig
from .clip import PACKAGED, SplitAttention
from .token_table import CLIP_TOKENS


@dataclass(frozen=True)
class Preset:
    """A model by name.

    Attributes:
        name: what `ovseg_fast.load` takes. config: what the model is built from.
        weights_file: its file on the hub, or None where its authors publish none there.
        note: one line for `ovseg-fast info`.
    """

    name: str
    config: CATSegConfig | CascadeCLIPConfig
    weights_file: str | None
    note: str

    @property
    def method(self) -> str:
        """`"cat-seg"` or `"cascade-clip"`."""
        return "cat-seg" if isinstance(self.config, CATSegConfig) else "cascade-clip"

    @property
    def packaged(self) -> Path | None:
        """The file of its weights where they come with this package."""
        file = PACKAGED / f"{self.name}.safetensors"
        return file if file.is_file() else None


TINY_WORLD: dict[str, Any] = {  # the CLIP of the procedural world
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 96, "patch_size": 8, "width": 64, "layers": 6, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": CLIP_TOKENS, "width": 64, "heads": 4, "layers": 2},
}

_ALL = (
    Preset("catseg-vitb", CATSegConfig(), "model_base.pth", "CAT-Seg, CLIP ViT-B/16 at 384"),
    Preset(
        "catseg-vitl",
        CATSegConfig(clip="ViT-L-14-336-quickgelu", image_size=336, guidance_blocks=(7, 15)),
        "model_large.pth",
        "CAT-Seg, CLIP ViT-L/14 at 336",
    ),
    Preset("cascade-clip-vitb", CascadeCLIPConfig(), None, "Cascade-CLIP, CLIP ViT-B/16, COCO-Stuff (50 prompts)"),
    Preset(
        "cascade-clip-vitb-context",
        CascadeCLIPConfig(prompts=35, training_classes="pascal-context"),
        None,
        "Cascade-CLIP, CLIP ViT-B/16, PASCAL Context (35 prompts)",
    ),
    Preset(
        "cascade-clip-vitb-voc",
        CascadeCLIPConfig(prompts=10, training_classes="pascal-voc"),
        None,
        "Cascade-CLIP, CLIP ViT-B/16, PASCAL VOC (10 prompts)",
    ),
    Preset(
        "catseg-tiny",
        CATSegConfig(
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
        ),
        None,
        "CAT-Seg, small, trained on the procedural world",
    ),
    Preset(
        "cascade-clip-tiny",
        CascadeCLIPConfig(
            clip=TINY_WORLD,
            image_size=96,
            prompts=4,
            stages=((1, 2), (3, 4)),
            heads=4,
            hidden=128,
            stride=80,
            training_classes="world",
        ),
        None,
        "Cascade-CLIP, small, trained on the procedural world",
    ),
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


def get_preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError that lists the names."""
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name]


def build(name: str, *, clip_pretrained: str | Path | None = None, attention: str = "sdpa") -> CATSeg | CascadeCLIP:
    """A model with random weights.

    Args:
        name: a preset, such as `"catseg-vitb"`.
        clip_pretrained: start CLIP from open_clip's weights of that tag (`"openai"`, downloaded), from a file, or, as
            `"world"`, from those of the tiny CLIP that come with this package.
        attention: what plain attention runs on, that of CLIP's encoders and of mask attention's PyTorch form: `"sdpa"`,
            PyTorch's own, or `"xformers"`, its memory-efficient kernels.

    Raises:
        ValueError: no preset has that name, or there is no such attention.
        ImportError: xformers is asked for and not installed.
    """
    preset = get_preset(name)
    prepare_attention(attention)
    model: CATSeg | CascadeCLIP
    if isinstance(preset.config, CATSegConfig):
        model = CATSeg(preset.config, clip_pretrained)
    else:
        model = CascadeCLIP(preset.config, clip_pretrained)
    for module in model.modules():
        if isinstance(module, (SplitAttention, DecoderLayer)):
            module.attention = attention
    model.preset = name
    return model
