"""The machine and the versions that numbers depend on, if only by rounding: told where a run resumes with others."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from typing import Any

import torch

from .. import __version__, backends

logger = logging.getLogger(__name__)


def environment(device: torch.device) -> dict[str, Any]:
    """By name, as plain values."""
    return {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "backend": backends.requested(),
        "float32 products": torch.get_float32_matmul_precision(),
        "ovseg-fast": __version__,
        "torch": torch.__version__.partition("+")[0],
        "machine": platform.machine(),
    }


def tell_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """One warning if a run resumes in another environment; what is not in `saved` is not compared."""
    other = [f"{name} {saved[name]} is now {now[name]}" for name in now if name in saved and saved[name] != now[name]]
    if other:
        logger.warning("resuming with %s: results may differ slightly from an undisturbed run's", ", ".join(other))
