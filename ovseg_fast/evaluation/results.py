"""The result of an evaluation: as numbers, as JSON, as a table."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ..compat import lacks_memory
from ..files import write_whole
from .metrics import Scores

FORMAT, VERSION = "ovseg-fast evaluation", 1
SCORES = {  # name: title in the table, rule
    "miou": ("mIoU", "mean IoU over the classes in the ground truth, as in detectron2"),
    "miou_nonzero_union": (
        "mIoU, also classes only predicted",
        "mean IoU over the classes in the ground truth or predicted, as in mmsegmentation",
    ),
    "pixel_accuracy": ("pixel accuracy", "share of the labelled pixels that are correct"),
    "mean_accuracy": ("mean class accuracy", "mean over the classes in the ground truth of their pixels' accuracy"),
    "miou_seen": ("mIoU seen", "miou over the classes that were trained on, listed by name"),
    "miou_unseen": ("mIoU unseen", "miou over the classes that were not trained on, listed by name"),
    "hiou": ("hIoU", "harmonic mean of miou_seen and miou_unseen"),
}
SPLIT = ("miou_seen", "miou_unseen", "hiou")
ABSENT = "a class without a pixel of ground truth is in no mean; pixels without a class count nowhere"


class Skipped(NamedTuple):
    """An image that was left out, and why."""

    name: str
    reason: str

    @classmethod
    def of(cls, name: str, error: Exception) -> Skipped:
        """Left out for this error, which is raised again unless it is due to this image: others would recur."""
        memory = lacks_memory(error)
        if not memory and not isinstance(error, (ValueError, OSError)):
            raise error
        text = " ".join(str(error).split())
        if memory and (asked := re.search(r"tried to allocate \d+ bytes", text)) is not None:
            text = f"not enough memory ({asked[0]})"  # without PyTorch's place in its own code
        elif memory and "memory" not in text.lower():
            text = f"not enough memory ({text or type(error).__name__})"
        return cls(name, text or repr(error))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The numbers of a model on a dataset.

    Attributes:
        images: how many were evaluated.
        settings: model, weights, dataset, mode, groups and whatever else the numbers depend on.
        versions: of the packages. seconds: the time the images took, reading included.
        finished: local time, ISO 8601.
    """

    classes: list[str]
    scores: Scores
    images: int
    skipped: list[Skipped]
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    finished: str = field(default_factory=lambda: datetime.now().astimezone().isoformat(timespec="seconds"))

    @property
    def metrics(self) -> dict[str, float]:
        """The scores by the names in `SCORES`, of which `SPLIT` need a split. NaN if no class counts."""
        names = [name for name in SCORES if self.scores.seen is not None or name not in SPLIT]
        return {name: getattr(self.scores, name) for name in names}

    @property
    def absent(self) -> list[str]:
        """Names of the classes absent from the ground truth, which are in no mean."""
        return [name for name, present in zip(self.classes, self.scores.present, strict=True) if not present]

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for JSON; null for a number without meaning."""
        scores = self.scores
        rows = []
        for i, name in enumerate(self.classes):
            row = {
                "name": name,
                "iou": _number(scores.iou[i]),
                "accuracy": _number(scores.accuracy[i]),
                "pixels": int(scores.truth[i]),
                "predicted_pixels": int(scores.predicted[i]),
                "correct_pixels": int(scores.correct[i]),
                "counted": bool(scores.present[i]),
            }
            rows.append(row if scores.seen is None else row | {"seen": bool(scores.seen[i])})
        return {
            "format": FORMAT,
            "version": VERSION,
            "finished": self.finished,
            "metrics": {name: _number(value) for name, value in self.metrics.items()},
            "rules": {name: SCORES[name][1] for name in self.metrics} | {"absent": ABSENT},
            "images": {"evaluated": self.images, "skipped": [item._asdict() for item in self.skipped]},
            "absent_classes": self.absent,
            "settings": self.settings,
            "versions": self.versions,
            "seconds": round(self.seconds, 3),
            "classes": rows,
        }

    def save(self, path: Path) -> Path | None:
        """Write the JSON, whole or not at all. An earlier file is kept under the time it was written; returns its path.
        Raises OSError if it cannot be written; an earlier file is then unchanged."""
        earlier = None
        if path.is_file():
            written = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%dT%H-%M-%S.%f")
            earlier = path.with_name(f"{path.stem}.{written}{path.suffix}")
            write_whole(earlier, lambda file: shutil.copy2(path, file))
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        # File names that are not UTF-8 hold surrogates, which become JSON's own escapes.
        content = text.encode("utf-8", "backslashreplace")
        write_whole(path, lambda file: file.write_bytes(content))
        return earlier

    def table(self) -> str:
        """Everything as plain text: percentages, one line per class."""
        scores, settings = self.scores, self.settings
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        model, dataset, mode = (settings[name] for name in ("model", "dataset", "mode"))
        lines = [f"{model} on {dataset}, mode {mode}: {self.images} images{skipped}", ""]
        width = max(min(len(name), 40) for name in ["class", *self.classes, *(title for title, _ in SCORES.values())])
        heads = ["IoU %", "accuracy %", "pixels %"] + ([] if scores.seen is None else ["split"])
        lines.append(_row("class", width, heads))
        total = max(int(scores.truth.sum()), 1)
        for i, name in enumerate(self.classes):
            # "-": not in the mean; the JSON has the IoU of a class that is only predicted, 0.
            iou = _percent(scores.iou[i]) if scores.present[i] else "-"
            cells = [iou, _percent(scores.accuracy[i]), f"{100 * scores.truth[i] / total:.2f}"]
            if scores.seen is not None:
                cells.append("seen" if scores.seen[i] else "unseen")
            lines.append(_row(name, width, cells))
        lines += ["", *(_row(SCORES[name][0], width, [_percent(value)]) for name, value in self.metrics.items())]
        lines += ["", f"means over {int(scores.present.sum())} of {len(self.classes)} classes"]
        if self.absent:
            lines.append(f"not counted, being absent from the ground truth: {', '.join(self.absent)}")
        lines += [f"skipped: {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def _row(name: str, width: int, cells: list[str]) -> str:
    short = name if len(name) <= width else name[: width - 1] + "…"
    return f"{short:<{width}}" + "".join(f"  {cell:>10}" for cell in cells)
