"""Segmenter: an image and class names in, a label for every pixel out."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from . import checkpoints, ops
from .images import MAX_SIDE, ImageSource, load_image
from .layers.prepared import Prepared
from .models import SegmentationModel, build, get_preset
from .models.base import is_compiled, unwrap
from .models.prompts import PromptCache
from .models.sliding import Windows
from .models.steady import (
    autocast_dtype,
    digest,
    in_evaluation,
    kept,
    parameters,
    refuse_overflow,
    undisturbed,
    versions,
    without_autocast,
)
from .ops.common.attention import prepare_attention
from .segmentation import Segmentation
from .vocabulary import check_classes, fill_templates, prompt_name

logger = logging.getLogger(__name__)


def load(
    name: str,
    *,
    weights: str | Path | None = "published",
    device: str | torch.device | None = None,
    max_side: int = MAX_SIDE,
    attention: str = "sdpa",
) -> Segmenter:
    """Load a model, ready to segment: in float32 and in evaluation mode.

    Args:
        name: a preset, such as `catseg-vitb` (`ovseg-fast info` lists them).
        weights: `"published"` for those in this package (the tiny models) or, downloaded once, the authors'; a path for
            a checkpoint in upstream's format or this package's; None for random ones.
        device: where to run; by default a GPU if available. max_side: largest accepted side of an image in pixels.
        attention: `"sdpa"` or `"xformers"`, see `build`.

    Raises:
        ValueError: no such preset, device or attention, or it has no published weights. TypeError: `weights` is
            something else. FileNotFoundError: no such file. ImportError: open_clip or xformers is not installed.
        RuntimeError: no such device here. OSError: the download failed.
        checkpoints.CheckpointError: the file is damaged or belongs to another model.
    """
    target = check_device(device)
    get_preset(name)
    prepare_attention(attention)
    if weights is not None and not isinstance(weights, (str, os.PathLike)):
        raise TypeError(f"weights must be 'published', a file or None, got {type(weights).__name__}.")
    path = checkpoints.download(name) if weights == "published" else weights
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"weights must be a checkpoint file, there is none at {path}.")
    with undisturbed():
        model = build(name, attention=attention).to(torch.float32)
        model.set_statistics(torch.float32)
        if path is not None:
            checkpoints.load(model, path)
        model = model.to(target).eval()
    return Segmenter(model, max_side=max_side)


class Segmenter:
    """A model with everything around it: reading images, prompting, windows, labels.

    Threads may share one. The model is run in evaluation mode and without gradients, and its own mode is left as it is;
    what a call returns does not depend on the blocks around it, such as `torch.inference_mode`, apart from autocast.

    Args:
        model: on the device to run on. One that `torch.compile`, `DataParallel` or the like wraps is taken out of it.
        templates: prompts for each class name, each with one `{}`; by default the published ones.
        max_side: largest accepted side of an image in pixels.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence says which and how.
    """

    def __init__(
        self, model: SegmentationModel, *, templates: Sequence[str] | None = None, max_side: int = MAX_SIDE
    ) -> None:
        self._lock = threading.Lock()
        self._compile_options: dict[str, Any] | None = None
        self.model, self.max_side = model, max_side
        self.templates = tuple(self.model.templates if templates is None else templates)
        wanted, got = self.model.prompts_per_class, len(self.templates)
        if wanted not in (None, got):
            raise ValueError(f"templates must hold as many prompts as the model takes per class, {wanted}, got {got}.")

    @property
    def model(self) -> SegmentationModel:
        """The model itself, without any wrapper."""
        return self._model

    @model.setter
    def model(self, model: SegmentationModel) -> None:
        inner = unwrap(model)
        if any(tensor.is_meta for tensor in parameters(inner)):
            raise ValueError("model must hold weights, got one on 'meta'; load them on a device that computes.")
        self._model = inner
        if is_compiled(model):
            logger.warning("a Segmenter runs parts of its model, which are not compiled yet: call its compile() method")
        self._forget()

    def _forget(self) -> None:
        """Start with empty caches."""
        self._prompt_cache = PromptCache()
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._head_digest: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.model.pixel_mean.device

    def compile(self, **options: Any) -> None:
        """Compile what `segment` runs for each window, image encoder and head, at its next call.

        The text encoder is left as it is: it runs once per prompt, and only uncompiled on the prompt's own length.

        Args:
            options: of `torch.compile`.
        """
        self._compile_options, self._compiled = options, {}

    def segment(
        self,
        image: ImageSource | list[ImageSource] | tuple[ImageSource, ...],
        classes: Sequence[str] | None = None,
        *,
        mode: str = "slide",
        text: Tensor | ArrayLike | None = None,
        seen: Collection[str] | None = None,
        scores: bool | None = None,
        progress: bool = False,
    ) -> Segmentation | list[Segmentation]:
        """Label every pixel with one of the classes; a list of images gives a list of results.

        Args:
            image: a path, a PIL image or a uint8 array (H, W, 3); or a list of them.
            classes: T names, such as `["cat", "grass", "sky"]`. Of synonyms, `"door, double door"`, the first is used.
            mode: `"slide"`, in which all published numbers were made, or `"whole"`, one pass over the resized image.
            text: embeddings (T, P, E) or (T, E) in place of prompts; then `classes` only names them and is optional.
            seen: the classes that a model with a `seen_offset` (Cascade-CLIP: 0.1) was trained on, from whose
                probabilities it is subtracted; by default those of its training set. For others it must be None.
            scores: keep the logits on the device, T maps for each window, so that the results have `scores` and `top`;
                by default for one image, and not for a list.
            progress: show progress bars over prompts and windows.

        Raises:
            ValueError, TypeError, FileNotFoundError: an argument does not fit; the sentence says which and how.
            FloatingPointError: the model's numbers are NaN or infinite.
        """
        self.check_mode(mode)
        prompts = self._prompts(classes, text, seen, progress)

        def one(image: ImageSource, keep: bool) -> Segmentation:
            return self.encode(image, mode, progress=progress)._segment(prompts, keep, progress)

        if isinstance(image, (list, tuple)):
            return [one(each, bool(scores)) for each in image]
        return one(image, scores is not False)

    def check_mode(self, mode: str) -> None:
        """Raises ValueError for a mode that the model does not have."""
        if mode not in self.model.modes:
            raise ValueError(f"mode must be {' or '.join(map(repr, self.model.modes))}, got {mode!r}.")

    def encode(self, image: ImageSource, mode: str = "slide", *, progress: bool = False) -> EncodedImage:
        """Run the image encoder once, to prompt the result many times. Arguments and errors as `segment`."""
        self.check_mode(mode)
        picture = load_image(image, max_side=self.max_side)
        with undisturbed():
            dtype, weights = self.model.pixel_mean.dtype, versions(parameters(self.model))
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(self.device, dtype)
            windows = self.model.windows(pixels, mode)
            # Several windows fill a GPU; a CPU is faster with one, whose tensors stay in its caches.
            batches = windows.pixels.split(1 if self.device.type == "cpu" else 8)
            run, compiled = self._runner("encode_pixels")
            # Copies of what is compiled: a CUDA graph overwrites its outputs.
            features = [kept(run(batch), dtype, clone=compiled) for batch in _bar(batches, "image", progress)]
        return EncodedImage(self, picture, windows, features, weights)

    def embed_text(self, classes: Sequence[str], *, progress: bool = False) -> Tensor:
        """Unit-length text embeddings (T, P, E) of class names; cached until the text encoder's weights change.

        Raises:
            ValueError, TypeError: as `segment`. FloatingPointError: the embeddings are NaN or infinite.
        """
        names = [prompt_name(entry) for entry in check_classes(classes)]
        prompts = fill_templates(names, self.templates)
        wanted = dict.fromkeys(prompt for row in prompts for prompt in row)
        found = self._prompt_cache.embed(self.model, wanted, lambda parts: _bar(parts, "text", progress))
        with undisturbed():
            return torch.stack([torch.stack([found[prompt] for prompt in row]) for row in prompts])

    def _prompts(
        self, classes: Sequence[str] | None, text: Any, seen: Collection[str] | None, progress: bool
    ) -> _Prompts:
        if text is None:
            if classes is None:
                raise ValueError("classes must be a list of names such as ['cat', 'grass'], got None and no text.")
            names = check_classes(classes)
            embeddings = self.embed_text(names, progress=progress)
        else:
            with undisturbed():
                embeddings = _own_embeddings(text).to(self.device, self.model.pixel_mean.dtype)
            names = [f"class {i}" for i in range(len(embeddings))] if classes is None else check_classes(classes)
            if len(names) != len(embeddings):
                raise ValueError(f"classes must name the {len(embeddings)} rows of text, got {len(names)} names.")
        with undisturbed(), without_autocast(self.device):
            return _Prompts(names, self.model.text_from_prompts(embeddings), self._offset(names, seen))

    def _offset(self, names: list[str], seen: Collection[str] | None) -> Tensor | None:
        """What is subtracted from each class's probability, (T,), or None."""
        model = self.model
        if model.seen_offset is None:
            if seen is not None:
                method = type(model).__name__
                raise ValueError(f"seen must be None, as {method} treats all classes alike, got {seen!r}.")
            return None
        if seen is None:
            seen = model.trained_on
        elif isinstance(seen, str) or not set(seen) <= set(names):
            raise ValueError(f"seen must be a list of names out of classes, got {seen!r}.")
        known = {prompt_name(entry).casefold() for entry in seen}
        flags = [prompt_name(name).casefold() in known for name in names]
        return model.seen_offset * torch.tensor(flags, dtype=model.pixel_mean.dtype, device=self.device)

    def _runner(self, part: str) -> tuple[Callable[..., Any], bool]:
        """A method of the model in evaluation mode, and whether it is compiled; it is not while the model trains."""
        model, options = in_evaluation(self.model), self._compile_options
        if options is None or model is not self.model:
            return getattr(model, part), False
        if part not in self._compiled:
            self._compiled[part] = torch.compile(getattr(model, part), **options)
        return self._compiled[part], True

    def _forget_old_weights(self) -> None:
        """Where the layers do not see a write through `.data` to their weights, see it for them; see `Prepared`."""
        if Prepared.compares(self.device):
            return
        owners = [
            part for part in self.model.modules() if any(isinstance(child, Prepared) for child in part.children())
        ]
        with self._lock:
            found = digest(dict.fromkeys(tensor for part in owners for tensor in parameters(part)))
            if found != self._head_digest:
                for part in owners:
                    for child in part.children():
                        if isinstance(child, Prepared):
                            child.entries.clear()
                self._head_digest = found

    def __getstate__(self) -> dict[str, Any]:
        left_out = "_lock", "_prompt_cache", "_compiled", "_head_digest"  # made anew
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._forget()


class _Prompts(NamedTuple):
    """Class names, `text` for the model's `decode`, and what is subtracted from each class's probability."""

    names: list[str]
    text: Tensor
    offset: Tensor | None


class EncodedImage:
    """The features of an image, in the model's dtype, to be prompted with any classes. Made by `Segmenter.encode`.

    A pickled one brings its Segmenter and the model along.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        image: Image.Image,
        windows: Windows,
        features: list[Any],
        weights: tuple[Any, ...],
    ) -> None:
        self._segmenter, self._weights = segmenter, weights
        self.image, self.windows, self.features = image, windows, features

    def segment(
        self,
        classes: Sequence[str] | None = None,
        *,
        text: Tensor | ArrayLike | None = None,
        seen: Collection[str] | None = None,
        scores: bool = True,
        progress: bool = False,
    ) -> Segmentation:
        """Label every pixel with one of the classes; arguments and errors as `Segmenter.segment`.

        Raises:
            ValueError: also if the model's weights, dtype or device have changed since.
        """
        self._check_weights()
        return self._segment(self._segmenter._prompts(classes, text, seen, progress), scores, progress)

    def _check_weights(self) -> None:
        if versions(parameters(self._segmenter.model)) != self._weights:
            raise ValueError(
                "the model's weights, dtype or device have changed since the image was encoded; encode it again."
            )

    def _segment(self, prompts: _Prompts, keep: bool, progress: bool) -> Segmentation:
        windows, segmenter = self.windows, self._segmenter
        model, device, dtype = segmenter.model, segmenter.device, segmenter.model.pixel_mean.dtype
        segmenter._forget_old_weights()
        with undisturbed():
            decode, _ = segmenter._runner("decode")
            parts = _bar(self.features, "classes", progress)
            found = [decode(features, prompts.text, **windows.decode) for features in parts]
            # Of many classes, a model may compute the logits of a few alone, for each window its own.
            few = isinstance(found[0], ops.KeptLogits)
            logits = torch.cat([(part.logits if few else part).to(dtype) for part in found])
            if windows.cut is not None:
                logits = logits[..., : windows.cut[0], : windows.cut[1]]
            if few:
                kept = found[0]._replace(classes=torch.cat([part.classes for part in found]))

            def maps(which: slice) -> Tensor | ops.KeptLogits:
                part = logits[which]
                return kept._replace(logits=part, classes=kept.classes[which]) if few else part

            windowed = slice(-1 if windows.has_whole else None)
            size = self.image.height, self.image.width
            arguments: dict[str, Any] = {
                "logits": maps(windowed),
                "placement": ops.Placement(windows.positions, windows.window, windows.canvas, size),
                "whole": maps(slice(-1, None)) if windows.has_whole else None,
                "offset": prompts.offset,
            }
            # One pass over the logits; only if their sum overflows are they checked one by one.
            total = logits.sum(dtype=torch.promote_types(dtype, torch.float32))
            with without_autocast(device):
                labels = ops.label_map(**arguments).cpu().numpy()
            if not total.isfinite() and not logits.isfinite().all():
                refuse_overflow(model, "logits", autocast_dtype(device) or dtype)
        if not keep:
            return Segmentation(self.image, prompts.names, labels)

        def compute_scores() -> np.ndarray:
            with undisturbed(), without_autocast(device):
                return model.scores(ops.score_map(**arguments)).float().cpu().numpy()

        def compute_top(k: int) -> tuple[np.ndarray, np.ndarray]:
            with undisturbed(), without_autocast(device):
                scores, labels = ops.top_labels(k=k, **arguments)
                return labels.cpu().numpy(), scores.float().cpu().numpy()

        return Segmentation(self.image, prompts.names, labels, compute_scores, compute_top)

    def __getstate__(self) -> dict[str, Any]:
        self._check_weights()
        return {name: value for name, value in self.__dict__.items() if name != "_weights"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._weights = versions(parameters(self._segmenter.model))


def check_device(device: str | torch.device | None) -> torch.device:
    """The device, once it is known to be there and to hold numbers."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be a PyTorch device such as 'cpu' or 'cuda:0', got {device!r}.") from None
    if target.type == "meta":
        raise ValueError("device must be one that computes, such as 'cpu' or 'cuda:0', got 'meta'.")
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"device must be 'cpu', as PyTorch finds no CUDA GPU here, got '{target}'.")
        if (target.index or 0) >= (count := torch.cuda.device_count()):
            there = "'cuda:0' is the only GPU" if count == 1 else f"the GPUs are 'cuda:0' to 'cuda:{count - 1}'"
            raise RuntimeError(f"device must be one of this machine; {there}, got '{target}'.")
        return target
    try:
        torch.empty(1, device=target)
    except (RuntimeError, NotImplementedError, AssertionError, ImportError):
        others = "'cpu' or 'cuda'" if torch.cuda.is_available() else "'cpu'"
        raise RuntimeError(f"device must be one that PyTorch finds here, such as {others}, got '{target}'.") from None
    return target


def _own_embeddings(text: Tensor | ArrayLike) -> Tensor:
    """(T, P, E) unit-length floats from a caller's embeddings."""
    embeddings = torch.as_tensor(text)
    if not embeddings.is_floating_point():
        raise TypeError(f"text must be floating-point embeddings, got {embeddings.dtype}.")
    if embeddings.dim() == 2:
        embeddings = embeddings.unsqueeze(1)
    if embeddings.dim() != 3 or 0 in embeddings.shape:
        raise ValueError(f"text must have shape (T, P, E) or (T, E) with no size zero, got {tuple(embeddings.shape)}.")
    if not embeddings.isfinite().all():
        raise ValueError("text must be finite, got NaN or infinite embeddings.")
    return F.normalize(embeddings.detach(), dim=-1)


def _bar(items: Sequence[Any], what: str, show: bool) -> Any:
    return tqdm(items, desc=what, leave=False, disable=None if show else True)  # None: only on a terminal
