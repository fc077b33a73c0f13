"""Segmenter: an image and class names in, a label for every pixel out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
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
from .models import SegmentationModel, build, get_preset
from .models.clip import TEXT_BATCH
from .models.sliding import Windows
from .ops.common.attention import prepare_attention
from .segmentation import Segmentation
from .vocabulary import check_classes, fill_templates, prompt_name, tokenize

TEXT_CACHE_PROMPTS = 50_000  # embeddings kept: 100 MB at 512 channels


def load(
    name: str,
    *,
    weights: str | Path | None = "published",
    device: str | torch.device | None = None,
    max_side: int = MAX_SIDE,
    attention: str = "sdpa",
) -> Segmenter:
    """Load a model, ready to segment.

    Args:
        name: a preset, such as `catseg-vitb` (`ovseg-fast info` lists them).
        weights: `"published"` for those in this package (the tiny models) or, downloaded once, the authors'; a path for
            a checkpoint in upstream's format or this package's; None for random ones.
        device: where to run; by default a GPU if available. max_side: largest accepted side of an image in pixels.
        attention: `"sdpa"` or `"xformers"`, see `build`.

    Raises:
        ValueError: no such preset or attention, or it has no published weights. FileNotFoundError: no such file.
        ImportError: xformers is not installed. RuntimeError: no such device here. OSError: the download failed.
        checkpoints.CheckpointError: the file is damaged or belongs to another model.
    """
    target = _device(device)
    get_preset(name)
    prepare_attention(attention)
    path = checkpoints.download(name) if weights == "published" else weights
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"weights must be a checkpoint file, there is none at {path}.")
    model = build(name, attention=attention)
    if path is not None:
        checkpoints.load(model, path)
    return Segmenter(model.to(target), max_side=max_side)


class Segmenter:
    """A model with everything around it: reading images, prompting, windows, labels.

    Args:
        model: on the device to run on. max_side: largest accepted side of an image in pixels.
        templates: prompts for each class name, each with one `{}`; by default the published ones.
    """

    def __init__(
        self, model: SegmentationModel, *, templates: Sequence[str] | None = None, max_side: int = MAX_SIDE
    ) -> None:
        self.model, self.max_side = model, max_side
        self.templates = tuple(model.templates if templates is None else templates)
        self._prompt_embeddings: dict[str, Tensor] = {}
        self._text_version: tuple[Any, ...] = ()
        wanted, got = model.prompts_per_class, len(self.templates)
        if wanted not in (None, got):
            raise ValueError(f"templates must hold as many prompts as the model takes per class, {wanted}, got {got}.")

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.model.pixel_mean.device

    def segment(
        self,
        image: ImageSource | list[ImageSource] | tuple[ImageSource, ...],
        classes: Sequence[str] | None = None,
        *,
        mode: str = "slide",
        text: Tensor | ArrayLike | None = None,
        seen: Collection[str] | None = None,
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
            progress: show progress bars over prompts and windows.

        Raises:
            ValueError, TypeError, FileNotFoundError: an argument does not fit; the sentence says which and how.
        """
        self.check_mode(mode)
        prompts = self._prompts(classes, text, seen, progress)
        if isinstance(image, (list, tuple)):
            return [self.encode(one, mode, progress=progress)._segment(prompts, progress) for one in image]
        return self.encode(image, mode, progress=progress)._segment(prompts, progress)

    def check_mode(self, mode: str) -> None:
        """Raises ValueError for a mode that the model does not have."""
        if mode not in self.model.modes:
            raise ValueError(f"mode must be {' or '.join(map(repr, self.model.modes))}, got {mode!r}.")

    def encode(self, image: ImageSource, mode: str = "slide", *, progress: bool = False) -> EncodedImage:
        """Run the image encoder once, to prompt the result many times. Arguments and errors as `segment`."""
        self.check_mode(mode)
        picture = load_image(image, max_side=self.max_side)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(self.device, self.model.pixel_mean.dtype)
        with self._inference():
            windows = self.model.windows(pixels, mode)
            # Several windows fill a GPU; a CPU is faster with one, whose tensors stay in its caches.
            batches = windows.pixels.split(1 if self.device.type == "cpu" else 8)
            features = [self.model.encode_pixels(batch) for batch in _bar(batches, "image", progress)]
        return EncodedImage(self, picture, windows, features)

    def embed_text(self, classes: Sequence[str], *, progress: bool = False) -> Tensor:
        """Unit-length text embeddings (T, P, E) of class names; cached until the text encoder's weights change."""
        names = [prompt_name(entry) for entry in check_classes(classes)]
        prompts = fill_templates(names, self.templates)
        encoder = self.model.text_encoder
        version = tuple((id(p), p._version, p.device) for p in encoder.parameters())
        if version != self._text_version or len(self._prompt_embeddings) > TEXT_CACHE_PROMPTS:
            self._prompt_embeddings.clear()
            self._text_version = version
        wanted = dict.fromkeys(prompt for row in prompts for prompt in row)
        missing = [prompt for prompt in wanted if prompt not in self._prompt_embeddings]
        if missing:
            tokens = tokenize([[prompt] for prompt in missing]).to(self.device)
            with self._inference():
                batches = _bar(tokens.split(TEXT_BATCH), "text", progress)
                embedded = torch.cat([self.model.encode_text(batch)[:, 0] for batch in batches])
            self._prompt_embeddings.update(zip(missing, embedded, strict=True))
        return torch.stack([torch.stack([self._prompt_embeddings[prompt] for prompt in row]) for row in prompts])

    def _prompts(
        self, classes: Sequence[str] | None, text: Any, seen: Collection[str] | None, progress: bool
    ) -> _Prompts:
        if text is None:
            if classes is None:
                raise ValueError("classes must be a list of names such as ['cat', 'grass'], got None and no text.")
            names = check_classes(classes)
            embeddings = self.embed_text(names, progress=progress)
        else:
            embeddings = _own_embeddings(text).to(self.device, self.model.pixel_mean.dtype)
            names = [f"class {i}" for i in range(len(embeddings))] if classes is None else check_classes(classes)
            if len(names) != len(embeddings):
                raise ValueError(f"classes must name the {len(embeddings)} rows of text, got {len(names)} names.")
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

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluation mode without gradients, whatever state the model is in."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)


class _Prompts(NamedTuple):
    """Class names, `text` for the model's `decode`, and what is subtracted from each class's probability."""

    names: list[str]
    text: Tensor
    offset: Tensor | None


class EncodedImage:
    """The features of an image, to be prompted with any classes. Made by `Segmenter.encode`."""

    def __init__(self, segmenter: Segmenter, image: Image.Image, windows: Windows, features: list[Any]) -> None:
        self._segmenter = segmenter
        self.image, self.windows, self.features = image, windows, features

    def segment(
        self,
        classes: Sequence[str] | None = None,
        *,
        text: Tensor | ArrayLike | None = None,
        seen: Collection[str] | None = None,
        progress: bool = False,
    ) -> Segmentation:
        """Label every pixel with one of the classes; arguments and errors as `Segmenter.segment`."""
        return self._segment(self._segmenter._prompts(classes, text, seen, progress), progress)

    def _segment(self, prompts: _Prompts, progress: bool) -> Segmentation:
        windows, model = self.windows, self._segmenter.model
        with self._segmenter._inference():
            parts = _bar(self.features, "classes", progress)
            logits = torch.cat([model.decode(features, prompts.text, **windows.decode) for features in parts])
            if windows.cut is not None:
                logits = logits[..., : windows.cut[0], : windows.cut[1]]
            size = self.image.height, self.image.width
            arguments: dict[str, Any] = {
                "logits": logits[:-1] if windows.has_whole else logits,
                "placement": ops.Placement(windows.positions, windows.window, windows.canvas, size),
                "whole": logits[-1:] if windows.has_whole else None,
                "offset": prompts.offset,
            }
            labels = ops.label_map(**arguments).cpu().numpy()

        @torch.no_grad()
        def compute_scores() -> np.ndarray:
            return model.scores(ops.score_map(**arguments)).float().cpu().numpy()

        @torch.no_grad()
        def compute_top(k: int) -> tuple[np.ndarray, np.ndarray]:
            scores, labels = ops.top_labels(k=k, **arguments)
            return labels.cpu().numpy(), scores.float().cpu().numpy()

        return Segmentation(self.image, prompts.names, labels, compute_scores, compute_top)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be a PyTorch device such as 'cpu' or 'cuda:0', got {device!r}.") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device must be 'cpu', as PyTorch finds no CUDA GPU here, got {device!r}.")
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
