"""What is installed, what runs and why: the report of `ovseg-fast info`."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from .. import __version__, backends, native
from ..models.presets import PRESETS, Preset

_PACKAGES = "open_clip_torch", "torchvision", "numpy", "pillow", "safetensors", "huggingface_hub", "triton", "xformers"


def report() -> str:
    """Versions, devices, operators and models as plain text. Initialises and builds nothing."""
    sections = {
        "ovseg-fast": [("version", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
        + [(name, _version(name)) for name in _PACKAGES],
        "devices": _devices(),
        "native libraries": [("libovseg", native_library()), ("libovseg_cpu", cpu_library())],
        "models": [(preset.name, f"{preset.note}; {_weights(preset)}") for preset in PRESETS.values()],
    }
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    blocks = [
        "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)]) for title, rows in sections.items()
    ]
    return "\n\n".join([*blocks, *_operators()])


def _weights(preset: Preset) -> str:
    if preset.packaged is not None:
        return "weights in this package"
    return "published weights" if preset.weights_file else "weights from a file"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    rows = [("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    if torch.version.cuda is None:
        return [*rows, ("cuda", "not available: this PyTorch is a CPU build")]
    if not torch.cuda.is_available():
        return [*rows, ("cuda", "not available: PyTorch finds no GPU or driver")]
    return [*rows, *((f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count()))]


def _operators() -> list[str]:
    """A table of the operators for each kind of device, or the reason why there is none."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    try:
        asked = backends.requested()
        tables = [(device, str(backends.explain(device))) for device in devices]
    except ValueError as error:
        return [f"operators\n  {error}"]
    return [
        f"operators on {device} tensors (backend: {asked})\n" + "\n".join(f"  {line}" for line in table.splitlines())
        for device, table in tables
    ]


def native_library() -> str:
    """What the CUDA C++ kernels were built for, or why they cannot be used and how to fix it."""
    if problem := native.problem():
        return problem
    if not native.architectures():
        return f"{native.path().name}: emulates a GPU on the CPU, for tests"
    unverified = set(backends.operators_with_kernels("cuda")) - native.VERIFIED
    return f"built for compute capability {native.capabilities()}" + (
        f"; no GPU has verified {', '.join(sorted(unverified))} yet" if unverified else ""
    )


def cpu_library() -> str:
    """What the kernels for CPUs run on, or why they cannot be used and how to fix it."""
    threads = torch.get_num_threads()
    return native.problem("cpu") or f"{native.isa()}, {threads} thread{'' if threads == 1 else 's'}"
