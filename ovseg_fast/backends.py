"""Which backend runs an operator on given tensors, and why the others do not.

One predicate, `refusal`, selects a backend, explains the choice and words the error if a forced backend cannot run.
The choice is made before autograd, so a call's backward runs on the backend of its forward.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata, util
from pkgutil import iter_modules
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import native

BACKENDS = ("cuda", "triton", "cpu", "torch")  # in order of preference
LAUNCHERS = {"cuda": "ovseg_fast.cuda", "triton": "ovseg_fast.kernels", "cpu": "ovseg_fast.cpu"}
LANGUAGES = {"cuda": "CUDA C++", "triton": "Triton", "cpu": "CPU"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that kernels take; the PyTorch forms take any
CPU_DTYPES = (torch.float32, torch.bfloat16)  # that kernels for CPUs take
OF_TRAINING = frozenset({"mask_losses"})  # operators that nothing but training calls
CAPABILITY = (8, 0)  # of the oldest GPUs that kernels are compiled for
TRITON = (3, 4)  # the oldest that compiles every kernel: 3.3 fails on cost_embedding, 3.2 aborts the process
INTERPRETER = (3, 7)  # the oldest Triton whose interpreter runs with numpy 2.4 and later

logger = logging.getLogger(__name__)

# Its `name`: the backend that this thread asks for, instead of the environment. No class with a default for it: Dynamo
# would read that default, whatever a thread has set (tried on torch 2.7, 2.8 and 2.11).
_forced = threading.local()
_default = os.environ.get("OVSEG_BACKEND") or "auto"
_last: dict[str, str] = {}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for this thread's operator calls, whatever OVSEG_BACKEND: `with ovs.backend("torch"): ...`.

    It holds in compiled functions too, around the call or inside: a call under another backend compiles again.

    Args:
        name: `"cuda"`, `"triton"`, `"cpu"`, `"torch"`, or `"auto"`: the first of these that can run.

    Raises:
        ValueError: no such backend. Operators that the forced backend cannot run raise `RuntimeError`.
    """
    before, _forced.name = getattr(_forced, "name", None), _checked(name, "backend")
    try:
        yield
    finally:
        _forced.name = before


def requested() -> str:
    """What this thread asks for: `"auto"` or the name of a backend. Raises ValueError for a bad OVSEG_BACKEND."""
    return getattr(_forced, "name", None) or _checked(_default, "OVSEG_BACKEND")


def choose(
    operator: str,
    *tensors: Tensor,
    refusals: Mapping[str, str | None] | None = None,
    shared_memory: Mapping[torch.dtype, int] | None = None,
) -> str:
    """The backend that runs `operator` on these tensors.

    Args:
        tensors: its inputs, already checked: one device, one dtype (with autocast on, autocast's).
        refusals: by backend, why it cannot run this call (a size that its kernels do not take).
        shared_memory: KB that a block of its CUDA C++ kernel needs, by dtype, if not every GPU has them.

    Raises:
        RuntimeError: the forced backend cannot run it; the message says why.
    """
    device, dtype = tensors[0].device, tensors[0].dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    asked, needed = requested(), (shared_memory or {}).get(dtype, 0)
    reasons: dict[str, str] = {}
    for name in BACKENDS if asked == "auto" else (asked,):
        reason = (refusals or {}).get(name) or _tensors_refusal(name, tensors)
        reason = reason or refusal(operator, name, device.type, device.index, dtype, asked != "auto", needed)
        if reason is None:
            if not torch.compiler.is_compiling():
                others = "".join(f"; {other}: {reason}" for other, reason in reasons.items())
                _say(f"{operator} runs on {name}{others}")
            if name == "torch":
                _last[operator] = name
            return name
        reasons[name] = reason
    raise _cannot_run(operator, asked, reasons[asked])


def refusal(
    operator: str, name: str, device: str, index: int | None, dtype: torch.dtype | None, forced: bool, memory: int = 0
) -> str | None:
    """Why backend `name` cannot run `operator` on tensors of this device and dtype, or None if it can.

    `memory`: KB of shared memory that a block of a CUDA C++ kernel needs.
    """
    if name == "torch":
        return None
    if operator not in operators_with_kernels(name):
        return f"it has no {LANGUAGES[name]} kernel"
    if name == "cpu":
        return _cpu_refusal(device, dtype)
    if name == "triton" and (reason := _triton_refusal()):
        return reason
    if dtype is not None and dtype not in DTYPES:
        return f"its kernels take float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(index) if device == "cuda" else None
    if capability is not None and capability < CAPABILITY:
        return "its kernels need compute capability {}.{}, this GPU has {}.{}".format(*CAPABILITY, *capability)
    if name == "cuda":
        if reason := native.refusal(device, capability, memory):
            return reason
        if forced or (operator in native.VERIFIED and device != "cpu"):
            return None
        if device == "cpu":
            return "on the CPU only the slow emulation of a GPU runs it, and only if forced"
        return "no GPU has verified its CUDA C++ kernels yet; OVSEG_BACKEND=cuda tries them"
    if device == "cuda":
        return None
    if device != "cpu":
        return f"its kernels run on CUDA tensors, not on {device}"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU"
    if not forced:
        return "on the CPU only Triton's slow interpreter runs it, and only if forced"
    return interpreter_refusal()


def _cpu_refusal(device: str, dtype: torch.dtype | None) -> str | None:
    """Why the kernels for CPUs do not run on tensors of this device and dtype, or None if they do."""
    if device != "cpu":
        return f"its kernels run on CPU tensors, not on {device}"
    if dtype is not None and dtype not in CPU_DTYPES:
        return f"its kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return native.problem("cpu")


@cache
def _triton_refusal() -> str | None:
    """Why the Triton that is installed does not compile the kernels, or None; without importing it, where possible."""
    if util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # installed under another name
        version = getattr(import_module("triton"), "__version__", "of no known version")
    if _release(version) < TRITON:
        return "its kernels need triton {}.{} or newer, this is {}".format(*TRITON, version)
    return None


@cache
def interpreter_refusal() -> str | None:
    """Why Triton's interpreter, which runs kernels on the CPU, cannot work with the numpy that is there, or None."""
    triton, numpy = import_module("triton").__version__, metadata.version("numpy")
    if _release(triton) < INTERPRETER and _release(numpy) >= (2, 4):
        return f"the interpreter of triton {triton} needs a numpy older than 2.4, this is {numpy}"
    return None


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


# torch.compiler.assume_constant_result(refusal), without importing the compiler, which takes as long as torch itself.
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def implementation(operator: str, name: str) -> ModuleType:
    """The module with the launchers of an operator, or of a part `common.X`; records that an operator ran."""
    if not operator.startswith("common."):
        _last[operator] = name
    return import_module(f"{LAUNCHERS[name]}.{operator}")


def last_backend(operator: str) -> str | None:
    """The backend that ran `operator` last in this process, or None. Raises ValueError for an unknown operator."""
    if operator not in _operators():
        raise ValueError(f"there is no operator {operator!r}; there are {', '.join(_operators())}.")
    return _last.get(operator)


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`; printed, it is a table.

    Attributes:
        device: of the tensors. asked: the backend asked for, or `"auto"`.
        choices: operator -> the backend that runs it, or None if the one asked for cannot.
        reasons: operator -> backend -> why it does not run the operator, or None if it could.
    """

    device: str
    asked: str
    choices: Mapping[str, str | None]
    reasons: Mapping[str, Mapping[str, str | None]]

    def __str__(self) -> str:
        notes: dict[str, int] = {}  # reason -> its number
        rows = [["operator", *BACKENDS]]
        for operator, row in self.reasons.items():
            cells = [operator]
            for name, reason in row.items():
                free = "runs" if name == self.choices[operator] else "could"
                cells.append(f"[{notes.setdefault(reason, len(notes) + 1)}]" if reason else free)
            rows.append(cells)
        lines = [f"{operator:<22}" + "".join(f"{cell:<8}" for cell in cells) for operator, *cells in rows]
        lines += [f"[{number}] {note}" for note, number in notes.items()]
        if None in self.choices.values():
            lines.append(f"An operator that nothing runs raises an error while {self.asked} is asked for.")
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def explain(device: torch.device | str | None = None) -> Explanation:
    """Which backend runs each operator on tensors of `device` (by default the GPU if any), and why the others do not.

    Sizes and dtypes of a call may still rule a backend out; `last_backend` says what really ran.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    asked = requested()
    reasons = {
        operator: {
            name: refusal(operator, name, where.type, where.index, None, asked == name)
            if asked in ("auto", name)
            else f"{asked} was asked for"
            for name in BACKENDS
        }
        for operator in _operators()
    }
    choices = {operator: next((name for name in BACKENDS if not row[name]), None) for operator, row in reasons.items()}
    return Explanation(str(where), asked, choices, reasons)


def check(device: torch.device, *, training: bool = False) -> None:
    """Raises RuntimeError if the backend that this thread asks for cannot run some operator of inference on tensors of
    `device`, or, `training`, any operator or its gradient; ValueError for a bad OVSEG_BACKEND."""
    found = explain(device)
    if training and found.asked == "cpu":
        raise _cannot_run("training", found.asked, "its kernels are for inference, without gradients")
    for operator, choice in found.choices.items():
        if choice is None and (training or operator not in OF_TRAINING):
            raise _cannot_run(operator, found.asked, found.reasons[operator][found.asked])


def _cannot_run(operator: str, asked: str, reason: str | None) -> RuntimeError:
    return RuntimeError(f"{operator}: the {asked} backend was asked for but cannot run: {reason}.")


def _tensors_refusal(name: str, tensors: Iterable[Tensor]) -> str | None:
    """Why the kernels of a backend cannot take these very tensors: kernels for CPUs have no gradients, CUDA C++ kernels
    read 16 bytes at a time."""
    if name == "cpu":
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return "its kernels have no gradient, which a tensor needs; use torch.no_grad()"
        if not torch.compiler.is_compiling() and _is_transformed():
            return "its kernels do not take part in torch.func and forward-mode transforms"
    if name != "cuda" or torch.compiler.is_compiling():
        return None  # no addresses yet; the launchers copy what is not aligned
    plain = (tensor for tensor in tensors if type(tensor) in (Tensor, torch.nn.Parameter))
    misaligned = any(tensor.is_contiguous() and tensor.data_ptr() % 16 for tensor in plain)
    return "a tensor does not begin at a multiple of 16 bytes; give it a .clone()" if misaligned else None


def _is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _checked(name: str, source: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{source} must be one of {', '.join(('auto', *BACKENDS))}, got {name!r}.")
    return name


@cache  # once
def _say(line: str) -> None:
    logger.info(line)


@cache
def operators_with_kernels(backend: str = "triton") -> tuple[str, ...]:
    """Names of the operators with kernels in a backend, one module of launchers each."""
    return tuple(name for name in _modules(import_module(LAUNCHERS[backend]).__path__) if name in _operators())


@cache
def _operators() -> tuple[str, ...]:
    """Names of all operators, one module each in `ops`; found by path, because this module must not import `ops`."""
    return _modules([os.path.join(os.path.dirname(__file__), "ops")])


def _modules(path: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(module.name for module in iter_modules(path) if not module.ispkg))
