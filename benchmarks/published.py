"""The published implementations of both methods, built from a checkout of their repository and given our weights.

Nothing of theirs is in this repository: their files are imported from the folder that the user names. They also import
detectron2, mmcv, mmseg and others for registries, configuration, drawing and training. The stand-ins below have those
names; none of them computes anything in a forward pass.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_fast import compat
from ovseg_fast.checkpoints import to_upstream
from ovseg_fast.models import CascadeCLIP, CATSeg

Forward = Callable[..., Tensor]


class Repository(NamedTuple):
    """A published repository: `mark` is a file that only it has, `packages` are those of its packages whose `__init__`
    must not run, as it imports datasets and training."""

    name: str
    mark: str
    packages: tuple[str, ...]


CATSEG = Repository(
    "KU-CVLAB/CAT-Seg",
    "cat_seg/modeling/transformer/model.py",
    ("cat_seg", "cat_seg.modeling", "cat_seg.modeling.transformer", "cat_seg.modeling.heads", "cat_seg.third_party"),
)
CASCADE_CLIP = Repository(
    "HVision-NKU/Cascade-CLIP",
    "models/decode_heads/decode_seg.py",
    ("models", "models.backbone", "models.decode_heads"),
)


def unchanged(value: Any, *_: Any) -> Any:
    """A decorator that decorates nothing, and post-processing that leaves a result as it is."""
    return value


class Registry:
    """Registers nothing."""

    def register(self, **_: Any) -> Callable[..., Any]:
        return unchanged

    register_module = register


class ImageList(NamedTuple):
    """Images of one size, as a batch."""

    tensor: Tensor
    image_sizes: list[tuple[int, int]]

    @classmethod
    def from_tensors(cls, images: list[Tensor], divisor: int) -> ImageList:
        """Padded with zeros, right and below, to a multiple of `divisor`."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = sizes[0]
        return cls(F.pad(torch.stack(images), (0, -width % divisor, 0, -height % divisor)), sizes)


class DecodeHead(nn.Module):
    """The base class of a head: nothing but a module."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels


def stand_ins() -> dict[str, dict[str, Any]]:
    """Module -> its names. timm stands in for its own former module, which lacks one of the names by now."""
    timm = importlib.import_module("timm.layers")
    nothing: dict[str, Any] = {}
    return {
        "curses": {"A_ALTCHARSET": None},
        "detectron2.config": {"configurable": unchanged},
        "detectron2.data": {"MetadataCatalog": None},
        "detectron2.layers": {"Conv2d": nn.Conv2d, "ShapeSpec": None, "get_norm": None},
        "detectron2.modeling": {
            "META_ARCH_REGISTRY": Registry(),
            "SEM_SEG_HEADS_REGISTRY": Registry(),
            "build_backbone": None,
            "build_sem_seg_head": None,
        },
        "detectron2.modeling.backbone": {"Backbone": nn.Module},
        "detectron2.modeling.postprocessing": {"sem_seg_postprocess": unchanged},
        "detectron2.structures": {"ImageList": ImageList},
        "detectron2.utils.memory": {"_ignore_torch_cuda_oom": None},
        "fvcore": nothing,
        "fvcore.nn": nothing,
        "fvcore.nn.weight_init": nothing,
        "matplotlib": nothing,
        "matplotlib.pyplot": nothing,
        "mmcv.cnn": {"ConvModule": None},
        "mmcv.runner": {"auto_fp16": None, "force_fp32": lambda apply_to: unchanged},
        "mmseg.models.backbones": {"ResNet": None, "VisionTransformer": None},
        "mmseg.models.builder": {"BACKBONES": Registry(), "HEADS": Registry()},
        "mmseg.models.decode_heads.decode_head": {"BaseDecodeHead": DecodeHead},
        "mmseg.models.losses": {"accuracy": None},
        "mmseg.ops": {"Upsample": None, "resize": None},
        "timm.models.layers": {"drop": None, "drop_path": timm.drop_path, "trunc_normal_": timm.trunc_normal_},
        "tkinter": {"OUTSIDE": None},
    }


@contextmanager
def importable(repository: Repository, checkout: Path) -> Iterator[Callable[[str], Any]]:
    """A function that imports a module of the checkout, while the block runs. After it, no name of the checkout and no
    stand-in is left in `sys.modules`."""
    compat.open_clip()  # repairs torchvision, without which timm cannot be imported
    for used in ("timm.models.resnet", "timm.models.vision_transformer"):  # with the real modules
        importlib.import_module(used)
    made = {name: ModuleType(name) for name in repository.packages}
    for name, module in made.items():
        module.__path__ = [str(checkout.joinpath(*name.split(".")))]
    for name, names in stand_ins().items():
        made[name] = ModuleType(name)
        vars(made[name]).update(names)
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield importlib.import_module
    finally:
        root = repository.packages[0]
        for name in [name for name in sys.modules if name in made or name.partition(".")[0] == root]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if module is not None})


def catseg_head(checkout: Path, model: CATSeg, pooling: int) -> nn.Module:
    """The published head of `model`: image (B, E, H, W), text (B, T, P, E) and maps [(B, E, H, W), (B, G₁, 2H, 2W),
    (B, G₂, 4H, 4W)] -> logits (B, T, 4H, 4W)."""
    with importable(CATSEG, checkout) as module:
        head = _aggregator(module, model, pooling)
    prefix = "sem_seg_head.predictor.transformer."
    weights = to_upstream(model)
    head.load_state_dict({key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)})
    return head.eval()


def _aggregator(module: Callable[[str], Any], model: CATSeg, pooling: int) -> nn.Module:
    config, encoder = model.config, model.clip.visual
    side = config.image_size // encoder.patch
    head: nn.Module = module("cat_seg.modeling.transformer.model").Aggregator(
        text_guidance_dim=encoder.embed_dim,
        text_guidance_proj_dim=config.guidance,
        appearance_guidance_dim=encoder.embed_dim,
        appearance_guidance_proj_dim=config.guidance,
        decoder_dims=config.decoder_channels,
        decoder_guidance_dims=config.decoder_appearance,
        decoder_guidance_proj_dims=config.decoder_guidance,
        num_layers=config.layers,
        nheads=config.heads,
        hidden_dim=config.channels,
        pooling_size=(pooling, pooling),
        feature_resolution=(side, side),
        window_size=config.window,
        attention_type=config.class_attention,
        prompt_channel=config.prompts,
        pad_len=config.pad_length,
    )
    return head


def catseg(checkout: Path, model: CATSeg, text: Tensor, pooling: int) -> Forward:
    """The published model of `model`, a ViT-B/16, with text embeddings (T, P, E): an image (3, 384, 384) uint8 ->
    logits (1, T, 96, 96). It goes on to probabilities; detectron2's resizing of these to the image is left out."""
    encoder, words = model.clip.visual, model.clip.text
    vocabulary, width = words.token_embedding.weight.shape
    with importable(CATSEG, checkout) as module:
        predictor_class = module("cat_seg.modeling.transformer.cat_seg_predictor").CATSegPredictor
        predictor = predictor_class.__new__(predictor_class)  # its constructor downloads CLIP, and needs a GPU
        nn.Module.__init__(predictor)
        predictor.clip_model = module("cat_seg.third_party.model_vpt").CLIP(
            encoder.embed_dim,
            encoder.patch * encoder.grid[0],
            encoder.layers,
            encoder.width,
            encoder.patch,
            words.context,
            vocabulary,
            width,
            width // 64,
            len(words.transformer.resblocks),
        )
        predictor.transformer = _aggregator(module, model, pooling)
        predictor.test_class_texts = predictor.prompt_templates = predictor.tokens = None
        predictor.cache = text  # as after the first image of an evaluation
        side = model.config.image_size // encoder.patch
        head = module("cat_seg.modeling.heads.cat_seg_head").CATSegHead(
            num_classes=len(text), feature_resolution=[side, side], transformer_predictor=predictor
        )
        mean, std = model.statistics
        published = module("cat_seg.cat_seg_model").CATSeg(
            backbone=None,
            sem_seg_head=head,
            size_divisibility=32,
            pixel_mean=mean,
            pixel_std=std,
            clip_pixel_mean=mean,
            clip_pixel_std=std,
            train_class_json="",
            test_class_json="",
            sliding_window=False,
            clip_finetune="attention",
            backbone_multiplier=0.0,
            clip_pretrained="ViT-B/16",
        )
    published.load_state_dict(to_upstream(model))
    published.eval()
    logits: list[Tensor] = []
    head.register_forward_hook(lambda _module, _inputs, output: logits.append(output))

    def forward(image: Tensor) -> Tensor:
        published([{"image": image}])
        return logits.pop()

    return forward


def cascade_clip(checkout: Path, model: CascadeCLIP) -> Forward:
    """The published image encoder and head of `model`: normalised images (B, 3, 512, 512) and text (T, E) -> mask
    logits (B, T, 512, 512). The probabilities that the head goes on to are left out."""
    encoder, config = model.image_encoder, model.config
    clip, gathered = encoder.clip, list(encoder.gathered)
    tensor = torch.tensor
    with importable(CASCADE_CLIP, checkout) as module, contextlib.redirect_stdout(sys.stderr):
        backbone = module("models.backbone.img_encoder").VPTCLIPVisionTransformer(
            input_resolution=config.image_size,
            patch_size=clip.patch,
            width=clip.width,
            layers=clip.layers,
            heads=clip.width // 64,
            output_dim=clip.embed_dim,
            out_indices=gathered,
            get_embeddings=True,
            num_tokens=config.prompts,
            prompt_dim=clip.width,
            total_d_layer=clip.layers - 1,
        )
        head_class = module("models.decode_heads.decode_seg").ATMSingleHeadSeg
        # Its constructor makes two tensors on the GPU by name; nothing else in it needs one.
        with mock.patch.object(torch, "tensor", lambda data, device=None: tensor(data)):
            head = head_class(
                img_size=config.image_size,
                in_channels=clip.embed_dim,
                seen_idx=[],
                all_idx=[],
                embed_dims=clip.embed_dim,
                num_layers=config.decoder_layers,
                num_heads=config.heads,
                use_stages=len(gathered),
            )
    both = nn.ModuleDict({"backbone": backbone, "decode_head": head})
    weights = to_upstream(model)
    wanted = [key for key in weights if key.partition(".")[0] in both and key not in model.upstream_derived]
    both.load_state_dict({key: weights[key] for key in wanted})
    both.eval()
    head.semantic_inference = unchanged

    def forward(images: Tensor, text: Tensor) -> Tensor:
        masks: Tensor = head([backbone(images), text])["pred_masks"]
        return masks

    return forward
