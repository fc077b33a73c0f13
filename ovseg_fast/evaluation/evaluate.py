"""Evaluation of a model on a dataset, image by image, resumable."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .. import __version__, backends
from ..arguments import check_number, check_whole
from ..data.masks import NO_CLASS
from ..files import check_writable, held
from ..models.steady import autocast_dtype
from ..segmenter import Segmenter
from ..vocabulary import check_classes, check_seen
from .environment import environment
from .metrics import ConfusionMatrix, Scores
from .results import Evaluation, Skipped
from .state import State, fingerprint_of, stamp

if TYPE_CHECKING:
    from ..data import Dataset

SAVE_SECONDS = 20.0  # between two states on disk: what a kill costs at most, besides the current image
LONGEST_NAME = 220  # of a result, in bytes: with the time of an earlier one, it is to stay below 255
AHEAD = 4  # images read while the model works

logger = logging.getLogger(__name__)


class EvaluationError(ValueError):
    """No image could be evaluated; the message is one sentence."""


def evaluate(
    segmenter: Segmenter,
    dataset: Dataset,
    out: str | os.PathLike[str] | None = None,
    *,
    mode: str = "slide",
    seen: Collection[str] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    progress: bool = True,
    limit: int | None = None,
    restart: bool = False,
    save_seconds: float | None = None,
) -> Evaluation:
    """Segment every image of a dataset and compare with its ground truth, at the ground truth's size.

    Pixels of no class (-1) in the ground truth are not counted, nor are classes absent from it. An unusable pair (a
    damaged image, a mask that does not fit, too large for the memory) is left out, and named in a warning and in the
    result.

    Args:
        segmenter: the model; it is not changed.
        dataset: from `data.open_dataset`, or anything with its `name`, `vocabulary` (`classes`, `unseen`,
            `background`), `pairs` (each with a `name`) and `read(index)`; an `image_folder` tells equal names apart.
        out: a .json file for the result. Progress is kept next to it, in `<name>.partial.npz`: called again with the
            same arguments, a killed evaluation resumes and retries the images that were left out. An earlier result is
            kept under the time it was written.
        mode: as for `Segmenter.segment`.
        seen: those of the dataset's classes that the model was trained on. By default the scores are split as the
            dataset's vocabulary says, and the model's offset is subtracted as in `Segmenter.segment`.
        groups: class -> names that are prompted in its place and count as it. By default the background of the
            vocabulary, if any, as for the published PAS-20b; `{}` for none.
        limit: only the first `limit` images. restart: discard the progress of an earlier run.
        save_seconds: how often progress is saved, by default every 20 seconds.

    Raises:
        TypeError, ValueError: an argument does not fit, the dataset is empty, or another evaluation into `out` is under
            way.
        state.StateError: the state at `out` is damaged, of an evaluation with other weights, classes, images, ..., or
            an image or mask has changed since it was evaluated.
        EvaluationError: no image could be evaluated.
        OSError: `out` cannot be written. Errors of the model other than a lack of memory are passed on.
    """
    if save_seconds is not None:
        check_number("save_seconds", save_seconds, 0, what="a number of seconds")
    run = Run(
        segmenter, dataset, out, mode=mode, seen=seen, groups=groups, limit=limit, restart=restart, progress=progress
    )
    return run.go(progress=progress, save_seconds=save_seconds)


class Run:
    """An evaluation: everything that may be refused is, when this is made; then `go`. Arguments and errors are those of
    `evaluate`. Until `go` ends, no other run has the same `out`."""

    def __init__(
        self,
        segmenter: Segmenter,
        dataset: Dataset,
        out: str | os.PathLike[str] | None = None,
        *,
        mode: str = "slide",
        seen: Collection[str] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        limit: int | None = None,
        restart: bool = False,
        progress: bool = True,
    ) -> None:
        self.task = task = Task(segmenter, dataset, mode, seen=seen, groups=groups, limit=limit)
        self.target = None if out is None else check_target(out)
        self.text = segmenter.embed_text(task.names, progress=progress)
        self.partial = None if self.target is None else self.target.with_name(f"{self.target.stem}.partial.npz")
        self.settings = {**task.settings(), "limit": limit}
        fingerprint = task.fingerprint()
        self.settings["weights"] = fingerprint["weights"]
        now = environment(segmenter.device)
        self.state = State.new(fingerprint, len(task.classes), len(task.pairs))
        with ExitStack() as stack:
            if self.target is not None and self.partial is not None:
                self.target.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_alone(self.target))
                if not restart and self.partial.exists():
                    stamps = np.array([stamp(pair) for pair in task.pairs])
                    saved = State.load(self.partial, fingerprint, [pair.name for pair in task.pairs], stamps, now)
                    if saved is not None:
                        logger.info("%s: resuming after %d of %d", self.partial, saved.done.sum(), len(task.pairs))
                        self.state = saved
                self.state.environment = now
                self.state.save(self.partial)  # fails now, not after the first images, if nothing can be written
            self._lock = stack.pop_all()

    def go(self, *, progress: bool = True, save_seconds: float | None = None) -> Evaluation:
        """Evaluate what is left."""
        task, state, partial, target = self.task, self.state, self.partial, self.target
        with self._lock:
            skipped = _run(
                task, self.text, state, partial, progress, SAVE_SECONDS if save_seconds is None else save_seconds
            )
            if not state.done.any():
                if partial is not None:
                    partial.unlink(missing_ok=True)
                first = f"the first, {skipped[0].name}: {skipped[0].reason}"
                count, name = len(task.pairs), task.dataset.name
                raise EvaluationError(f"none of the {count} images of {name} could be evaluated; {first}")
            scores, images = Scores.of(state.matrix, task.split), int(state.done.sum())
            settings = self.settings | {"operators": state.operators | task.operators()}
            result = Evaluation(task.classes, scores, images, skipped, settings, _versions(), state.seconds)
            if target is not None and partial is not None:
                earlier = result.save(target)
                if earlier is not None:
                    logger.info("the earlier result is now %s", earlier)
                partial.unlink(missing_ok=True)
        return result


def check_target(out: str | os.PathLike[str]) -> Path:
    """The file for the result, if it can be written; makes nothing.

    Raises:
        ValueError: it is no .json file, its folder is none, or another evaluation into it is under way. OSError: the
            folder, or the one in which it is to be made, cannot be written to.
    """
    path = Path(out)
    if path.suffix != ".json":
        raise ValueError(f"out must be a file ending in .json, got '{path}'.")
    if "\0" in str(path) or len(os.fsencode(path.name)) > LONGEST_NAME:
        raise ValueError(
            f"out must be a file name of at most {LONGEST_NAME} bytes and without null, got {path.name!r}."
        )
    if path.exists() and not path.is_file():
        raise ValueError(f"out must be a file, '{path}' is {'a folder' if path.is_dir() else 'not a plain one'}.")
    check_writable(next(folder for folder in path.absolute().parents if folder.exists()), "out")
    if path.parent.exists():
        with _alone(path):
            pass
    return path


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold a lock file next to the result, and remove it in the end. Raises ValueError if another process has it."""
    lock = target.with_name(f".{target.stem}.lock")
    with held(lock, f"an evaluation into '{target.name}'"):
        try:
            yield
        finally:
            with suppress(OSError):  # as on Windows, while it is open
                lock.unlink()


class Task:
    """The arguments of `evaluate`, checked. T `names` are prompted, names[t] counts as class class_of[t]; `split` are
    the indices of the seen classes, `offset` the argument `seen` of `Segmenter.segment`."""

    def __init__(
        self,
        segmenter: Segmenter,
        dataset: Dataset,
        mode: str = "slide",
        *,
        seen: Collection[str] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        limit: int | None = None,
    ) -> None:
        if not isinstance(segmenter, Segmenter):
            raise TypeError(f"segmenter must be a Segmenter, as ovseg_fast.load gives, got {type(segmenter).__name__}.")
        if not hasattr(dataset, "pairs"):
            what = f"dataset must be a dataset, as ovseg_fast.data.open_dataset gives, got {type(dataset).__name__}."
            raise TypeError(what)
        if not len(dataset.pairs):
            raise ValueError(f"dataset {dataset.name} is empty, expected at least one image with its mask.")
        if limit is not None:
            check_whole("limit", limit, "images")
            if limit < 1:
                raise ValueError(f"limit must be at least 1 image, got {limit}.")
        backends.requested()  # raises for a bad OVSEG_BACKEND
        segmenter.check_mode(mode)
        self.segmenter, self.dataset, self.pairs, self.mode = segmenter, dataset, dataset.pairs[:limit], mode
        folder = getattr(dataset, "image_folder", None)
        self.folder = None if folder is None else os.path.abspath(folder)
        vocabulary = dataset.vocabulary
        self.classes = classes = list(vocabulary.classes)
        if seen is not None:
            check_seen(seen, classes, "the dataset's classes")
        if groups is None:
            groups = {classes[0]: vocabulary.background} if vocabulary.background else {}
        names, self.class_of = prompts_of(classes, groups)
        self.names = check_classes(names)
        self.split: list[int] | None = None
        self.offset: dict[str, Any] = {}
        if seen is not None:
            self.split = [i for i, name in enumerate(classes) if name in seen]
            if segmenter.model.seen_offset is not None:
                pairs = zip(self.names, self.class_of, strict=True)
                self.offset["seen"] = [name for name, position in pairs if position in self.split]
        elif vocabulary.unseen:
            self.split = [i for i in range(len(classes)) if i not in vocabulary.unseen]
        segmenter.check_prompts(self.names, **self.offset)
        self.precision = str(segmenter.model.pixel_mean.dtype).removeprefix("torch.")
        if (cast := autocast_dtype(segmenter.device)) is not None:
            self.precision += f" under autocast to {str(cast).removeprefix('torch.')}"

    def fingerprint(self) -> dict[str, str]:
        parts = {
            "templates": self.segmenter.templates,
            "classes": [self.classes, self.names, self.class_of.tolist()],
            "seen classes": [self.split, self.offset, self.segmenter.model.seen_offset],
            "mode": self.mode,
            "precision": self.precision,
            "dataset": self.dataset.name,
            "folder": str(self.folder),
            "images": [pair.name for pair in self.pairs],
        }
        return fingerprint_of(self.segmenter.model, parts)

    def settings(self) -> dict[str, Any]:
        """How the result was made."""
        model, device = self.segmenter.model, self.segmenter.device
        members: dict[str, list[str]] = {}
        for name, position in zip(self.names, self.class_of.tolist(), strict=True):
            members.setdefault(self.classes[position], []).append(name)
        settings: dict[str, Any] = {
            "model": model.preset or type(model).__name__,
            "dataset": self.dataset.name,
            "image_folder": self.folder,
            "mode": self.mode,
            "templates": list(self.segmenter.templates),
            "groups": {name: prompted for name, prompted in members.items() if prompted != [name]},
            "seen": None if self.split is None else [self.classes[i] for i in self.split],
            "precision": self.precision,
            "float32_products": torch.get_float32_matmul_precision(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {platform.machine()}",
        }
        if model.seen_offset is not None:
            settings["seen_offset"] = model.seen_offset
            settings["seen_offset_of"] = self.offset.get("seen", f"seen classes of {model.training_classes}")
        return settings

    def operators(self) -> dict[str, str]:
        """The backends that ran."""
        ran = {name: backends.last_backend(name) for name in backends.explain(self.segmenter.device).choices}
        return {name: backend for name, backend in ran.items() if backend is not None}


def prompts_of(classes: Sequence[str], groups: Mapping[str, Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """T names to prompt with, and (T,) int64 indices of the class that each counts as. `groups`: class -> names that
    stand for it; others are prompted by their own name.

    No prompt describes "everything else", so a pixel counts as PASCAL VOC's background if it is given to any of a list
    of further names (PAS-20b; CAT-Seg, Cho et al., CVPR 2024).

    Raises ValueError if a group is empty or of no class, or two classes share a name.
    """
    for name, members in groups.items():
        if name not in classes:
            raise ValueError(f"groups must be keyed by evaluated classes, got {name!r}, which is none of them.")
        if isinstance(members, str) or not members:
            raise ValueError(f"groups[{name!r}] must be a list of at least one name, got {members!r}.")
    prompted = [(member, index) for index, name in enumerate(classes) for member in groups.get(name, (name,))]
    names = [name for name, _ in prompted]
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"each name must stand for one class, {repeated!r} comes more than once.")
    return names, np.array([index for _, index in prompted], dtype=np.int64)


def _run(
    task: Task, text: Tensor, state: State, partial: Path | None, progress: bool, save_seconds: float
) -> list[Skipped]:
    """Evaluate what is missing in `state`, in place; returns what could not be evaluated."""
    segmenter = task.segmenter
    device = segmenter.device if segmenter.device.type == "cuda" else torch.device("cpu")
    confusion = ConfusionMatrix(len(task.classes), device)
    confusion.matrix += torch.from_numpy(state.matrix).to(device)
    class_of = torch.from_numpy(task.class_of).to(device)
    left = np.flatnonzero(~state.done).tolist()
    skipped: list[Skipped] = []
    hidden = None if progress else True  # None: only on a terminal
    bar = tqdm(total=len(state.done), initial=len(state.done) - len(left), unit="image", disable=hidden)
    began, before = time.monotonic(), state.seconds
    saved = began

    def save() -> None:
        state.matrix = confusion.matrix.cpu().numpy()
        state.seconds = before + time.monotonic() - began
        state.operators |= task.operators()
        bar.set_postfix_str(f"mIoU {100 * Scores.of(state.matrix).miou:.2f}")
        if partial is not None:
            state.save(partial)

    with bar:
        for position, pair in _read_ahead(task.dataset, left):
            try:
                image, labels, facts = pair.result()
                _check(image, labels, len(task.classes))
                result = segmenter.encode(image, task.mode).segment(task.names, text=text, **task.offset)
                # All of an image is counted, or nothing.
                confusion.update(class_of[torch.from_numpy(result.labels).to(device).long()], labels)
            except Exception as error:
                skipped.append(Skipped.of(task.pairs[position].name, error))
                bar.clear()
                logger.warning("%s is left out: %s", *skipped[-1])
            else:
                state.done[position], state.stamps[position] = True, facts
            bar.update()
            if time.monotonic() - saved >= save_seconds:
                save()
                saved = time.monotonic()
        save()
    return skipped


def _read_ahead(dataset: Dataset, indices: Iterable[int]) -> Iterator[tuple[int, Future[Any]]]:
    """Image, labels and `stamp` of each pair in order, read by one thread while the model works; a future raises what
    reading raised."""

    def read(index: int) -> tuple[Image.Image, np.ndarray, list[int]]:
        facts = stamp(dataset.pairs[index])  # first, so that a change in the meantime is noticed
        return (*dataset.read(index), facts)

    with ThreadPoolExecutor(1) as reader:
        waiting: deque[tuple[int, Future[Any]]] = deque()
        for index in indices:
            waiting.append((index, reader.submit(read, index)))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


def _check(image: Image.Image, labels: np.ndarray, classes: int) -> None:
    """Raises ValueError for ground truth that does not fit its image or the class list."""
    if labels.shape != (image.height, image.width):
        shape = " x ".join(map(str, labels.shape))
        raise ValueError(f"its mask is {shape} pixels, its image {image.height} x {image.width} (H x W).")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"its mask holds {labels.dtype} values, expected integers.")
    low, high = int(labels.min()), int(labels.max())
    if low < NO_CLASS or high >= classes:
        wrong = high if high >= classes else low
        pixels = np.count_nonzero(labels == wrong)
        raise ValueError(f"its mask holds label {wrong} in {pixels} pixels, beyond the {classes} classes.")


def _versions() -> dict[str, str]:
    versions = {"ovseg-fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchmetrics", "open_clip_torch", "numpy", "pillow"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # installed otherwise than by a package manager
            versions[name] = "unknown"
    return versions
