"""Trains a tiny CLIP on the image-caption pairs of the procedural world, from a seed, on a CPU.

    python -m ovseg_fast.training.clip_pretraining --out build/clip --steps 40000

Each step draws whole scenes with their captions, and crops around single objects and pieces of ground with captions of
those alone. A batch of crops holds each class at most once, so that about half of all the classes that differ from a
class in one word are in it as hard negatives, and none of its texts is a second right answer.

Two kinds of contrastive loss are added. The plain one of CLIP (Radford et al., 2021, arXiv 2103.00020) compares class
tokens with captions. The patch-aligned one, after PACL (Mukhoti et al., CVPR 2023, arXiv 2212.04994), works on the
dense features of `ImageEncoder.dense_features`, which segmentation reads: a text is compared with every patch and the
patches are averaged by how well they fit. It compares the captions of single things with the crops, and with the whole
scenes, of which several may be right. Where in a scene a thing lies is never told; masks are not looked at, though the
world knows where to cut the crops.

Every random number is drawn from the seed and the step, so a run that is resumed goes on as if never stopped.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._torchvision import ensure_importable
from ..data._world_crops import TEMPLATES, Crops, object_crops
from ..data.vocabularies import Vocabulary
from ..data.world import WORDS, WORLD, World
from ..files import write_whole
from ..models.catseg import PIXEL_MEAN, PIXEL_STD
from ..models.clip import CLIP, Block, ImageEncoder
from ..vocabulary import CATSEG_TEMPLATES, fill_templates, tokenize

CLIP_TOKENS = 49408  # of CLIP's tokenizer
TINY_WORLD: dict[str, Any] = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 96, "patch_size": 8, "width": 64, "layers": 6, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": CLIP_TOKENS, "width": 64, "heads": 4, "layers": 2},
}
CHECKPOINT, WEIGHTS = "checkpoint.pt", "clip.pt"
SHARPNESS = 10.0  # of the average over patches, in units of cosine
MAX_LOGIT_SCALE = math.log(100)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainingConfig:
    """How the tiny CLIP is trained.

    Attributes:
        seed: of the world, the initial weights and all else. steps: of the optimiser.
        scenes: whole scenes a step. crops: most crops a step, cut from the same scenes. crop_size: their side.
        lr: peak learning rate, reached after `warmup` steps, then a cosine to zero. weight_decay: of matrices.
        dense_weight: of the patch-aligned loss against the plain one.
        forget: probability with which a word of a caption is replaced by the unknown one, which is so trained too.
        checkpoint_every, evaluate_every: in steps. evaluation_scenes: fresh ones for the zero-shot segmentation.
    """

    seed: int = 0
    steps: int = 40_000
    scenes: int = 24
    crops: int = 64
    crop_size: int = 48
    lr: float = 1e-3
    warmup: int = 500
    weight_decay: float = 0.05
    dense_weight: float = 1.0
    forget: float = 0.02
    checkpoint_every: int = 200
    evaluate_every: int = 1000
    evaluation_scenes: int = 100


class KnownTokens:
    """The few of CLIP's tokens that the world's captions are made of; all others share one row, the unknown token.

    A table of 49,408 rows would be nine tenths of a tiny model. CLIP's own tokenizer stays in use, and the order of the
    tokens is kept, so that the end token is still the largest.

    Attributes: `ids` (K,) int64, ascending; row i + 1 of the small table belongs to `ids[i]`, row 0 to all others.
    """

    def __init__(self) -> None:
        words = [*WORDS, *(template.replace("{}", "") for template in TEMPLATES)]
        tokens = tokenize([[word] for word in words]).unique()
        self.ids = tokens[tokens > 0]  # zeros follow the end token

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, tokens: Tensor) -> Tensor:
        """Token ids (...) -> rows of the small table (...)."""
        position = torch.searchsorted(self.ids, tokens).clamp(max=len(self.ids) - 1)
        return torch.where(self.ids[position] == tokens, position + 1, 0)


def expand_embedding(ids: Tensor, rows: Tensor) -> Tensor:
    """(K,) token ids and (1 + K, D) rows, the first for all other tokens -> the whole table (49408, D)."""
    table = rows[0].repeat(CLIP_TOKENS, 1)
    table[ids] = rows[1:]
    return table


def compact_embedding(table: Tensor) -> tuple[Tensor, Tensor]:
    """The reverse of `expand_embedding`, exactly: (49408, D) -> ids (K,) and rows (1 + K, D)."""
    values, counts = table.unique(dim=0, return_counts=True)
    rest = values[counts.argmax()]
    ids = (table != rest).any(1).nonzero()[:, 0]
    return ids, torch.cat([rest[None], table[ids]])


def pretrain(config: PretrainingConfig, out: str | Path, clip_config: dict[str, Any] | None = None) -> CLIP:
    """Train, or go on with training.

    Args:
        out: folder, made where it is missing. It gets `checkpoint.pt`, from which the same call goes on, and at the end
            `clip.pt`, in open_clip's layout, which `ovseg_fast.build(..., clip_pretrained=...)` takes.
        clip_config: as open_clip's model configurations; `TINY_WORLD` by default.

    Returns:
        the trained CLIP, with the whole token table.

    Raises:
        ValueError: the checkpoint in `out` was made with other settings.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(clip_config or TINY_WORLD)
    known = KnownTokens()
    model = _small_model(settings, known, config.seed)
    optimizer = torch.optim.AdamW(_groups(model, config.weight_decay), lr=config.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, config))
    step, history = _resume(folder / CHECKPOINT, config, settings, model, optimizer, schedule)
    world = World(config.seed)
    started, first = time.monotonic(), step
    losses: list[float] = []

    def save() -> None:
        state = {
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "config": _resumable(config, settings),
            "history": history,
        }
        write_whole(folder / CHECKPOINT, lambda path: torch.save(state, path))

    while step < config.steps:
        model.train()
        rng = np.random.default_rng([config.seed, 1, step])
        batch = training_batch(world, step, config, rng)
        rows = [
            _forget(known.rows(tokenize([[caption] for caption in captions])[:, 0]), config.forget, len(known), rng)
            for captions in (batch.captions, batch.crops.captions)
        ]
        total = batch_loss(model, batch, rows[0], rows[1], config)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        step += 1
        losses.append(total.item())
        last = step == config.steps
        if step % config.evaluate_every == 0 or last:
            record = {"step": step, "loss": float(np.mean(losses[-config.evaluate_every :]))}
            record |= evaluate(model, config, known)
            history.append(record)
            logger.info("%s", "  ".join(f"{name} {value:.4g}" for name, value in record.items()))
        elif step % 50 == 0:
            pace = (time.monotonic() - started) / (step - first)
            left = (config.steps - step) * pace / 3600
            logger.info("step %d  loss %.3f  %.2f s a step  %.1f h left", step, np.mean(losses[-50:]), pace, left)
        if step % config.checkpoint_every == 0 or last:
            save()
    model.text.token_embedding = torch.nn.Embedding.from_pretrained(
        expand_embedding(known.ids, model.text.token_embedding.weight.detach()), freeze=False
    )
    write_whole(folder / WEIGHTS, lambda path: torch.save(to_open_clip(model), path))
    return model


class Batch(NamedTuple):
    """S whole scenes (S, 3, 96, 96) in 0..255 with their captions, and crops of them."""

    scenes: Tensor
    captions: list[str]
    crops: Crops


def training_batch(world: World, step: int, config: PretrainingConfig, rng: np.random.Generator) -> Batch:
    """What a step is trained on."""
    scenes = [world.scene(step * config.scenes + i) for i in range(config.scenes)]
    pixels = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float()
    crops = object_crops(scenes, config.crops, config.crop_size, rng)
    return Batch(pixels, [scene.captions[0] for scene in scenes], crops)


def batch_loss(model: CLIP, batch: Batch, rows: Tensor, crop_rows: Tensor, config: PretrainingConfig) -> Tensor:
    """The sum of the contrastive losses of a batch.

    Args:
        rows, crop_rows: (S, 77) and (B, 77) tokens of the captions, for the model's token table.
    """
    ensure_importable()
    from open_clip import ClipLoss

    contrast, scale = ClipLoss(), model.logit_scale.exp()
    text, phrases = (F.normalize(model.text(tokens), dim=-1) for tokens in (rows, crop_rows))
    whole, dense = encode(model.visual, batch.scenes)
    crop, crop_dense = encode(model.visual, batch.crops.pictures)
    plain = contrast(whole, text, scale) + contrast(crop, phrases, scale)
    each = torch.eye(len(phrases), dtype=torch.bool)
    aligned = soft_contrast(scale * patch_aligned(crop_dense, phrases), each)
    aligned = aligned + soft_contrast(scale * patch_aligned(dense, phrases), batch.crops.shown)
    return cast(Tensor, plain + config.dense_weight * aligned)


def soft_contrast(logits: Tensor, right: Tensor) -> Tensor:
    """The contrastive loss where a picture may have several right texts, and a text several pictures.

    Args:
        logits: (S, B). right: (S, B) bool; rows and columns without a right answer do not count.
    """
    losses = []
    for one_way, answers in ((logits, right), (logits.t(), right.t())):
        count = answers.sum(1)
        log = (one_way.log_softmax(1) * answers).sum(1)[count > 0]
        losses.append(-(log / count[count > 0]).mean())
    return (losses[0] + losses[1]) / 2


def encode(visual: ImageEncoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, h, w) in 0..255 -> class token (B, E) and value-only dense features (B, S, E), of unit length."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    tokens, _ = visual.embed((pixels - mean) / std, "bicubic")
    *stack, last = (cast(Block, block) for block in visual.transformer.resblocks)
    for block in stack:
        tokens = block(tokens)
    whole, dense = last(tokens)[:, 0], last.dense(tokens)[:, 1:]
    return F.normalize(visual.project(whole), dim=-1), F.normalize(visual.project(dense), dim=-1)


def patch_aligned(dense: Tensor, text: Tensor) -> Tensor:
    """Dense features (B, S, E) and texts (T, E), of unit length -> similarities (B, T): over the patches, those that
    fit a text best count most."""
    cosine = torch.einsum("bse,te->bts", dense, text)
    return ((SHARPNESS * cosine).softmax(-1) * cosine).sum(-1)


@torch.no_grad()
def evaluate(model: CLIP, config: PretrainingConfig, known: KnownTokens | None = None) -> dict[str, float]:
    """Accuracy of finding the caption of a held-out crop, and zero-shot segmentation of fresh scenes.

    Args:
        known: for a model in training, whose token table is still small.

    Returns:
        `retrieval` by the class token and `dense_retrieval` by patches, of crops of seen classes among their captions
        (about as many as `config.crops`); `seen` and `unseen` mIoU over all classes of the world, by cosine alone.
    """
    model.eval()
    fresh = World(config.seed + 1_000_003)
    rows = known.rows if known else (lambda tokens: tokens)
    scenes = [fresh.scene(index) for index in range(2 * config.scenes)]
    crops, captions, _ = object_crops(scenes, config.crops, config.crop_size, np.random.default_rng(0))
    text = F.normalize(model.text(rows(tokenize([[caption] for caption in captions])[:, 0])), dim=-1)
    whole, dense = encode(model.visual, crops)
    right = torch.arange(len(crops))
    found = [(similarity.argmax(1) == right).float().mean().item() for similarity in (whole @ text.t(),)]
    found += [(patch_aligned(dense, text).argmax(1) == right).float().mean().item()]
    prompts = fill_templates(WORLD.classes, CATSEG_TEMPLATES)
    class_text = F.normalize(model.text(rows(tokenize(prompts)[:, 0])), dim=-1)
    confusion = np.zeros((len(WORLD.classes),) * 2, np.int64)
    for index in range(config.evaluation_scenes):
        scene = fresh.scene(index, split="test")
        confusion += _confusion(zero_shot(model.visual, scene.image, class_text), scene.labels, len(confusion))
    seen, unseen = mean_iou(confusion, WORLD)
    return {"retrieval": found[0], "dense_retrieval": found[1], "seen": seen, "unseen": unseen}


@torch.no_grad()
def zero_shot(visual: ImageEncoder, image: np.ndarray[Any, Any], text: Tensor) -> np.ndarray[Any, Any]:
    """The baseline: each pixel the class of highest cosine. (H, W, 3) uint8 and (T, E) -> (H, W) int64."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    _, dense = encode(visual, pixels)
    grid = (image.shape[0] // visual.patch, image.shape[1] // visual.patch)
    maps = (dense @ text.t()).transpose(1, 2).unflatten(2, grid)
    maps = F.interpolate(maps, image.shape[:2], mode="bilinear", align_corners=False)
    return cast("np.ndarray[Any, Any]", maps[0].argmax(0).numpy())


def mean_iou(confusion: np.ndarray[Any, Any], vocabulary: Vocabulary) -> tuple[float, float]:
    """Mean IoU of seen and of unseen classes, of a confusion matrix (T true, T predicted); absent ones do not
    count, and without any it is NaN."""
    right, present = confusion.diagonal(), confusion.sum(1) > 0
    iou = right / np.maximum(confusion.sum(0) + confusion.sum(1) - right, 1)
    unseen = np.isin(np.arange(len(iou)), vocabulary.unseen)

    def mean(chosen: np.ndarray[Any, Any]) -> float:
        return float(iou[chosen].mean()) if chosen.any() else math.nan

    return mean(present & ~unseen), mean(present & unseen)


def to_open_clip(model: CLIP) -> dict[str, Tensor]:
    """The state dict in open_clip's layout: q, k and v in one matrix, the text encoder at the top."""
    state = dict(model.state_dict())
    joined = {}
    for name, tensor in state.items():
        name = name.removeprefix("text.")
        if name.endswith(("k_proj_weight", "v_proj_weight")):
            continue
        if name.endswith("q_proj_weight"):
            stem = name.removesuffix("q_proj_weight")
            full = stem if name.startswith("visual.") else "text." + stem
            tensor = torch.cat([state[f"{full}{part}_proj_weight"] for part in "qkv"])
            name = stem + "in_proj_weight"
        joined[name] = tensor.detach().clone()
    return joined


def _forget(rows: Tensor, probability: float, end: int, rng: np.random.Generator) -> Tensor:
    """Replace words by the unknown one; the start and the end token, the two last rows, stay."""
    forgotten = torch.from_numpy(rng.random(rows.shape) < probability)
    return rows.masked_fill(forgotten & (rows < end - 1), 0)


def _small_model(settings: dict[str, Any], known: KnownTokens, seed: int) -> CLIP:
    small = settings | {"text_cfg": settings["text_cfg"] | {"vocab_size": 1 + len(known)}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(small)


def _groups(model: CLIP, weight_decay: float) -> list[dict[str, Any]]:
    free = [p for name, p in model.named_parameters() if p.dim() < 2 or "embedding" in name]
    decayed = [p for name, p in model.named_parameters() if not (p.dim() < 2 or "embedding" in name)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def _learning_rate(step: int, config: PretrainingConfig) -> float:
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _resumable(config: PretrainingConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """What must not change between the parts of a run."""
    free = ("checkpoint_every", "evaluate_every", "evaluation_scenes")
    return {name: value for name, value in asdict(config).items() if name not in free} | {"clip": settings}


def _resume(
    path: Path, config: PretrainingConfig, settings: dict[str, Any], model: CLIP, optimizer: Any, schedule: Any
) -> tuple[int, list[dict[str, float]]]:
    if not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True)
    wanted = _resumable(config, settings)
    changed = [name for name in wanted if state["config"].get(name) != wanted[name]]
    if changed:
        raise ValueError(
            f"'{path}' was made with another {', '.join(changed)}; use the same settings to go on, or another folder."
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    logger.info("going on from step %d of '%s'", state["step"], path)
    return state["step"], state["history"]


def _confusion(predicted: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], classes: int) -> np.ndarray[Any, Any]:
    pairs = labels.astype(np.int64) * classes + predicted
    return np.bincount(pairs.ravel(), minlength=classes**2).reshape(classes, classes)


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="folder for the weights")
@click.option("--steps", default=PretrainingConfig.steps, show_default=True)
@click.option("--seed", default=PretrainingConfig.seed, show_default=True)
@click.option("--lr", default=PretrainingConfig.lr, show_default=True)
@click.option("--evaluate-every", default=PretrainingConfig.evaluate_every, show_default=True)
def main(out: Path, **settings: Any) -> None:
    """Train the tiny CLIP of the procedural world; the same command goes on where it was stopped."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    pretrain(PretrainingConfig(**settings), out)


if __name__ == "__main__":
    main()
