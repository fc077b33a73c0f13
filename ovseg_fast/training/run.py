"""The training loop: any number of processes, exact resumption, one folder for everything that a run writes.

Image order, augmentation and dropout follow from the seed and the step's number, so a killed run resumes without trace
from weights, optimiser and a number: bit by bit if sums keep their order, as on a CPU with the same number of threads.
Several processes share each global batch; up to rounding, their gradients sum up to those of one with the whole batch.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import checkpoints
from ..data import Dataset, open_dataset
from ..data.augmentation import augmentation
from ..evaluation.evaluate import evaluate
from ..files import write_whole
from ..models import Hyperparameters, SegmentationModel, build
from ..segmenter import Segmenter
from ..vocabulary import fill_templates, prompt_name, tokenize
from .config import PRECISIONS, DataConfig, TrainingConfig, check_resumable
from .finetuning import set_trainable
from .images import TrainingImages, stream
from .labels import pseudo_labels, seen_classes, seen_labels
from .log import Log, comparison
from .optimizer import build_optimizer, build_schedule, with_clip_rate

CHECKPOINT, WEIGHTS = "checkpoint.pt", "model.safetensors"
ENDLESS = 100_000  # images of a dataset without an end, if the configuration sets no limit

logger = logging.getLogger(__name__)


def train(config: TrainingConfig, *, restart: bool = False, progress: bool = True) -> Path:
    """Train a model as `config` says; resumes the run in `config.out`, if any, unless `restart`.

    Under `torchrun` or `accelerate launch`, every process makes the same call.

    Returns:
        The file of the trained weights, `out/model.safetensors`.

    Raises:
        ValueError, OSError: the configuration does not fit itself, the data, or the run that `out` holds.
        FloatingPointError: the loss is no longer finite; the last checkpoint stays. ImportError: accelerate is missing.
    """
    run = Run(config, progress=progress)
    run.prepare(restart)
    return run.go()


class Objective(nn.Module):
    """A model with the texts of its classes: images and labels in, the published loss out.

    Args:
        prompts: of all classes, as tokens (T, P, 77) if the text encoder is trained, else as embeddings (T, P, E).
        unseen: indices of the classes that are not trained on. sample_classes: see `TrainingConfig`.
    """

    def __init__(
        self, model: SegmentationModel, prompts: Tensor, unseen: tuple[int, ...], sample_classes: bool = False
    ) -> None:
        super().__init__()
        self.model, self.prompts, self.unseen, self.sample_classes = model, prompts, unseen, sample_classes
        self.seen = seen_classes(len(prompts), unseen)

    def _embed(self, classes: list[int]) -> Tensor:
        prompts = self.prompts[classes]
        return self.model.text_from_prompts(prompts if prompts.is_floating_point() else self.model.encode_text(prompts))

    def forward(self, images: Tensor, labels: Tensor, transductive: bool = False) -> dict[str, Tensor]:
        """(B, 3, s, s) uint8 and (B, s, s) indices of all classes -> named losses. Transductively, all classes are
        trained on, the unseen ones by labels that the model predicts."""
        if not transductive:
            chosen = self._sample(labels) if self.sample_classes else self.seen
            left_out = set(range(len(self.prompts))) - set(chosen)
            return self.model.loss(images, seen_labels(labels, len(self.prompts), left_out), self._embed(chosen))
        text = self._embed(list(range(len(self.prompts))))
        with torch.no_grad():
            logits = self.model.decode(self.model.encode_image(images), text)
        return self.model.loss(images, pseudo_labels(logits, labels, self.unseen), text)

    def _sample(self, labels: Tensor) -> list[int]:
        """The seen classes that are in the labels, and any number of others, at least one."""
        shown = set(labels.unique().tolist()).intersection(self.seen)
        others = [index for index in self.seen if index not in shown]
        if not others:
            return self.seen
        count = int(torch.randint(1, len(others) + 1, ()))
        return sorted([*shown, *(others[place] for place in torch.randperm(len(others))[:count])])


class Run:
    """One process of a training run: `prepare`, then `go`. Arguments and errors as `train`; `model` replaces the one
    that `config` would build."""

    def __init__(
        self, config: TrainingConfig, *, progress: bool = True, model: SegmentationModel | None = None
    ) -> None:
        self.config, self.out = config, Path(config.out)
        self.accelerator = _accelerator(config)
        self.progress = progress and self.accelerator.is_main_process
        share = config.accumulation * self.accelerator.num_processes
        if config.batch % share:
            raise ValueError(f"batch must be a multiple of accumulation times processes, {share}, got {config.batch}.")
        self.part = config.batch // share  # images that go forward at a time
        self.dataset = open_data(config.data, "train")
        torch.manual_seed(config.seed)
        self.model = model or build(config.model, clip_pretrained=config.clip_pretrained)
        if config.weights is not None:
            checkpoints.load(self.model, config.weights)
        self.settings = _settings(config, self.model.hyperparameters)
        vocabulary = self.dataset.vocabulary
        seen_only = self.model.seen_only if config.seen_only is None else config.seen_only
        self.classes, self.unseen = vocabulary.classes, vocabulary.unseen if seen_only else ()
        if config.transductive is not None and not self.unseen:
            raise ValueError("transductive needs unseen classes: a dataset with a zero-shot split, and seen_only.")

    def prepare(self, restart: bool) -> None:
        """Everything that may be refused, and the initial state."""
        model, accelerator = self.model, self.accelerator
        self.out.mkdir(parents=True, exist_ok=True)
        saved = None if restart or not (self.out / CHECKPOINT).is_file() else self._read_checkpoint()
        self.first = 0 if saved is None else int(saved["step"])
        if saved is not None:
            model.load_state_dict(saved["model"])
        set_trainable(model, self.config.policy)
        model.to(accelerator.device).train()
        segmenter = Segmenter(model)
        if any(parameter.requires_grad for parameter in model.text_encoder.parameters()):
            prompts = fill_templates([prompt_name(name) for name in self.classes], segmenter.templates)
            texts = tokenize(prompts).to(accelerator.device)
        else:
            texts = segmenter.embed_text(self.classes, progress=self.progress)
        objective = Objective(model, texts, self.unseen, self.config.sample_classes)
        optimizer = build_optimizer(model, self.settings)
        self.schedule = build_schedule(optimizer, self.settings, self.config.steps)
        if saved is not None:
            optimizer.load_state_dict(saved["optimizer"])
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        if saved is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])

    def go(self) -> Path:
        """All remaining steps."""
        config, accelerator = self.config, self.accelerator
        out = self.out if accelerator.is_main_process else None
        with closing(Log(out, accelerator, self.first, config.steps, config.log_every, self.progress)) as log:
            for step, parts in self._batches():
                # The rates follow from the step, not from how often the schedule was asked.
                rates = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
                for group, (rate, factor) in zip(self.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor(step)
                losses = self._step(step, parts)
                done, last = step + 1, step + 1 == config.steps
                log.step(done, losses, max(group["lr"] for group in self.optimizer.param_groups))
                if done % config.checkpoint_every == 0 or last:
                    log.report(done)  # raises rather than save what is not finite
                    self._write_checkpoint(done)
                if config.validation is not None and (done % config.evaluate_every == 0 or last):
                    log.write(done, self._evaluate(done))
        if accelerator.is_main_process:
            trained = seen_classes(len(self.classes), self.unseen)
            checkpoints.save(self.model, self.out / WEIGHTS, [self.classes[index] for index in trained])
        accelerator.wait_for_everyone()
        return self.out / WEIGHTS

    def _batches(self) -> Iterator[tuple[int, list[tuple[Tensor, Tensor]]]]:
        """Each remaining step with this process's share of its images, in parts that go forward one by one."""
        config, accelerator = self.config, self.accelerator
        steps = range(self.first, config.steps)
        mine = [
            [step * config.batch + (part * accelerator.num_processes + accelerator.process_index) * self.part + place
             for place in range(self.part)]
            for step in steps
            for part in range(config.accumulation)
        ]  # fmt: skip
        recipe = asdict(self.model.augmentation)
        if config.scales is not None:
            recipe["scales"] = config.scales
        augment = augmentation(config.crop or self.model.config.image_size, **recipe, distortion=config.distortion)
        images = TrainingImages(self.dataset, augment, config.seed)
        pin = accelerator.device.type == "cuda"
        parts = iter(DataLoader(images, batch_sampler=mine, num_workers=config.workers, pin_memory=pin))
        for step in steps:
            yield step, [next(parts) for _ in range(config.accumulation)]

    def _step(self, step: int, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """One optimiser step; returns the losses of this process."""
        accelerator = self.accelerator
        share = self.config.transductive
        transductive = share is not None and step >= share * self.config.steps
        totals: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            images, labels = (tensor.to(accelerator.device, non_blocking=True) for tensor in part)
            torch.manual_seed(stream(self.config.seed, step, number, accelerator.process_index))  # dropout
            with nullcontext() if number + 1 == len(parts) else accelerator.no_sync(self.objective):
                losses = self.objective(images, labels, transductive)
                accelerator.backward(losses["loss"] / len(parts))
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0) + loss.detach() / len(parts)
        if self.settings.max_gradient_norm is not None:
            accelerator.clip_grad_norm_(self.objective.parameters(), self.settings.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return totals

    def _read_checkpoint(self) -> dict[str, Any]:
        path = self.out / CHECKPOINT
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            began = saved["config"]
        except (KeyError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError):
            raise ValueError(f"'{path}' is not a checkpoint of a run, or damaged; --restart starts over.") from None
        check_resumable(began, self.config)
        logger.info("resuming after step %d of the run in %s", saved["step"], self.out)
        return saved

    def _write_checkpoint(self, step: int) -> None:
        scaler = self.accelerator.scaler
        content = {
            "config": asdict(self.config),
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        if self.accelerator.is_main_process:
            write_whole(self.out / CHECKPOINT, lambda file: torch.save(content, file))
        self.accelerator.wait_for_everyone()

    def _evaluate(self, step: int) -> dict[str, float]:
        """Scores on the validation images, and a picture of some; by the main process, the others wait."""
        scores: dict[str, float] = {}
        if self.accelerator.is_main_process:
            assert self.config.validation is not None
            dataset = open_data(self.config.validation, "val")
            segmenter = Segmenter(self.model)
            scores = evaluate(segmenter, dataset, progress=self.progress).metrics
            names = list(dataset.vocabulary.classes)
            rows = []
            for index in range(min(self.config.pictures, len(dataset))):
                image, labels = dataset.read(index)
                rows.append((image, labels, segmenter.encode(image).segment(names).labels))
            if rows:
                (self.out / "pictures").mkdir(exist_ok=True)
                write_whole(self.out / "pictures" / f"step_{step:07}.png", comparison(rows, names).save)
        self.accelerator.wait_for_everyone()
        return scores


def open_data(config: DataConfig, split: str) -> Dataset:
    """The dataset of a configuration; `split` if that names none. Raises ValueError if it holds no image."""
    dataset = open_dataset(config.dataset, config.root, config.split or split, limit=config.limit, endless=ENDLESS)
    if not len(dataset):
        raise ValueError(f"the dataset {config.dataset} in '{config.root}' holds no image.")
    return dataset


def _settings(config: TrainingConfig, published: Hyperparameters) -> Hyperparameters:
    own = {name: getattr(config, name) for name in ("learning_rate", "warmup", "max_gradient_norm")}
    settings = replace(published, **{name: value for name, value in own.items() if value is not None})
    return settings if config.clip_learning_rate is None else with_clip_rate(settings, config.clip_learning_rate)


def _accelerator(config: TrainingConfig) -> Any:
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError:
        raise ImportError("training needs accelerate: pip install 'ovseg-fast[train]'") from None
    # Some trained parameters are never read, as published; see `finetuning.set_trainable`.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(mixed_precision=PRECISIONS[config.precision], kwargs_handlers=[unused])
