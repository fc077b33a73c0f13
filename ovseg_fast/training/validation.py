"""Scores on the validation images in the course of a training, and a picture of some."""

from __future__ import annotations

import logging
from pathlib import Path

from ..data import Dataset
from ..evaluation.evaluate import EvaluationError, evaluate
from ..evaluation.results import Skipped
from ..files import write_whole
from ..segmenter import Segmenter
from .log import comparison

PICTURES = "pictures"

logger = logging.getLogger(__name__)


def validate(
    segmenter: Segmenter, dataset: Dataset, picture: Path, pictures: int, progress: bool
) -> dict[str, float] | None:
    """The scores on a dataset, None if no image could be evaluated, which ends no training; the first `pictures` usable
    images are drawn to `picture`. Raises OSError if that cannot be written."""
    try:
        result = evaluate(segmenter, dataset, progress=progress)
    except EvaluationError as error:
        logger.warning("the validation is left out: %s", error)
        return None
    names = list(dataset.vocabulary.classes)
    broken = {item.name for item in result.skipped}
    rows = []
    for index in (i for i, pair in enumerate(dataset.pairs) if pair.name not in broken):
        if len(rows) == pictures:
            break
        try:
            image, labels = dataset.read(index)
            rows.append((image, labels, segmenter.encode(image).segment(names).labels))
        except Exception as error:
            Skipped.of(dataset.pairs[index].name, error)  # raises what would recur
    if rows:
        try:
            picture.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot write '{picture}': {error.strerror or error}.") from error
        write_whole(picture, comparison(rows, names).save)
    return result.metrics
