"""The claims of the two papers, tested small: trains the variants that they compare on the made-up world.

    python benchmarks/claims.py                             everything; resumes if it was stopped
    python benchmarks/claims.py --only catseg --seeds 1     single variants
    python benchmarks/claims.py --table                     only the table and the plot, from the results so far

All variants start from the same pretrained tiny CLIP and are trained alike, on seen combinations only. Variants of a
method and a seed see the same images: the seed decides all other initial weights, the order of images and their
augmentation. Augmentation is the published one without colour distortion, since classes are named by colour. Learning
rates are higher than published, since there are far fewer steps, and Cascade-CLIP's gradients are clipped. Each model
is then evaluated with all classes on scenes of a world that none was trained on, in mode "whole", which shows them at
their size in training. A variant that occurs in several comparisons is trained once.

The results are written after each run, with a table (.md) and a plot (.png) beside them.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from claim_forms import VARIANTS, Variant
from claim_tables import plot, table
from safetensors import SafetensorError

import ovseg_fast
from ovseg_fast.data.world.scenes import WORLD, WorldScenes
from ovseg_fast.evaluation.evaluate import evaluate
from ovseg_fast.files import write_whole
from ovseg_fast.models.catseg import TEMPLATES
from ovseg_fast.models.clip import CLIP, TINY_CLIP
from ovseg_fast.models.presets import get_preset
from ovseg_fast.segmenter import Segmenter
from ovseg_fast.tiny.clip import zero_shot_scores
from ovseg_fast.training.config import DataConfig, TrainingConfig
from ovseg_fast.training.run import Run
from ovseg_fast.vocabulary import fill_templates, tokenize

FORMAT = "ovseg-fast claims"
OUT = Path(__file__).resolve().parent / "results" / "claims.json"
TRAINING_WORLD, EVALUATION_WORLD = 0, 20_000_003  # seeds; the first is what `TrainingConfig` trains on
METRICS = ("miou_seen", "miou_unseen", "hiou", "miou", "pixel_accuracy")
CASCADE_NORM = 1.0  # see `TrainingConfig.max_gradient_norm`
# Of a step and of an evaluated scene, on one core of a busy Xeon: an estimate until runs are timed.
SECONDS = {"cat-seg": (0.5, 0.05), "cascade-clip": (0.2, 0.04)}


@dataclass(frozen=True)
class Schedule:
    """How all variants of a method are trained; the fields are those of `TrainingConfig`."""

    steps: int
    batch: int
    learning_rate: float
    clip_learning_rate: float | None = None
    warmup: int = 0
    max_gradient_norm: float | None = None


@dataclass(frozen=True)
class Settings:
    """What the results depend on, besides variant and seed.

    Attributes:
        clip: digest of the weights that all variants start from. models: digest of the published models' sizes.
        scenes: number of scenes evaluated.
    """

    clip: str
    models: str
    catseg: Schedule
    cascade: Schedule
    scenes: int
    mode: str = "whole"
    training_world: int = TRAINING_WORLD
    evaluation_world: int = EVALUATION_WORLD

    def of(self, variant: Variant) -> Schedule:
        return self.catseg if get_preset(variant.preset).model.method == "cat-seg" else self.cascade


class Results:
    """The file of the finished runs, and of CLIP alone, `baseline`.

    Raises:
        ValueError: `path` holds something else, or runs with settings other than `settings` (None: any).
        FileNotFoundError: `settings` is None and there is no file.
    """

    def __init__(self, path: Path, settings: Settings | None) -> None:
        self.path = path
        self.runs: list[dict[str, Any]] = []
        self.baseline: dict[str, Any] | None = None
        if path.exists() or settings is None:
            content = _read(path)
            self.settings, self.baseline, self.runs = content["settings"], content["baseline"], content["runs"]
            if settings is not None:
                _check_same(path, self.settings, asdict(settings))
        else:
            self.settings = asdict(settings)

    def has(self, name: str, seed: int) -> bool:
        return any(run["variant"] == name and run["seed"] == seed for run in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        """Add a finished run and write the file."""
        self.runs.append(run)
        content = {"format": FORMAT, "settings": self.settings, "baseline": self.baseline, "runs": self.runs}
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, lambda file: file.write_text(text, encoding="utf-8"))

    def write_table(self) -> list[Path]:
        """Write table and plot of the runs so far; returns their paths."""
        written = [self.path.with_suffix(".md"), self.path.with_suffix(".png")]
        text, figure = table(self.settings, self.baseline, self.runs), plot(self.baseline, self.runs)
        write_whole(written[0], lambda file: file.write_text(text, encoding="utf-8"))
        write_whole(written[1], lambda file: figure.savefig(file, dpi=120))
        return written


def run_one(name: str, seed: int, settings: Settings, clip: str, progress: bool) -> dict[str, Any]:
    """Train and evaluate a variant once; returns its record for `Results`."""
    variant = VARIANTS[name]
    schedule = settings.of(variant)
    with tempfile.TemporaryDirectory(prefix="ovseg-claims-") as folder:
        config = TrainingConfig(
            model=variant.preset,
            out=folder,
            data=DataConfig("world"),
            policy=variant.policy,
            seen_only=True,
            distortion=False,
            seed=seed,
            workers=0,
            checkpoint_every=schedule.steps,
            **asdict(schedule),
        )
        began = time.monotonic()
        run = Run(config, progress=progress, model=variant.build(seed, clip))
        run.prepare(restart=False)
        run.go()
        trained = time.monotonic()
    scenes = WorldScenes.first(settings.scenes, "test", settings.evaluation_world)
    result = evaluate(Segmenter(run.model), scenes, mode=settings.mode, progress=progress)
    return {
        "variant": name,
        "seed": seed,
        "steps": schedule.steps,
        **{metric: _number(result.metrics[metric]) for metric in METRICS},
        "trained_parameters": sum(each.numel() for each in run.model.parameters() if each.requires_grad),
        "training_seconds": round(trained - began, 1),
        "evaluation_seconds": round(time.monotonic() - trained, 1),
        "threads": torch.get_num_threads(),
        "versions": {"ovseg-fast": ovseg_fast.__version__, "torch": torch.__version__},
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def run_all(names: Sequence[str], seeds: int, settings: Settings, clip: str, results: Results, progress: bool) -> None:
    """Run what is missing, seed by seed, so that a stopped command leaves complete comparisons."""
    missing = [(name, seed) for seed in range(seeds) for name in names if not results.has(name, seed)]
    for place, (name, seed) in enumerate(missing):
        if progress:
            left = expected_seconds([name for name, _ in missing[place:]], settings, results.runs)
            now = datetime.now().strftime("%H:%M")
            click.echo(f"{now} run {place + 1} of {len(missing)}: {name}, seed {seed}; about {left / 60:.0f} min left")
        results.add(run_one(name, seed, settings, clip, progress))


def expected_seconds(names: Sequence[str], settings: Settings, runs: Sequence[dict[str, Any]]) -> float:
    """Estimate how long runs of these variants take: as their earlier runs did, or as `SECONDS` says, scaled by how
    this machine has compared with that."""
    taken: dict[str, list[float]] = {}
    for run in runs:
        taken.setdefault(run["variant"], []).append(run["training_seconds"] + run["evaluation_seconds"])
    foreseen = {name: _foreseen(VARIANTS[name], settings) for name in {*names, *taken}}
    pace = 1.0
    if taken:
        pace = sum(map(sum, taken.values())) / sum(foreseen[name] * len(each) for name, each in taken.items())
    return sum(sum(taken[name]) / len(taken[name]) if name in taken else pace * foreseen[name] for name in names)


def _foreseen(variant: Variant, settings: Settings) -> float:
    step, scene = SECONDS[get_preset(variant.preset).model.method]
    return step * settings.of(variant).steps + scene * settings.scenes


def load_clip(clip: str) -> CLIP:
    """The CLIP that all variants start from. Raises ValueError or OSError if there is none."""
    if clip != TINY_CLIP and not Path(clip).is_file():
        raise FileNotFoundError(f"--clip must be {TINY_CLIP!r} or a file with weights of the tiny CLIP, got '{clip}'.")
    try:
        return CLIP(get_preset("catseg-tiny").config.clip, clip).eval()
    except (RuntimeError, SafetensorError):
        raise ValueError(f"--clip must hold the weights of the tiny CLIP; '{clip}' does not or is damaged.") from None


def clip_digest(clip: CLIP) -> str:
    """Identifies its weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def models_digest() -> str:
    """Identifies the sizes of the published models."""
    configs = [repr(get_preset(name).config) for name in sorted({variant.preset for variant in VARIANTS.values()})]
    return hashlib.sha256("\n".join(configs).encode()).hexdigest()[:16]


@torch.no_grad()
def zero_shot(clip: CLIP, settings: Settings) -> dict[str, float | None]:
    """Scores of that CLIP alone: each pixel the class of highest cosine."""
    tokens = tokenize(fill_templates(WORLD.classes, TEMPLATES))[:, 0]
    scenes = WorldScenes.first(settings.scenes, "test", settings.evaluation_world)
    scores = zero_shot_scores(clip.visual, F.normalize(clip.text(tokens), dim=-1), scenes)
    return {metric: _number(getattr(scores, metric)) for metric in METRICS}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there are no results at '{path}'.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"'{path}' is damaged or does not hold results of this command; choose another --out.")
    return content


def _check_same(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [f"{name} {saved.get(name)!r} is now {now[name]!r}" for name in now if saved.get(name) != now[name]]
    if changed:
        raise ValueError(f"'{path}' holds runs with other settings ({'; '.join(changed)}); choose another --out.")


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


@click.command()
@click.option("--clip", default=TINY_CLIP, show_default=True, help="The CLIP to start from: `world` or a file.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Number of seeds, from 0.")
@click.option("--only", multiple=True, type=click.Choice(list(VARIANTS)), help="Only this variant; repeatable.")
@click.option("--catseg-steps", default=400, show_default=True, type=click.IntRange(min=1))
@click.option("--catseg-batch", default=4, show_default=True, type=click.IntRange(min=1))
@click.option("--catseg-rate", default=1.5e-3, show_default=True, help="Learning rate.")
@click.option("--catseg-clip-rate", default=2e-4, show_default=True, help="Learning rate of CLIP's weights.")
@click.option("--cascade-steps", default=600, show_default=True, type=click.IntRange(min=1))
@click.option("--cascade-batch", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--cascade-rate", default=3e-4, show_default=True, help="Learning rate; ×10 for head and prompts.")
@click.option("--scenes", default=200, show_default=True, type=click.IntRange(min=1), help="Scenes to evaluate.")
@click.option("--out", default=OUT, type=click.Path(path_type=Path, dir_okay=False), help="The JSON file.")
@click.option("--table", "only_table", is_flag=True, help="Train nothing; write table and plot of the results so far.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def main(
    clip: str,
    seeds: int,
    only: tuple[str, ...],
    catseg_steps: int,
    catseg_batch: int,
    catseg_rate: float,
    catseg_clip_rate: float,
    cascade_steps: int,
    cascade_batch: int,
    cascade_rate: float,
    scenes: int,
    out: Path,
    only_table: bool,
    quiet: bool,
) -> None:
    """Train the variants that the CAT-Seg and Cascade-CLIP papers compare, on the made-up world, and tabulate them."""
    try:
        if only_table:
            results = Results(out, None)
        else:
            catseg = Schedule(catseg_steps, catseg_batch, catseg_rate, catseg_clip_rate)
            cascade = Schedule(
                cascade_steps, cascade_batch, cascade_rate, warmup=cascade_steps // 20, max_gradient_norm=CASCADE_NORM
            )
            model = load_clip(clip)
            settings = Settings(clip_digest(model), models_digest(), catseg, cascade, scenes)
            results = Results(out, settings)
            if results.baseline is None:
                results.baseline = zero_shot(model, settings)
            run_all(tuple(dict.fromkeys(only)) or tuple(VARIANTS), seeds, settings, clip, results, not quiet)
        written = results.write_table()
    except (ValueError, OSError, ArithmeticError) as error:
        click.echo(f"claims: {error}", err=True)
        sys.exit(1)
    for path in written:
        click.echo(str(path))


if __name__ == "__main__":
    main()
