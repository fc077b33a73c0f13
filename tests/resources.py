"""Registers, shared memory and spills of every Triton kernel, compiled ahead of time: no GPU is needed.

The kernels of an operator are those that its launchers ask for at the published sizes, forward and backward.

    python tests/resources.py [OPERATOR ...]    prints the table; test_resources.py states the bounds
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ovseg_fast import backends
from ovseg_fast.kernels.common import launch
from samples import floating, map_floating, select, tensors

ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float32)
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Request(NamedTuple):
    """One kernel to compile, as a launcher asks for it."""

    module: str
    kernel: str
    dtype: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[int, ...]  # positions of the arguments that 16 divides
    options: dict[str, int]


class Usage(NamedTuple):
    """What a compiled kernel takes: registers and spilled bytes of a thread, bytes of shared memory of a program."""

    kernel: str  # as "residual_mlp.forward bf16"
    architecture: int
    warps: int
    registers: int
    shared: int
    spilled: int


def specialised(argument: Any) -> tuple[str, Any, bool]:
    """Type, value if the compiler takes it as a constant, and whether 16 divides it, as at Triton's own launch."""
    if isinstance(argument, torch.Tensor):
        return "*" + TYPES[argument.dtype], None, True
    if argument is None or isinstance(argument, bool):
        return "constexpr", argument, False
    if isinstance(argument, float):
        return "fp32", None, False
    if argument == 1:
        return "constexpr", 1, False
    return "i64" if abs(argument) >= 2**31 else "i32", None, argument % 16 == 0


def requests(operator: str, architecture: int) -> list[Request]:
    """What the launchers of `operator` launch on `architecture`, each kernel once."""
    found: list[Request] = []
    launch.recorded_generation = architecture
    backends.refusal = lambda operator, name, *_: None if name == "triton" else "only Triton's kernels are compiled"
    for dtype in DTYPES:

        def record(
            kernel: Any,
            arguments: tuple[Any, ...],
            constants: dict[str, Any],
            options: dict[str, int],
            dtype: torch.dtype = dtype,
        ) -> None:
            signature, values, divisible = {}, dict(constants), []
            for position, (name, argument) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
                signature[name], constant, by16 = specialised(argument)
                if signature[name] == "constexpr":
                    values[name] = constant
                if by16:
                    divisible.append(position)
            signature |= dict.fromkeys(constants, "constexpr")
            function = kernel.fn
            request = Request(
                function.__module__, function.__name__, TYPES[dtype], signature, values, tuple(divisible), options
            )
            if request not in found:
                found.append(request)

        launch.recorder = record
        for row in select("bench", operator=operator):
            if "171" in row.name or "156" in row.name:
                continue  # the same kernels as with fewer classes
            call = row.build(torch.Generator().manual_seed(0), dtype)
            # Labels have no gradient.
            leaves = map_floating(lambda tensor: tensor.requires_grad_(operator != "label_map"), call)
            results = [result for result in tensors(row.run(leaves)) if result.requires_grad]
            if results:
                torch.autograd.grad(
                    sum(result.float().sum() for result in results), floating(leaves), allow_unused=True
                )
    return found


def measure(request: Request, architecture: int) -> Usage:
    """Compile one kernel and read its use of the machine from the binary."""
    kernel = getattr(import_module(request.module), request.kernel)
    attributes = {(position,): [["tt.divisibility", 16]] for position in request.divisible}
    source = ASTSource(kernel, request.signature, request.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=request.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    name = f"{request.module.rpartition('.')[2]}.{request.kernel.strip('_')} {request.dtype}"
    return Usage(name, architecture, request.options["num_warps"], registers, compiled.metadata.shared, stack)


def usages(operator: str) -> list[Usage]:
    """Every kernel of `operator` on every architecture, compiled in OVSEG_JOBS processes (by default one a core)."""
    jobs = [(request, architecture) for architecture in ARCHITECTURES for request in requests(operator, architecture)]
    with ProcessPoolExecutor(int(os.environ.get("OVSEG_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(measure, *zip(*jobs, strict=True)))


if __name__ == "__main__":
    for operator in sys.argv[1:] or backends.operators_with_kernels():
        for usage in sorted(usages(operator)):
            print(
                f"{operator + ': ' + usage.kernel:<72} sm_{usage.architecture:<4} {usage.warps:>2} warps "
                f"{usage.registers:>4} registers {usage.shared:>7} bytes shared {usage.spilled:>3} spilled"
            )
