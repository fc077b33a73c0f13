"""Both models as one graph: torch.compile(fullgraph=True) and torch.export, then run with other sizes and class counts.

The compiler's own code generation is left out (`aot_eager`): it is PyTorch's, and takes minutes. What is checked is
that nothing breaks the graph, that sizes stay dynamic, and that the numbers stay, with each backend's operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import ovseg_fast as ovs
from tolerances import GOLDEN_OUTPUT, REWRITE_FLOAT32, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (height, width, classes); a Cascade-CLIP grid is square with an even side.
SIZES = {
    "catseg-tiny": [(96, 64, 3), (70, 90, 5)],
    "cascade-clip-tiny": [(64, 64, 3), (96, 64, 5)],
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def model_and_inputs(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = ovs.build(name)
    if name == "catseg-tiny":  # a map of one window, for the interpreter's sake
        model = type(model)(replace(model.config, image_size=48))
    model, inputs = model.eval().to(DEVICE), []
    for height, width, classes in SIZES[name]:
        text = torch.randn(classes, 1, model.text_encoder.embed_dim, device=DEVICE)
        text = F.normalize(text, dim=-1) if name.startswith("catseg") else F.normalize(text[:, 0], dim=-1)
        inputs.append((torch.rand(1, 3, height, width, device=DEVICE), text))
    return model, inputs


def assert_same(graph: nn.Module, model: nn.Module, inputs: list[tuple[Any, ...]], backend: str) -> None:
    """The graph, run with a backend, gives what the model gives in PyTorch form."""
    with torch.no_grad():
        for call in inputs:
            with ovs.backend(backend):
                result = graph(*call)
            with ovs.backend("torch"):
                assert relative_error(result, model(*call)) <= REWRITE_FLOAT32


@pytest.mark.parametrize("name", SIZES)
def test_kernels_give_what_the_pytorch_forms_give(name: str) -> None:
    """The published sizes, whose golden numbers these forms reproduce, are too large for Triton's interpreter."""
    model, inputs = model_and_inputs(name)
    model.double()
    with torch.no_grad():
        for call in inputs:
            truth = model(*(tensor.double() for tensor in call))
            with ovs.backend("triton"):
                assert relative_error(model.float()(*call), truth) <= GOLDEN_OUTPUT
            model.double()


@pytest.fixture(params=["torch", "triton", "auto"])
def backend(request: pytest.FixtureRequest) -> str:
    """With "auto", the kernels for CPUs that there are."""
    if request.param == "auto":
        request.getfixturevalue("cpu_library")
        request.getfixturevalue("on_cpu")
    return request.param


@pytest.mark.parametrize("name", SIZES)
def test_model_compiles_as_one_graph(name: str, backend: str) -> None:
    model, inputs = model_and_inputs(name)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same(compiled, model, inputs, backend)


@pytest.mark.parametrize("name", SIZES)
def test_model_exports(name: str, backend: str) -> None:
    model, inputs = model_and_inputs(name)
    dynamic = {"images": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, "text": {0: Dim.AUTO}}
    if name.startswith("catseg"):
        dynamic["class_pooling"] = None
        inputs = [(*pair, 2) for pair in inputs]
    with torch.no_grad(), ovs.backend(backend):
        exported = torch.export.export(model, inputs[0], dynamic_shapes=dynamic).module()
    assert_same(exported, model, inputs, backend)
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert any(target.startswith("ovseg_fast.") for target in operators) == (backend != "torch")
