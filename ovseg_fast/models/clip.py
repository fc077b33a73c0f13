"""CLIP as both methods use it: open_clip's vision transformers and text encoders, run block by block.

open_clip builds the modules, names them and brings published weights. This adapter takes them over, with q, k and v as
separate parameters (fine-tuning and value-only blocks need them apart), and runs them itself: outputs of chosen blocks,
dense features, visual prompts, position embeddings for any grid.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from .. import backends, compat, ops
from ..ops.common.attention import plain_attention
from . import hub
from .token_table import expand

PACKAGED = Path(__file__).parent.parent / "weights"  # of this package
TINY_CLIP = "world"  # tag of the tiny CLIP among them, which knows the procedural world
TEXT_BATCH = 256  # prompts encoded at a time
PLAIN = {  # full names of the classes of which a block that is one operator is made
    "torch.nn.modules.normalization.LayerNorm", "open_clip.transformer.LayerNorm", f"{__name__}.SplitAttention",
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear", "torch.nn.modules.linear.Linear",
    "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.GELU", "open_clip.transformer.QuickGELU",
}  # fmt: skip
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"  # of a module
CLIP_FILES = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"  # in open_clip's repositories on the hub


class SplitAttention(nn.Module):
    """Multi-head self-attention with separate q, k and v projections and one joint bias; `attention` is `"sdpa"` or
    `"xformers"`."""

    attention = "sdpa"

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        q, k, v = (nn.Parameter(part.clone()) for part in attention.in_proj_weight.detach().chunk(3))
        self.q_proj_weight, self.k_proj_weight, self.v_proj_weight = q, k, v
        self.in_proj_bias = attention.in_proj_bias
        self.out_proj = attention.out_proj

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for weight, bias in zip(weights, self.in_proj_bias.chunk(3), strict=True)
        )
        attended = plain_attention(q, k, v, causal=causal, attention=self.attention)
        return self.out_proj(attended.transpose(1, 2).flatten(-2))

    def value_only(self, x: Tensor) -> Tensor:
        """Value and output projection of each token, as if it attended to itself alone."""
        return self.out_proj(F.linear(x, self.v_proj_weight, self.in_proj_bias.chunk(3)[2]))


class Block(nn.Module):
    """Pre-norm transformer block, around open_clip's sub-modules: one operator, unless somebody has changed one."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ls_1 = block.ln_1, SplitAttention(block.attn), block.ls_1
        self.ln_2, self.mlp, self.ls_2 = block.ln_2, block.mlp, block.ls_2

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if not causal and self._is_operator():
            return self._operator(x)
        x = x + self.ls_1(self.attn(self.ln_1(x), causal))
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    def dense(self, x: Tensor) -> Tensor:
        """CAT-Seg's last block: no attention, and at every position the residual of the class token."""
        if self._is_operator():
            return self._operator(x, dense=True)
        x = x[:, :1] + self.ls_1(self.attn.value_only(self.ln_1(x)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    def _operator(self, x: Tensor, *, dense: bool = False) -> Tensor:
        attn, mlp, ln_1, ln_2 = self.attn, cast(Any, self.mlp), cast(Any, self.ln_1), cast(Any, self.ln_2)
        layers = (ln_1, attn.out_proj, ln_2, mlp.c_fc, mlp.c_proj)
        norm1, proj, norm2, fc1, fc2 = ((layer.weight, layer.bias) for layer in layers)
        qkv = (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight, attn.in_proj_bias)
        weights = ops.EncoderBlockWeights(*norm1, *qkv, *proj, *norm2, *fc1, *fc2)
        return ops.encoder_block(
            x,
            weights,
            heads=attn.heads,
            activation="gelu" if type(mlp.gelu) is nn.GELU else "quick_gelu",
            dense=dense,
            eps=(ln_1.eps, ln_2.eps),
            attention=attn.attention,
        )

    def _is_operator(self) -> bool:
        """Whether the operator does: it has no kernels for GPUs, where PyTorch's products and attention are fast."""
        return backends.requested() in ("auto", "cpu", "torch") and self._is_plain()

    def _is_plain(self) -> bool:
        """Whether the sub-modules are those of CLIP, without hooks: no adapters, layer scale or quantisation."""
        mlp: Any = self.mlp
        if type(mlp) is not nn.Sequential or list(mlp._modules) != ["c_fc", "gelu", "c_proj"]:
            return False
        parts = (self.ln_1, self.attn, self.attn.out_proj, self.ls_1, self.ln_2, *mlp, self.ls_2)
        if any(f"{type(part).__module__}.{type(part).__qualname__}" not in PLAIN for part in parts):
            return False
        if getattr(mlp.gelu, "approximate", "none") != "none" or module_hooks._has_any_global_hook():
            return False
        return not any(any(getattr(part, kind) for kind in HOOKS) or "forward" in vars(part) for part in (*parts, mlp))


class Blocks(nn.Module):
    """The stack of blocks, under open_clip's name `resblocks`."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(block) for block in transformer.resblocks)


class ImageEncoder(nn.Module):
    """CLIP's vision transformer.

    Attributes: `patch` side of a patch in pixels; `grid` (rows, columns) of the stored position embeddings; `width` D;
    `embed_dim` E; `layers` number of blocks.
    """

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.conv1: nn.Conv2d = visual.conv1
        self.class_embedding: nn.Parameter = visual.class_embedding
        self.positional_embedding: nn.Parameter = visual.positional_embedding
        self.ln_pre: nn.Module = visual.ln_pre
        self.transformer = Blocks(visual.transformer)
        self.ln_post: nn.LayerNorm = visual.ln_post
        self.proj: nn.Parameter = visual.proj
        self.patch, self.layers = int(visual.patch_size[0]), len(self.transformer.resblocks)
        self.grid: tuple[int, int] = tuple(visual.grid_size)
        self.width, self.embed_dim = self.proj.shape

    def set_grid(self, rows: int, columns: int, mode: str) -> None:
        """Resize the stored position embeddings once, for a method that trains at another size."""
        resized = resize_positions(self.positional_embedding.detach(), self.grid, (rows, columns), mode)
        self.positional_embedding = nn.Parameter(resized)
        self.grid = (rows, columns)

    def embed(self, pixels: Tensor, mode: str, class_again: bool = False) -> tuple[Tensor, tuple[int, int]]:
        """Patches and class token with their positions, before the first block.

        Args:
            pixels: (B, 3, h, w) normalised image.
            mode: how position embeddings are resized to another grid, `"bicubic"` or `"bilinear"`.
            class_again: add the class embedding to the class token a second time (Cascade-CLIP).

        Returns:
            (B, 1 + S, D) tokens, class token first, and the grid (rows, columns) with S = rows · columns.
        """
        patches = self.conv1(pixels)
        grid = (patches.shape[-2], patches.shape[-1])
        positions = resize_positions(self.positional_embedding, self.grid, grid, mode)
        first = self.class_embedding + positions[:1]
        if class_again:
            first = first + self.class_embedding
        tokens = patches.flatten(2).transpose(1, 2) + positions[1:]
        tokens = torch.cat([first.expand(tokens.shape[0], 1, -1), tokens], 1)
        return self.ln_pre(tokens), grid

    def project(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., E): last norm and projection."""
        return self.ln_post(tokens) @ self.proj

    def dense_features(
        self, pixels: Tensor, blocks: Collection[int], mode: str = "bicubic"
    ) -> tuple[Tensor, list[Tensor], tuple[int, int]]:
        """Dense image-text features by a value-only last block, and the outputs of some blocks (CAT-Seg, section 3.1).

        Args:
            pixels: (B, 3, h, w) normalised image.
            blocks: zero-based indices of blocks whose outputs to return, ascending.

        Returns:
            dense (B, 1 + S, E), not normalised to unit length, class token first; block outputs, each (B, 1 + S, D);
            the grid.
        """
        tokens, grid = self.embed(pixels, mode)
        outputs = []
        *stack, last = self.transformer.resblocks
        for index, block in enumerate(stack):
            tokens = block(tokens)
            if index in blocks:
                outputs.append(tokens)
        return self.project(cast(Block, last).dense(tokens)), outputs, grid


class TextEncoder(nn.Module):
    """CLIP's causal text encoder. Attributes: `context` positions, `embed_dim` E."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.token_embedding: nn.Embedding = text.token_embedding
        self.positional_embedding: nn.Parameter = text.positional_embedding
        self.transformer = Blocks(text.transformer)
        self.ln_final: nn.LayerNorm = text.ln_final
        self.text_projection: nn.Parameter = text.text_projection
        self.context, self.embed_dim = self.positional_embedding.shape[0], self.text_projection.shape[1]

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed prompts; the end token is the one with the largest id.

        Exact rewrite: the encoder is causal and only the end token is read, so a batch is cut after its last end token.

        Args:
            tokens: (..., 77) int64 token ids.

        Returns:
            (..., E), not normalised.

        Raises:
            TypeError, ValueError: `tokens` is not integer, or longer than the encoder's context.
        """
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise TypeError(f"tokens must be integer token ids, got {tokens.dtype}.")
        if tokens.shape[-1] > self.context or tokens.dim() < 1:
            raise ValueError(f"tokens must have at most {self.context} positions, got shape {tuple(tokens.shape)}.")
        rows = tokens.flatten(0, -2) if tokens.dim() > 1 else tokens.unsqueeze(0)
        embedded = torch.cat([self._encode(part) for part in rows.split(TEXT_BATCH)])
        return embedded.view(*tokens.shape[:-1], -1)

    def _encode(self, tokens: Tensor) -> Tensor:
        end = tokens.argmax(-1)
        if not torch.compiler.is_compiling():  # a length that depends on the data would break the graph
            tokens = tokens[:, : int(end.max()) + 1]
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
        return self.ln_final(x[torch.arange(x.shape[0], device=x.device), end]) @ self.text_projection


class CLIP(nn.Module):
    """Image and text encoder in one embedding space.

    Args:
        config: a name of open_clip's (`"ViT-B-16-quickgelu"`), or a dict like its model configurations (`embed_dim`,
            `vision_cfg`, `text_cfg`, `quick_gelu`).
        pretrained: weights by open_clip's tag (`"openai"`, downloaded) or a checkpoint file; `"world"` for the tiny
            CLIP in this package (`presets.TINY_WORLD`); None for random ones.

    Raises:
        ValueError: open_clip knows no such name, or the model is not a plain CLIP vision transformer with a causal
            text encoder; or no such tag or file. ConnectionError: the weights cannot be downloaded.
        ImportError: open_clip is missing, too old or cannot be imported.
    """

    def __init__(self, config: str | Mapping[str, Any], pretrained: str | Path | None = None) -> None:
        super().__init__()
        model = _open_clip_model(config, pretrained)
        text = getattr(model, "text", model)
        _check_supported(model.visual, text)
        self.visual = ImageEncoder(model.visual)
        self.text = TextEncoder(text)
        self.logit_scale = model.logit_scale


def resize_positions(positions: Tensor, old: tuple[int, ...], new: tuple[int, ...], mode: str) -> Tensor:
    """(1 + old, D) position embeddings to (1 + new, D): the grid is resized without aligning corners."""
    # The same grid comes out unchanged either way; a compiler would specialise its graph on the comparison.
    if not torch.compiler.is_compiling() and tuple(old) == tuple(new):
        return positions
    grid = positions[1:].unflatten(0, tuple(old)).permute(2, 0, 1).unsqueeze(0)
    grid = F.interpolate(grid, tuple(new), mode=mode, align_corners=False)
    return torch.cat([positions[:1], grid[0].flatten(1).t()])


def _open_clip_model(config: str | Mapping[str, Any], pretrained: str | Path | None) -> Any:
    open_clip = compat.open_clip()
    if isinstance(config, str):
        known = open_clip.get_model_config(config)
        if known is None:
            raise ValueError(f"config must be a model name of open_clip's or a configuration dict, got {config!r}.")
        if pretrained is not None:
            _check_pretrained(open_clip, config, str(pretrained))
            return open_clip.create_model(config, pretrained=str(pretrained))
    settings = dict(known if isinstance(config, str) else config)
    custom_text = settings.pop("custom_text", False)
    model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**settings)
    if pretrained == TINY_CLIP:
        model.load_state_dict(expand(load_file(PACKAGED / "clip-tiny.safetensors")))
    elif pretrained is not None:
        open_clip.load_checkpoint(model, str(pretrained))
    return model


def _check_pretrained(open_clip: Any, config: str, pretrained: str) -> None:
    """Refuse weights that open_clip does not know or cannot get, before it builds anything."""
    if Path(pretrained).is_file():
        return
    tags = open_clip.list_pretrained_tags_by_model(config)
    if pretrained not in tags:
        raise ValueError(
            f"clip_pretrained must be a file or one of {', '.join(tags)} for {config}, got {pretrained!r}."
        )
    repository = open_clip.get_pretrained_cfg(config, pretrained).get("hf_hub")
    if not repository:
        return
    owner, name, *path = repository.strip("/").split("/")
    files = ["/".join(path)] if path else CLIP_FILES
    try:
        if not any(hub.cached(f"{owner}/{name}", file) for file in files):
            hub.find(f"{owner}/{name}", files[0])
    except ConnectionError as error:
        advice = "a file of the same weights can be given instead of the tag"
        raise ConnectionError(f"cannot download CLIP's weights '{pretrained}' ({error}); {advice}.") from error


def _check_supported(visual: Any, text: Any) -> None:
    """Refuse towers that this adapter would run incorrectly."""
    transformer = compat.open_clip().transformer
    problem = None
    if not isinstance(visual, transformer.VisionTransformer):
        problem = f"its image encoder is a {type(visual).__name__}, not a vision transformer"
    elif visual.attn_pool is not None or visual.pool_type != "tok" or visual.final_ln_after_pool:
        problem = "its image encoder does not pool by the class token"
    elif visual.patch_size[0] != visual.patch_size[1]:
        problem = "its patches are not square"
    elif getattr(text, "attn_mask", None) is None or not isinstance(text.text_projection, nn.Parameter):
        problem = "its text encoder is not causal with a plain projection"
    elif getattr(text, "text_pool_type", getattr(text, "pool_type", None)) != "argmax":
        problem = "its text encoder does not read the end token"
    else:
        blocks = [*visual.transformer.resblocks, *text.transformer.resblocks]
        if not all(isinstance(block, transformer.ResidualAttentionBlock) for block in blocks):
            problem = "its transformer blocks are not the plain pre-norm kind"
    if problem:
        raise ValueError(f"config must name a plain CLIP vision transformer; this model does not fit: {problem}.")
