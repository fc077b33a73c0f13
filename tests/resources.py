"""Registers, shared memory and spills of every Triton kernel, compiled ahead of time: no GPU is needed.

The kernels of each operator are taken as its launchers ask for them at a published size, forward and backward.

    python tests/resources.py [OPERATOR ...]            prints the table
    python tests/resources.py --write [OPERATOR ...]    and records it in tests/resources/OPERATOR.json
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ovseg_fast import backends
from ovseg_fast.kernels.common import launch
from samples import floating, map_floating, select, tensors

RECORDS = Path(__file__).with_name("resources")
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


def specialised(argument: Any) -> tuple[str, Any, bool]:
    """Type, value where the compiler takes it as a constant, and whether 16 divides it, as at Triton's own launch."""
    if isinstance(argument, torch.Tensor):
        return "*" + TYPES[argument.dtype], None, True
    if argument is None or isinstance(argument, bool):
        return "constexpr", argument, False
    if isinstance(argument, float):
        return "fp32", None, False
    if argument == 1:
        return "constexpr", 1, False
    return "i64" if abs(argument) >= 2**31 else "i32", None, argument % 16 == 0


def requests(operator: str, architecture: int) -> dict[str, tuple[Any, ...]]:
    """What the launchers of `operator` launch on `architecture`: name and dtype -> (module, kernel, signature,
    constants, divisible, options)."""
    found: dict[str, tuple[Any, ...]] = {}
    launch.recorded_generation = architecture
    backends.refusal = lambda operator, name, *_: None if name == "triton" else "the kernels are looked at"
    for dtype in DTYPES:

        def record(
            kernel: Any,
            arguments: tuple[Any, ...],
            constants: dict[str, Any],
            options: dict[str, int],
            dtype: torch.dtype = dtype,
        ) -> None:
            names = kernel.arg_names
            signature, values, divisible = {}, dict(constants), []
            for position, (name, argument) in enumerate(zip(names, arguments, strict=False)):
                signature[name], constant, by16 = specialised(argument)
                if signature[name] == "constexpr":
                    values[name] = constant
                if by16:
                    divisible.append(position)
            signature |= dict.fromkeys(constants, "constexpr")
            label = f"{kernel.fn.__name__.strip('_')} {TYPES[dtype]}"
            entry = (kernel.fn.__module__, kernel.fn.__name__, signature, values, divisible, options)
            number = 1
            while found.setdefault(f"{label} #{number}", entry) != entry:
                number += 1

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


def measure(request: tuple[Any, ...], architecture: int) -> dict[str, int]:
    """Compile one kernel and read its use of the machine from the binary."""
    module, name, signature, constants, divisible, options = request
    kernel = getattr(__import__(module, fromlist=[name]), name)
    attributes = {(position,): [["tt.divisibility", 16]] for position in divisible}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return {"registers": registers, "shared": compiled.metadata.shared, "spilled": stack, "warps": options["num_warps"]}


def table(operator: str) -> dict[str, dict[str, dict[str, int]]]:
    """Kernel -> architecture -> what it uses, compiled in OVSEG_JOBS processes (by default one a core)."""
    jobs = [
        (label, request, architecture)
        for architecture in ARCHITECTURES
        for label, request in requests(operator, architecture).items()
    ]
    result: dict[str, dict[str, dict[str, int]]] = {}
    with ProcessPoolExecutor(int(os.environ.get("OVSEG_JOBS") or os.cpu_count() or 1)) as pool:
        usages = pool.map(measure, [job[1] for job in jobs], [job[2] for job in jobs])
        for (label, _, architecture), usage in zip(jobs, usages, strict=True):
            result.setdefault(label, {})[f"sm_{architecture}"] = usage
    return result


if __name__ == "__main__":
    write = "--write" in sys.argv
    for operator in [name for name in sys.argv[1:] if name != "--write"] or backends.operators_with_kernels():
        measured = table(operator)
        for label, by_architecture in measured.items():
            for architecture, usage in by_architecture.items():
                numbers = "  ".join(f"{name} {value}" for name, value in usage.items())
                print(f"{operator + ': ' + label:<58}{architecture:<8}{numbers}")
        if write:
            RECORDS.mkdir(exist_ok=True)
            (RECORDS / f"{operator}.json").write_text(json.dumps(measured, indent=1) + "\n")
