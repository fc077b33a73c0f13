"""The state of a run, `checkpoint.pt`: written whole, and read only if every byte is as it was written.

A result depends on the configuration, the classes and the images: a run resumes only with the same. Files that changed
under the same names, another number of processes or threads, and other versions are told in a warning: a corrected mask
or a repaired machine is a reason to resume. The weights that a run started from are not compared: the state replaces
them.
"""

from __future__ import annotations

import logging
import platform
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..compat import lacks_memory
from ..files import write_whole
from .config import TrainingConfig, check_resumable
from .pairs import Contents

logger = logging.getLogger(__name__)


@dataclass
class State:
    """After `step` steps: the state dicts of model, optimiser and, if any, gradient scaler; the configuration and the
    training data; and the machine and the versions, by name. A run of an older version may lack the last two."""

    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    config: Mapping[str, Any]
    data: Contents | None
    environment: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write it, whole or not at all. Raises OSError."""
        content = {
            "config": self.config,
            "step": self.step,
            "model": self.model,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "data": None if self.data is None else asdict(self.data),
            "environment": dict(self.environment),
        }

        def write(file: Path) -> None:
            with open(file, "wb") as opened:  # given a path, torch.save does not say why it fails
                torch.save(content, opened)

        write_whole(path, write)

    @classmethod
    def load(cls, path: Path) -> State:
        """The state in a file. Raises OSError if it cannot be read, ValueError if it is damaged or something else."""
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise OSError(f"'{path}' cannot be read: {error.strerror or error}.") from error
        with undamaged(path):
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                if (broken := archive.testzip()) is not None:
                    raise ValueError(f"checksum of {broken}")
            saved = torch.load(path, map_location="cpu", weights_only=True)
            data = saved.get("data")
            state = cls(
                *(saved[name] for name in ("step", "model", "optimizer", "scaler", "config")),
                None if data is None else Contents(**data),
                saved.get("environment", {}),
            )
            for part in (state.model, state.optimizer, state.config, state.environment):
                if not isinstance(part, Mapping):
                    raise TypeError(f"{type(part).__name__} for a dict")
            if type(state.step) is not int or state.step < 0:
                raise ValueError(f"step {state.step}")
            check_config = dict(state.config)["data"]
            if not isinstance(check_config, Mapping):
                raise TypeError("data of the configuration")
        return state

    def check(self, path: Path, config: TrainingConfig, data: Contents, now: Mapping[str, Any]) -> None:
        """Whether a run with this configuration and data resumes from this state; `now` is the environment.

        Raises:
            ValueError: it has another configuration, other classes or images, or fewer steps than are done.
        """
        out = path.parent
        check_resumable(self.config, config)
        if self.step > config.steps:
            cure = "choose another out, or start over with --restart."
            raise ValueError(
                f"steps must be at least {self.step}, which the run in '{out}' has done, got {config.steps}; {cure}"
            )
        if self.data is None:
            logger.warning(
                "'%s' is of an older version, which did not keep classes and images: are they the same?", path
            )
        elif changes := data.changes(self.data):
            cure = "change it back, choose another out, or start over with --restart."
            raise ValueError(f"the run in '{out}' was trained on other data ({'; '.join(changes)}); {cure}")
        other = [f"{name} {self.environment[name]} is now {now[name]}" for name in now if name in self.environment]
        other = [part for part, name in zip(other, (n for n in now if n in self.environment), strict=True)
                 if self.environment[name] != now[name]]  # fmt: skip
        if other:
            logger.warning("resuming with %s: results may differ slightly from an undisturbed run's", ", ".join(other))


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Whatever fails in this block, which reads a state or puts it to use, is told as damage of the file `path`."""
    try:
        yield
    except Exception as error:  # a damaged pickle can fail as anything
        if lacks_memory(error):
            raise
        raise ValueError(f"'{path}' is not a checkpoint of a run, or damaged; --restart starts over.") from error


def environment(processes: int, device: torch.device) -> dict[str, Any]:
    """What a result depends on besides configuration and data, if only by rounding and the draws of dropout."""
    return {
        "processes": processes,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "ovseg-fast": __version__,
        "torch": torch.__version__.partition("+")[0],
        "machine": platform.machine(),
    }


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError if the state of a parameter has another shape than the parameter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"{name} of shape {tuple(value.shape)} for {tuple(parameter.shape)}")
