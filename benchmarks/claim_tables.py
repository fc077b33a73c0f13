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
    """A metric of all runs of a variant, in percent, by seed."""
    chosen = sorted((run["seed"], run[metric]) for run in runs if run["variant"] == variant)
    return [100 * value for _, value in chosen if value is not None]


def table(settings: dict[str, Any], runs: Runs) -> str:
    """Markdown: for each comparison a row a variant, mean ± sample standard deviation over the seeds."""
    catseg, cascade = settings["catseg"], settings["cascade"]
    lines = [
        "# Variants of both methods on the procedural world",
        "",
        f"Trained on seen combinations only, all from the same CLIP ({settings['clip']}): CAT-Seg {_schedule(catseg)}, "
        f"Cascade-CLIP {_schedule(cascade)}. Evaluated on {settings['scenes']} scenes of a world that none was trained "
        f"on (seed {settings['evaluation_world']}), with all classes, mode {settings['mode']}. "
        "Percentages: mean ± standard deviation over the seeds. Written by `benchmarks/claims.py`.",
    ]
    for title, variants in COMPARISONS.items():
        lines += ["", f"## {title}", "", f"| | {' | '.join(COLUMNS.values())} | seeds |", "|---|" + "---:|" * 4]
        for label, variant in variants.items():
            cells = [_spread(values(runs, variant, metric)) for metric in COLUMNS]
            seeds = sum(run["variant"] == variant for run in runs)
            lines.append(f"| {label} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(lines) + "\n"


def plot(runs: Runs) -> pyplot.Figure:
    """A panel a comparison: bars of the means, their standard deviations, and a dot a seed."""
    figure, axes = pyplot.subplots(1, len(COMPARISONS), figsize=(18, 4.5), layout="constrained", sharey=True)
    for axis, (title, variants) in zip(axes, COMPARISONS.items(), strict=True):
        for place, variant in enumerate(variants.values()):
            for side, (metric, colour) in zip((-0.2, 0.2), COLOURS.items(), strict=True):
                found = values(runs, variant, metric)
                if not found:
                    continue
                error = stdev(found) if len(found) > 1 else None
                axis.bar(place + side, mean(found), 0.38, yerr=error, color=colour, capsize=3)
                axis.plot([place + side] * len(found), found, "k.", markersize=4)
        axis.set_xticks(range(len(variants)), [_wrapped(label) for label in variants], fontsize=8)
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("mIoU, %")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, [COLUMNS[metric] for metric in COLOURS], loc="outside lower center", ncols=2)
    return figure


def _schedule(schedule: dict[str, Any]) -> str:
    clip = schedule["clip_learning_rate"]
    rates = f"{schedule['learning_rate']:g}" + (f" (CLIP {clip:g})" if clip else "")
    return f"{schedule['steps']} steps of {schedule['batch']} images at a learning rate of {rates}"


def _spread(found: Sequence[float]) -> str:
    if not found:
        return "-"
    return f"{mean(found):.1f} ± {stdev(found):.1f}" if len(found) > 1 else f"{found[0]:.1f}"


def _wrapped(label: str) -> str:
    return label.replace(" (", "\n(").replace(", ", ",\n")
