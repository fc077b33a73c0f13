"""Plots of a GPU run: each operator's time by form, beside its floor.

python benchmarks/plot.py benchmarks/results/<gpu>.json     writes <gpu>-forward.png and <gpu>-with_backward.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

FORMS = {"eager": "#b0b0b0", "compile": "#7aa6c2", "triton": "#d1495b", "cuda": "#3c8d40"}
DTYPE = "bfloat16"


def plot(results: dict[str, Any], kind: str) -> pyplot.Figure:
    """Horizontal bars of microseconds on a logarithmic axis; a black mark is the floor. `kind` is a key of a form."""
    rows = {
        label.removesuffix(f" {DTYPE}"): entry
        for label, entry in results["operators"].items()
        if label.endswith(DTYPE) and kind in entry.get("triton", {})
    }
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.5 * len(rows)), layout="constrained")
    for place, entry in enumerate(rows.values()):
        for index, (form, colour) in enumerate(FORMS.items()):
            if kind in entry.get(form, {}):
                label = form if place == 0 else None
                axis.barh(place + 0.2 * (index - 1.5), entry[form][kind]["us"], 0.18, color=colour, label=label)
        floor = entry["triton"][kind]["floor_us"]
        axis.plot([floor, floor], [place - 0.4, place + 0.4], color="black", label="floor" if place == 0 else None)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("µs")
    machine = results["machine"]
    axis.set_title(
        f"{kind.replace('_', ' ')}, {DTYPE}: {machine['gpu']}, PyTorch {machine['torch']}, {machine['commit'][:7]}"
    )
    axis.legend()
    return figure


if __name__ == "__main__":
    source = Path(sys.argv[1])
    results = json.loads(source.read_text())
    for kind in ("forward", "with_backward"):
        target = source.with_name(f"{source.stem}-{kind}.png")
        plot(results, kind).savefig(target, dpi=120)
        print(target)
