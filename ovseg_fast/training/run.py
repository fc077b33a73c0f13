"""The training loop: any number of processes, exact resumption, one folder for everything that a run writes.

Image order, augmentation and dropout follow from the seed and the step's number, so a killed run resumes without trace
from weights, optimiser and a number: bit by bit if sums keep their order, as on a CPU with the same number of threads.
Several processes share each global batch; up to rounding, their gradients sum up to those of one with the whole batch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .. import backends, checkpoints
from ..compat import lacks_memory, require
from ..data.augmentation import augmentation
from ..evaluation.environment import environment
from ..files import check_writable, held, remove_abandoned
from ..models import Hyperparameters, SegmentationModel, build
from ..models.steady import autocast_dtype
from ..segmenter import Segmenter
from ..vocabulary import fill_templates, prompt_name, tokenize
from .config import PRECISIONS, TrainingConfig, as_config
from .finetuning import set_trainable
from .images import Batch, LeftOut, TrainingImages, collate, let_go, stream
from .labels import seen_classes
from .log import LINES, TENSORBOARD, Log
from .objective import Objective
from .optimizer import build_optimizer, build_schedule, with_clip_rate
from .pairs import Contents, open_data, warn_of_masks
from .start import check_sizes, check_start, load_start
from .state import State, check_optimizer, undamaged
from .validation import PICTURES, check_names, validate

CHECKPOINT, WEIGHTS, LOCK = "checkpoint.pt", "model.safetensors", ".lock"

logger = logging.getLogger(__name__)


def train(
    config: TrainingConfig | Mapping[str, Any] | str | os.PathLike[str],
    *,
    restart: bool = False,
    progress: bool = True,
) -> Path:
    """Train a model as `config` says; resumes the run in `config.out`, if any, unless `restart`.

    Under `torchrun` or `accelerate launch`, every process makes the same call.

    Args:
        config: a `training.config.TrainingConfig`, a dict with the same keys, or the path of a TOML file with them.

    Returns:
        The file of the trained weights, `out/model.safetensors`.

    Raises:
        ValueError, TypeError, OSError: the configuration does not fit itself, the data, or the run that `out` holds;
            or, later, a file cannot be written or none of the images can be read.
        FloatingPointError: the loss is no longer finite; the last checkpoint stays. ImportError: accelerate is missing.
        RuntimeError: the backend asked for cannot run here, the memory does not suffice, or a process that reads images
            died.
    """
    run = Run(as_config(config), progress=progress)
    run.prepare(restart)
    return run.go()


class Run:
    """One process of a training run: `prepare`, then `go`. Arguments and errors as `train`; `model` replaces the one
    that `config` would build."""

    def __init__(
        self, config: TrainingConfig, *, progress: bool = True, model: SegmentationModel | None = None
    ) -> None:
        self.config, self.out = config, Path(config.out)
        self.accelerator = _accelerator(config)
        backends.check(self.accelerator.device, training=True)
        if autocast_dtype(self.accelerator.device) is not None:
            raise ValueError("training must be called outside of torch.autocast: it runs under precision.")
        if not torch.is_grad_enabled():
            raise ValueError("training needs gradients: call it outside of torch.no_grad and torch.inference_mode.")
        self.progress = progress and self.accelerator.is_main_process
        share = config.accumulation * self.accelerator.num_processes
        if config.batch % share:
            raise ValueError(f"batch must be a multiple of accumulation times processes, {share}, got {config.batch}.")
        self.part = config.batch // share  # images that go forward at a time
        self.dataset = open_data(config.data, "train", "data")
        self.validation = None if config.validation is None else open_data(config.validation, "val", "validation")
        self.classes = self.dataset.vocabulary.classes
        self.contents = Contents.of(self.dataset)
        self.given = model

    def prepare(self, restart: bool) -> None:
        """Everything that may be refused, and the initial state. The folder is held until `go` ends."""
        with ExitStack() as stack:
            if self.accelerator.is_main_process:
                if not self.out.exists():
                    stack.callback(_remove, self.out)  # nothing is left behind if the run is refused
                self._check_folder()
                stack.enter_context(held(self.out / LOCK, "a training run"))
                stack.callback(_remove, self.out / LOCK)
            self._prepare(restart)
            self._lock = stack.pop_all()

    def _prepare(self, restart: bool) -> None:
        config, accelerator, path = self.config, self.accelerator, self.out / CHECKPOINT
        self.environment = {"processes": accelerator.num_processes, **environment(accelerator.device)}
        saved = None if restart or not path.exists() else State.load(path)
        if saved is not None:
            saved.check(path, config, self.contents, self.environment)
        else:
            check_start(config)
        self.first = 0 if saved is None else saved.step
        torch.manual_seed(config.seed)
        if self.given is not None:
            self.model = self.given
        else:  # a resumed run needs nothing that it started from
            self.model = build(config.model, clip_pretrained=None if saved else config.clip_pretrained)
        model = self.model
        if saved is None and config.weights is not None:
            load_start(model, config.weights)
        self.settings = _settings(config, model.hyperparameters)
        seen_only = model.seen_only if config.seen_only is None else config.seen_only
        self.unseen = self.dataset.vocabulary.unseen if seen_only else ()
        seen_classes(len(self.classes), self.unseen)  # raises if none is left
        if config.transductive is not None and not self.unseen:
            raise ValueError("transductive needs unseen classes: a dataset with a zero-shot split, and seen_only.")
        names = set_trainable(model, config.policy)
        check_sizes(model, config)
        if saved is not None:
            with undamaged(path):
                model.load_state_dict(saved.model)
        model.to(accelerator.device).train()
        segmenter = Segmenter(model)
        check_names(segmenter, self.classes, self.validation)
        if any(parameter.requires_grad for parameter in model.text_encoder.parameters()):
            prompts = fill_templates([prompt_name(name) for name in self.classes], segmenter.templates)
            texts = tokenize(prompts).to(accelerator.device)
        else:
            texts = segmenter.embed_text(self.classes, progress=self.progress)
        objective = Objective(model, texts, self.unseen, config.sample_classes)
        optimizer = build_optimizer(model, self.settings)
        self.schedule = build_schedule(optimizer, self.settings, config.steps)
        if saved is not None:
            with undamaged(path):
                optimizer.load_state_dict(saved.optimizer)
                check_optimizer(optimizer)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        if saved is not None and accelerator.scaler is not None:
            with undamaged(path):
                accelerator.scaler.load_state_dict(saved.scaler)
        self._tell(saved, len(names))
        if restart and accelerator.is_main_process:
            self._discard()
        accelerator.wait_for_everyone()

    def _tell(self, saved: State | None, trained: int) -> None:
        """What a user may not have meant, once all is known to fit."""
        if not self.accelerator.is_main_process:
            return
        warn_of_masks(self.dataset)
        if self.validation is not None:
            warn_of_masks(self.validation, "validation")
        if self.settings.warmup > self.config.steps:
            words = "the warm-up of %d steps is longer than the run of %d: the learning rate never reaches its peak"
            logger.warning(words, self.settings.warmup, self.config.steps)
        if saved is None:
            logger.info("training %d tensors on %d images", trained, len(self.dataset))
            return
        logger.info("resuming after step %d of the run in %s", saved.step, self.out)
        changed = [] if saved.data is None else self.contents.changed_files(saved.data).tolist()
        if changed:
            words = "%d of %d pairs changed since the run was last saved, and are used as they are now; the first is %s"
            logger.warning(words, len(changed), len(self.dataset), self.dataset.pairs[changed[0]].name)

    def _check_folder(self) -> None:
        check_writable(self.out, "out")
        remove_abandoned(self.out / PICTURES)
        for names, right, kind in (
            ((CHECKPOINT, WEIGHTS, LINES), Path.is_file, "file"),
            ((TENSORBOARD, PICTURES), Path.is_dir, "folder"),
        ):
            for path in (self.out / name for name in names):
                if path.exists() and not right(path):
                    raise ValueError(f"out must be a folder of a run, but '{path}' in it is not a {kind}.")

    def _discard(self) -> None:
        """Remove what an earlier run left. Its checkpoint goes first: without it, it is never resumed."""
        pictures = sorted((self.out / PICTURES).glob("step_*.png"))
        for path in (*(self.out / name for name in (CHECKPOINT, WEIGHTS, LINES)), *pictures):
            path.unlink(missing_ok=True)

    def go(self) -> Path:
        """All remaining steps."""
        config, accelerator = self.config, self.accelerator
        out = self.out if accelerator.is_main_process else None
        left_out = LeftOut(len(self.dataset))
        with (
            self._lock,
            closing(Log(out, accelerator, self.first, config.steps, config.log_every, self.progress)) as log,
            _loader_errors(),  # that a loader process died is raised anywhere, by a signal
        ):
            if self.first == config.steps:
                self._write_weights()
            if self.first:
                self._validate(self.first, log)  # if a kill kept it from ending
            for step, parts in self._batches(left_out):
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
                if last:
                    self._write_weights()
                self._validate(done, log)
        left_out.summarise()
        return self.out / WEIGHTS

    def _batches(self, left_out: LeftOut) -> Iterator[tuple[int, list[Batch]]]:
        """Each remaining step with this process's share of its images, in parts that go forward one by one."""
        config, accelerator = self.config, self.accelerator
        steps = range(self.first, config.steps)
        mine = (
            [step * config.batch + (part * accelerator.num_processes + accelerator.process_index) * self.part + place
             for place in range(self.part)]
            for step in steps
            for part in range(config.accumulation)
        )  # fmt: skip
        recipe = asdict(self.model.augmentation)
        if config.scales is not None:
            recipe["scales"] = config.scales
        augment = augmentation(config.crop or self.model.config.image_size, **recipe, distortion=config.distortion)
        images = TrainingImages(self.dataset, augment, config.seed)
        loader = DataLoader(
            images,
            batch_sampler=mine,
            num_workers=config.workers,
            collate_fn=collate,
            worker_init_fn=partial(let_go, os.path.realpath(self.out / LOCK)),
            pin_memory=accelerator.device.type == "cuda",
        )
        parts = iter(loader)
        for step in steps:
            batches = []
            for _ in range(config.accumulation):
                batch, skipped = next(parts)
                left_out.add(skipped)
                if batch is None:
                    left_out.give_up()
                batches.append(batch)
            yield step, batches

    def _step(self, step: int, parts: list[Batch]) -> dict[str, Tensor]:
        """One optimiser step; returns the losses of this process."""
        try:
            return self._steps_of(step, parts)
        except Exception as error:
            if not lacks_memory(error):
                raise
            cure = "lower batch or crop, or raise accumulation."
            raise RuntimeError(
                f"step {step + 1} needs more memory than there is ({_first_line(error)}); {cure}"
            ) from error

    def _steps_of(self, step: int, parts: list[Batch]) -> dict[str, Tensor]:
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

    def _write_checkpoint(self, step: int) -> None:
        scaler = self.accelerator.scaler
        if self.accelerator.is_main_process:
            state = State(
                step,
                self.model.state_dict(),
                self.optimizer.state_dict(),
                None if scaler is None else scaler.state_dict(),
                asdict(self.config),
                self.contents,
                self.environment,
            )
            state.save(self.out / CHECKPOINT)
        self.accelerator.wait_for_everyone()

    def _write_weights(self) -> None:
        if self.accelerator.is_main_process:
            trained = seen_classes(len(self.classes), self.unseen)
            checkpoints.save(self.model, self.out / WEIGHTS, [self.classes[index] for index in trained])
        self.accelerator.wait_for_everyone()

    def _validate(self, step: int, log: Log) -> None:
        """Scores on the validation images if they are due; by the main process, the others wait."""
        config = self.config
        if self.validation is None or not (step % config.evaluate_every == 0 or step == config.steps):
            return
        if self.accelerator.is_main_process and step not in log.validated:
            picture = self.out / PICTURES / f"step_{step:07}.png"
            scores = validate(Segmenter(self.model), self.validation, picture, config.pictures, self.progress)
            if scores is not None:
                log.write(step, scores)
        self.accelerator.wait_for_everyone()


def _settings(config: TrainingConfig, published: Hyperparameters) -> Hyperparameters:
    own = {name: getattr(config, name) for name in ("learning_rate", "warmup", "max_gradient_norm")}
    settings = replace(published, **{name: value for name, value in own.items() if value is not None})
    return settings if config.clip_learning_rate is None else with_clip_rate(settings, config.clip_learning_rate)


def _accelerator(config: TrainingConfig) -> Any:
    require("accelerate", "accelerate", "training")
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    gpu = torch.accelerator.is_available()
    if config.precision == "fp16" and not gpu:
        raise ValueError("precision fp16 needs a GPU, and PyTorch finds none here; use bf16 or fp32.")
    processes = os.environ.get("WORLD_SIZE", "1")
    cure = "start every process with torchrun or accelerate launch, or unset WORLD_SIZE."
    if not processes.isdecimal() or (int(processes) > 1 and "LOCAL_RANK" not in os.environ):
        raise ValueError(f"WORLD_SIZE is {processes!r}, but this process was started by itself: {cure}")
    precision = PRECISIONS[config.precision]
    # An earlier run in this process may have had another precision, which accelerate would insist on.
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()
    # Some trained parameters are never read, as published; see `finetuning.set_trainable`.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # Without cpu=True, accelerate takes each of several processes on a machine without a GPU for the only one.
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[unused], cpu=not gpu)
    if processes != str(accelerator.num_processes):
        raise ValueError(f"WORLD_SIZE is {processes}, but {accelerator.num_processes} train together: {cure}")
    return accelerator


@contextmanager
def _loader_errors() -> Iterator[None]:
    """Errors of the processes that read images, without what PyTorch wraps them in."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        if "in DataLoader worker process" in lines[0]:
            raise RuntimeError(lines[-1].partition(": ")[2] or lines[-1]) from error
        if "DataLoader worker" in str(error) and isinstance(error, RuntimeError):
            cure = "most often memory or shared memory ran out; lower workers, or set workers = 0 to see more."
            raise RuntimeError(f"a process that reads images died ({_first_line(error)}); {cure}") from error
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _remove(path: Path) -> None:
    """Remove a file, or a folder that is empty."""
    with suppress(OSError):  # it holds something, or, on Windows, is open
        path.rmdir() if path.is_dir() else path.unlink()
