"""Scores on the validation images in the course of a training, and a picture of some."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..compat import lacks_memory
from ..data import Dataset
from ..evaluation.evaluate import EvaluationError, Task, evaluate
from ..evaluation.results import Skipped
from ..files import write_whole
from ..segmenter import Segmenter
from .log import comparison

PICTURES = "pictures"

logger = logging.getLogger(__name__)


def check_names(segmenter: Segmenter, classes: Sequence[str], validation: Dataset | None) -> None:
    """Raises ValueError that names the table if the classes to train on, or those of the validation data, cannot be
    prompted."""
    table = "data"
    try:
        segmenter.check_prompts(classes)
        table = "validation"
        if validation is not None:
            Task(segmenter, validation)
    except (ValueError, TypeError) as error:
        raise ValueError(f"in [{table}]: {error}") from None


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
    rows: list[tuple[Image.Image, np.ndarray, np.ndarray]] = []
    for index in range(len(dataset)):
        name = dataset.pairs[index].name
        if len(rows) == pictures:
            break
        if name in broken:
            continue
        try:
            image, labels = dataset.read(index)
            rows.append((image, labels, segmenter.encode(image).segment(names).labels))
        except Exception as error:
            Skipped.of(name, error)  # raises what would recur
    if not rows:
        return result.metrics
    try:
        sheet = comparison(rows, names)
    except Exception as error:
        if not lacks_memory(error):
            raise
        logger.warning("the picture '%s' is left out: there is not enough memory", picture)
    else:
        try:
            picture.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot write '{picture}': {error.strerror or error}.") from error
        write_whole(picture, sheet.save)
    return result.metrics
