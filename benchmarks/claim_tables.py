"""The results of `claims.py` as a Markdown table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("agg")
from claim_forms import COMPARISONS
from matplotlib import pyplot

COLUMNS = {"miou_seen": "mIoU seen", "miou_unseen": "mIoU unseen", "hiou": "hIoU"}
COLOURS = {"miou_seen": "#7aa6c2", "miou_unseen": "#d1495b"}

Runs = Sequence[dict[str, Any]]


def values(runs: Runs, variant: str, metric: str) -> list[float]:
    """A metric of a variant in percent, one value per seed, by seed."""
    chosen = sorted((run["seed"], run[metric]) for run in runs if run["variant"] == variant)
    return [100 * value for _, value in chosen if value is not None]


def differences(runs: Runs, variant: str, other: str, metric: str) -> list[float]:
    """How far a variant's metric is above another's, in percentage points, for each seed that both have."""
    found = [{run["seed"]: run[metric] for run in runs if run["variant"] == each} for each in (variant, other)]
    pairs = [(of_variant, found[1].get(seed)) for seed, of_variant in sorted(found[0].items())]
    return [100 * (a - b) for a, b in pairs if a is not None and b is not None]


def table(settings: dict[str, Any], baseline: dict[str, Any], runs: Runs) -> str:
    """Markdown: a table per comparison, a row per variant, mean ± sample standard deviation over the seeds. `baseline`
    is CLIP alone."""
    catseg, cascade = settings["catseg"], settings["cascade"]
    lines = [
        "# Variants of both methods on the made-up world",
        "",
        f"Trained on seen combinations only, all from the same CLIP ({settings['clip']}): CAT-Seg {_schedule(catseg)}, "
        f"Cascade-CLIP {_schedule(cascade)}. Evaluated on {settings['scenes']} scenes of a world that none was trained "
        f"on (seed {settings['evaluation_world']}), with all classes, mode {settings['mode']}. "
        "Percentages: mean ± standard deviation over the seeds; the last column is of the differences between runs of "
        "the same seed. Written by `benchmarks/claims.py`.",
        "",
        "Zero-shot baseline, each pixel the class of highest cosine of that CLIP alone: "
        + ", ".join(f"{title} {_spread(_percent(baseline[metric]))}" for metric, title in COLUMNS.items())
        + ".",
    ]
    heads = ["", *COLUMNS.values(), "unseen, against published", "seeds"]
    for title, variants in COMPARISONS.items():
        published = next(variant for label, variant in variants.items() if "(published)" in label)
        lines += ["", f"## {title}", "", f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
        for label, variant in variants.items():
            cells = [_spread(values(runs, variant, metric)) for metric in COLUMNS]
            change = _spread(differences(runs, variant, published, "miou_unseen"), "+")
            seeds = sum(run["variant"] == variant for run in runs)
            cells += ["" if variant == published else change, str(seeds)]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(baseline: dict[str, Any], runs: Runs) -> pyplot.Figure:
    """A panel per comparison: bars of means with standard deviations, a dot per seed, and the baseline dashed."""
    figure, axes = pyplot.subplots(1, len(COMPARISONS), figsize=(18, 4.5), layout="constrained", sharey=True)
    for axis, (title, variants) in zip(axes, COMPARISONS.items(), strict=True):
        for place, variant in enumerate(variants.values()):
            for offset, (metric, colour) in zip((-0.2, 0.2), COLOURS.items(), strict=True):
                found = values(runs, variant, metric)
                if not found:
                    continue
                error = stdev(found) if len(found) > 1 else None
                axis.bar(place + offset, mean(found), 0.38, yerr=error, color=colour, capsize=3)
                axis.plot([place + offset] * len(found), found, "k.", markersize=4)
        for metric, colour in COLOURS.items():
            for height in _percent(baseline[metric]):
                axis.axhline(height, color=colour, linestyle="--", linewidth=1, zorder=0)
        axis.set_xticks(range(len(variants)), [_wrapped(label) for label in variants], fontsize=8)
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("mIoU, %")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    handles.append(pyplot.Line2D([], [], color="black", linestyle="--", linewidth=1))
    labels = [*(COLUMNS[metric] for metric in COLOURS), "zero-shot baseline"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _schedule(schedule: dict[str, Any]) -> str:
    clip = schedule["clip_learning_rate"]
    rates = f"{schedule['learning_rate']:g}" + (f" (CLIP {clip:g})" if clip else "")
    norm = schedule["max_gradient_norm"]
    clipped = f", gradients clipped to a norm of {norm:g}" if norm else ""
    return f"{schedule['steps']} steps of {schedule['batch']} images at a learning rate of {rates}{clipped}"


def _percent(value: float | None) -> list[float]:
    return [] if value is None else [100 * value]


def _spread(found: Sequence[float], sign: str = "") -> str:
    if not found:
        return "-"
    return f"{mean(found):{sign}.1f}" + (f" ± {stdev(found):.1f}" if len(found) > 1 else "")


def _wrapped(label: str) -> str:
    return label.replace(" (", "\n(").replace(", ", ",\n")
