"""Retrains the models in this package, and measures them.

    python -m ovseg_fast.tiny.reproduce --out build/reproduce

First the tiny CLIP, on image-caption pairs of the procedural world; then from it the others, on scenes of seen
combinations, as `ovseg_fast/weights/*.toml` says. The weights are rounded to float16. Stopped parts resume.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch

from .. import checkpoints
from ..checkpoints.tensors import write_safetensors
from ..data.vocabularies import WORLD
from ..data.world.scenes import WorldScenes
from ..evaluation.evaluate import evaluate
from ..files import write_whole
from ..models import build
from ..models.catseg import TEMPLATES
from ..models.clip import CLIP, PACKAGED, TINY_CLIP
from ..models.presets import TINY_WORLD
from ..models.token_table import compact
from ..segmenter import load
from ..training.config import read_config, read_toml
from ..training.run import train
from ..vocabulary import fill_templates, tokenize
from .clip import WEIGHTS as CLIP_WEIGHTS
from .clip import PretrainingConfig, pretrain, zero_shot_scores

MODELS = ("catseg-tiny", "cascade-clip-tiny")
BASELINE = "zero-shot"
MEASURED = ("miou_seen", "miou_unseen", "hiou", "pixel_accuracy")
SCENES, SEEDS = 500, (1, 2, 3)  # measured on; training uses the world of seed 0 only

logger = logging.getLogger(__name__)


def reproduce(out: str | Path, *, share: float = 1.0, workers: int = 0) -> Path:
    """Train all three models; returns `weights` in the folder `out`, with the files as in `ovseg_fast/weights`.

    Args:
        share: of each training's steps; a small one only shows that everything runs.
        workers: processes that draw scenes ahead.

    Raises:
        ValueError: `share` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}.")
    folder = Path(out)
    weights = folder / "weights"
    weights.mkdir(parents=True, exist_ok=True)

    plan = read_toml(PACKAGED / "clip-tiny.toml", PretrainingConfig)
    plan = replace(plan, steps=max(1, round(share * plan.steps)), warmup=round(share * plan.warmup))
    pretrain(plan, folder / "clip", workers=workers)
    clip = folder / "clip" / CLIP_WEIGHTS
    state, _ = checkpoints.read(clip)
    packed = compact({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()})
    write_whole(weights / "clip-tiny.safetensors", lambda path: write_safetensors(path, packed, {}))
    for name in MODELS:
        config = read_config(PACKAGED / f"{name}.toml")
        config = replace(config, out=str(folder / name), clip_pretrained=str(clip), workers=workers)
        trained = train(replace(config, steps=max(1, round(share * config.steps))))
        model = build(name)
        checkpoints.load(model, trained)
        checkpoints.save(model, weights / f"{name}.safetensors", checkpoints.classes(trained), half=True)
    return weights


@torch.inference_mode()
def baseline(clip: CLIP, dataset: WorldScenes) -> dict[str, float]:
    """Scores of the tiny CLIP alone: per pixel the class of highest cosine."""
    prompts = fill_templates(WORLD.classes, TEMPLATES)
    text = torch.nn.functional.normalize(clip.text(tokenize(prompts)[:, 0]), dim=-1)
    scores = zero_shot_scores(clip.visual, text, dataset)
    return {name: float(getattr(scores, name)) for name in MEASURED}


def measure(
    weights: Path = PACKAGED, clip: str | Path = TINY_CLIP, seeds: Sequence[int] = SEEDS, scenes: int = SCENES
) -> dict[str, Any]:
    """Scores of the models and the baseline: `scenes`, `seeds` and `scores`, model -> a dict of `MEASURED` a seed.

    Args:
        weights: folder with the models' weights. clip: the tiny CLIP, as `models.clip.CLIP` takes it.
        seeds: of worlds not used in training. scenes: of each.
    """
    tiny = CLIP(TINY_WORLD, clip).eval()
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in (BASELINE, *MODELS)}
    for seed in seeds:
        dataset = WorldScenes.first(scenes, "test", seed)
        scores[BASELINE].append(baseline(tiny, dataset))
        for name in MODELS:
            metrics = evaluate(load(name, weights=weights / f"{name}.safetensors"), dataset).metrics
            scores[name].append({key: metrics[key] for key in MEASURED})
    return {"scenes": scenes, "seeds": list(seeds), "scores": scores}


def table(results: Mapping[str, Any]) -> str:
    """The results of `measure` as a Markdown table: percent, mean and standard deviation over the seeds."""
    rows = ["| model | seen mIoU | unseen mIoU | hIoU | pixel accuracy |", "|---|---|---|---|---|"]
    for name, runs in results["scores"].items():
        row = f"| {name} |"
        for key in MEASURED:
            values = [100 * run[key] for run in runs]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            row += f" {mean(values):.1f}{spread} |"
        rows.append(row)
    return "\n".join(rows)


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("build/reproduce"))
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Share of the steps.")
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Processes that draw scenes ahead.")
@click.option("--packaged", is_flag=True, help="Only measure the packaged weights.")
@click.option("--scenes", type=click.IntRange(min=1), default=SCENES, show_default=True, help="Per seed.")
@click.option("--seed", "seeds", type=click.IntRange(min=1), multiple=True, default=SEEDS, show_default=True)
def main(out: Path, share: float, workers: int, packaged: bool, scenes: int, seeds: tuple[int, ...]) -> None:
    """Retrain the tiny models of this package and measure them; the same command resumes a stopped run."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    out.mkdir(parents=True, exist_ok=True)
    if packaged:
        results = measure(seeds=seeds, scenes=scenes)
    else:
        weights = reproduce(out, share=share, workers=workers)
        results = measure(weights, out / "clip" / CLIP_WEIGHTS, seeds, scenes)
    write_whole(out / "results.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    click.echo(f"{scenes} scenes of each of the seeds {', '.join(map(str, seeds))}\n\n{table(results)}")


if __name__ == "__main__":
    main()
