"""Trains the tiny CLIP on the image-caption pairs of the procedural world, from a seed, on a CPU.

    python -m ovseg_fast.tiny.clip --out build/clip --steps 40000

Each step draws scenes with their captions, crops around single things, and a caption of every class. Two contrastive
losses are added: CLIP's (Radford et al., 2021, arXiv 2103.00020), of class tokens and captions, and a patch-aligned one
after PACL (Mukhoti et al., CVPR 2023, arXiv 2212.04994), which averages the dense features that segmentation reads by
how well each patch fits a text. It compares captions of single things with the crops, with the scenes, and there once
more with those that differ only in the last word. Masks serve only to cut the crops. All random numbers follow from the
seed and the step.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from ..compat import ensure_importable
from ..data.vocabularies import WORLD
from ..data.world.scenes import World, WorldScenes
from ..evaluation.metrics import ConfusionMatrix, Scores
from ..files import write_whole
from ..models.catseg import TEMPLATES
from ..models.clip import CLIP, ImageEncoder
from ..models.presets import TINY_WORLD
from ..models.token_table import expand_embedding
from ..vocabulary import fill_templates, tokenize
from .contrast import encode, near_contrast, patch_aligned, soft_contrast
from .crops import LAST_WORDS, class_captions, object_crops, shown_classes
from .tokens import KnownTokens

CHECKPOINT, WEIGHTS = "checkpoint.pt", "clip.safetensors"
MAX_LOGIT_SCALE = math.log(100)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainingConfig:
    """How the tiny CLIP is trained.

    Attributes:
        seed: of the world, the initial weights and everything else. steps: of the optimiser.
        split: see `World.scene`. Both methods expect a CLIP that has read about everything, not the seen classes only.
        scenes: whole scenes per step. crops: most crops per step, cut from these scenes. crop_size: their side.
        lr: peak learning rate, reached after `warmup` steps, then a cosine to zero. weight_decay: of matrices.
        dense_weight: of the patch-aligned loss, relative to the plain one.
        forget: probability that a word of a caption becomes the unknown word, which is trained this way.
        checkpoint_every, evaluate_every: in steps. evaluation_scenes: fresh ones for the zero-shot segmentation.
    """

    seed: int = 0
    steps: int = 40_000
    split: str = "all"
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


def pretrain(
    config: PretrainingConfig,
    out: str | Path,
    clip_config: dict[str, Any] | None = None,
    *,
    device: str = "cpu",
    workers: int = 0,
) -> CLIP:
    """Train, or resume training; returns the CLIP with the whole token table.

    Args:
        out: folder, made if missing. It gets `checkpoint.pt`, from which the same call resumes, and at the end
            `clip.safetensors`, in open_clip's format, for `ovseg_fast.build(..., clip_pretrained=...)`.
        clip_config: of open_clip; `TINY_WORLD` by default. workers: processes that draw scenes ahead.

    Raises:
        ValueError: the checkpoint in `out` was made with other settings.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(clip_config or TINY_WORLD)
    known = KnownTokens()
    model = _small_model(settings, known, config.seed).to(device)
    optimizer = torch.optim.AdamW(_groups(model, config.weight_decay), lr=config.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, config))
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    free = ("checkpoint_every", "evaluate_every", "evaluation_scenes")  # may change between the parts of a run
    wanted = {name: value for name, value in asdict(config).items() if name not in free} | {"clip": settings}
    step, history = _resume(folder / CHECKPOINT, wanted, parts)
    started, first = time.monotonic(), step
    losses: list[float] = []

    batches = torch.utils.data.DataLoader(
        Batches(config), batch_size=None, sampler=range(step, config.steps), num_workers=workers
    )
    for batch in batches:
        model.train()
        total = batch_loss(model, batch, config)
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
            mean = float(np.mean(losses[-config.evaluate_every :]))
            history.append({"step": step, "loss": mean} | evaluate(model, config, known))
            logger.info("%s", "  ".join(f"{name} {value:.4g}" for name, value in history[-1].items()))
        elif step % 50 == 0:
            pace = (time.monotonic() - started) / (step - first)
            left = (config.steps - step) * pace / 3600
            logger.info("step %d  loss %.3f  %.2f s per step  %.1f h left", step, np.mean(losses[-50:]), pace, left)
        if step % config.checkpoint_every == 0 or last:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step, "config": wanted, "history": history}
            write_whole(folder / CHECKPOINT, partial(torch.save, state))
    table = expand_embedding(known.ids, model.text.token_embedding.weight.detach())
    model.text.token_embedding = torch.nn.Embedding.from_pretrained(table, freeze=False)
    write_whole(folder / WEIGHTS, lambda path: path.write_bytes(save(to_open_clip(model))))
    return model


class Batch(NamedTuple):
    """Training data of one step; texts are rows of the small token table.

    Attributes:
        scenes: (S, 3, 96, 96) uint8. text: (S, 77) their captions. shown: (S, T) bool, the classes in each.
        crops: (B, 3, h, h) uint8. labels: (B,) the class of each. phrases: (T, 77) a caption of each class.
    """

    scenes: Tensor
    text: Tensor
    shown: Tensor
    crops: Tensor
    labels: Tensor
    phrases: Tensor


class Batches(torch.utils.data.Dataset[Batch]):
    """The batch of each step: always the same one, whichever process makes it."""

    def __init__(self, config: PretrainingConfig) -> None:
        self.config, self.world, self.known = config, World(config.seed), KnownTokens()

    def __getitem__(self, step: int) -> Batch:
        count = self.config.scenes
        rng = np.random.default_rng([self.config.seed, 1, step])
        scenes = [self.world.scene(step * count + i, split=self.config.split) for i in range(count)]
        pixels = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
        crops = object_crops(scenes, self.config.crops, self.config.crop_size, rng)
        captions = [scene.captions[0] for scene in scenes], class_captions(rng)
        text, phrases = (self.known.forget(self.known.encode(each), self.config.forget, rng) for each in captions)
        return Batch(pixels, text, shown_classes(scenes), *crops, phrases)


def batch_loss(model: CLIP, batch: Batch, config: PretrainingConfig) -> Tensor:
    """The sum of a batch's contrastive losses."""
    ensure_importable()
    from open_clip import ClipLoss

    batch = Batch(*(tensor.to(model.visual.proj.device) for tensor in batch))
    contrast, scale = ClipLoss(), model.logit_scale.exp()
    text, phrases = (F.normalize(model.text(tokens), dim=-1) for tokens in (batch.text, batch.phrases))
    whole, dense = encode(model.visual, batch.scenes)
    crop, crop_dense = encode(model.visual, batch.crops)
    right = F.one_hot(batch.labels, len(phrases)).bool()
    plain = contrast(whole, text, scale) + soft_contrast(scale * crop @ phrases.t(), right)
    aligned = soft_contrast(scale * patch_aligned(crop_dense, phrases), right)
    in_scenes = scale * patch_aligned(dense, phrases)
    near = torch.tensor(LAST_WORDS, device=scale.device)
    aligned = aligned + soft_contrast(in_scenes, batch.shown) + near_contrast(in_scenes, batch.shown, near)
    return cast(Tensor, plain + config.dense_weight * aligned)


@torch.no_grad()
def evaluate(model: CLIP, config: PretrainingConfig, known: KnownTokens | None = None) -> dict[str, float]:
    """Accuracy of fresh crops among captions of all classes, `retrieval` by class token and `dense_retrieval` by
    patches; mIoU of fresh scenes, `seen` and `unseen`, by cosine. `known` if the model's token table is still small."""
    model.eval()
    fresh, device = World(config.seed + 1_000_003), model.visual.proj.device
    scenes = [fresh.scene(index) for index in range(2 * config.scenes)]
    rng = np.random.default_rng(0)
    crops, labels = object_crops(scenes, config.crops, config.crop_size, rng)

    def embed(prompts: list[str]) -> Tensor:
        tokens = known.encode(prompts) if known else tokenize([[prompt] for prompt in prompts])[:, 0]
        return F.normalize(model.text(tokens.to(device)), dim=-1)

    text, right = embed(class_captions(rng)), labels.to(device)
    whole, dense = encode(model.visual, crops.to(device))
    similarities = {"retrieval": whole @ text.t(), "dense_retrieval": patch_aligned(dense, text)}
    retrieval = {name: (best.argmax(1) == right).float().mean().item() for name, best in similarities.items()}
    class_text = embed([prompt for (prompt,) in fill_templates(WORLD.classes, TEMPLATES)])
    scores = zero_shot_scores(model.visual, class_text, WorldScenes.first(config.evaluation_scenes, "test", fresh.seed))
    return retrieval | {"seen": scores.miou_seen, "unseen": scores.miou_unseen}


def zero_shot_scores(visual: ImageEncoder, text: Tensor, dataset: WorldScenes) -> Scores:
    """Scores of the baseline on scenes of a world; text (T, E) of all its classes."""
    confusion = ConfusionMatrix(len(WORLD.classes))
    for index in range(len(dataset)):
        image, labels = dataset.read(index)
        confusion.update(zero_shot(visual, np.array(image), text), labels)
    return confusion.scores(sorted({*range(len(WORLD.classes))} - {*WORLD.unseen}))


@torch.no_grad()
def zero_shot(visual: ImageEncoder, image: np.ndarray[Any, Any], text: Tensor) -> np.ndarray[Any, Any]:
    """The baseline: per pixel the class of highest cosine. (H, W, 3) uint8 and (T, E) -> (H, W) int64."""
    _, dense = encode(visual, torch.from_numpy(image).permute(2, 0, 1)[None].to(text.device))
    grid = (image.shape[0] // visual.patch, image.shape[1] // visual.patch)
    maps = (dense @ text.t()).transpose(1, 2).unflatten(2, grid)
    maps = F.interpolate(maps, image.shape[:2], mode="bilinear", align_corners=False)
    return cast("np.ndarray[Any, Any]", maps[0].argmax(0).cpu().numpy())


def to_open_clip(model: CLIP) -> dict[str, Tensor]:
    """The state dict in open_clip's format: q, k and v in one matrix, the text encoder at the top."""
    state = model.state_dict()
    joined = {}
    for name, tensor in state.items():
        if name.endswith("q_proj_weight"):
            stem = name.removesuffix("q_proj_weight")
            name, tensor = f"{stem}in_proj_weight", torch.cat([state[f"{stem}{part}_proj_weight"] for part in "qkv"])
        if not name.endswith(("k_proj_weight", "v_proj_weight")):
            joined[name.removeprefix("text.")] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return joined


def _small_model(settings: dict[str, Any], known: KnownTokens, seed: int) -> CLIP:
    small = settings | {"text_cfg": settings["text_cfg"] | {"vocab_size": 1 + len(known)}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(small)


def _groups(model: CLIP, weight_decay: float) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (weight_decay, 0.0)]
    for name, parameter in model.named_parameters():
        groups[parameter.dim() < 2 or "embedding" in name]["params"].append(parameter)
    return groups


def _learning_rate(step: int, config: PretrainingConfig) -> float:
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _resume(path: Path, wanted: dict[str, Any], parts: dict[str, Any]) -> tuple[int, list[dict[str, float]]]:
    if not path.exists():
        return 0, []
    state = torch.load(path, map_location="cpu", weights_only=True)
    if names := ", ".join(name for name in wanted if state["config"].get(name) != wanted[name]):
        again = "resume with the same settings, or use another folder"
        raise ValueError(f"'{path}' was made with another {names}; {again}.")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    logger.info("resuming after step %d of '%s'", state["step"], path)
    return state["step"], state["history"]


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the weights.")
@click.option("--steps", default=PretrainingConfig.steps, show_default=True)
@click.option("--seed", default=PretrainingConfig.seed, show_default=True)
@click.option("--lr", default=PretrainingConfig.lr, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--workers", default=0, show_default=True, help="Processes that draw scenes ahead.")
@click.option("--evaluate-every", default=PretrainingConfig.evaluate_every, show_default=True)
def main(out: Path, device: str, workers: int, **settings: Any) -> None:
    """Train the tiny CLIP of the procedural world; the same command resumes a stopped run."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    pretrain(PretrainingConfig(**settings), out, device=device, workers=workers)


if __name__ == "__main__":
    main()
