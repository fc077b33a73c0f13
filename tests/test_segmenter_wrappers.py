"""Models in wrappers, compiled, copied and pickled Segmenters; what results keep; numbers that are not finite."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

import ovseg_fast as ovs
from ovseg_fast.cli import main, options
from ovseg_fast.evaluation.evaluate import evaluate

NAMES = ["green grass", "star", "red cross"]
MODELS = ["catseg-tiny", "cascade-clip-tiny"]
NOT_KEPT = r"^this result keeps no scores; call segment with scores=True, and read \.scores before you pickle it\.$"


class Module(nn.Module):
    """As DistributedDataParallel and the like hold a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "module": Module,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled module": lambda model: compiled(Module(model)),
    "module of compiled": lambda model: Module(Module(compiled(model))),
}


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (70, 110, 3), dtype=np.uint8)


@pytest.fixture(params=MODELS)
def seg(request: pytest.FixtureRequest) -> ovs.Segmenter:
    return ovs.load(request.param, device="cpu")


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_models_are_unwrapped(
    wrap: str, seg: ovs.Segmenter, photo: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    expected = seg.segment(photo, NAMES, mode="whole").scores
    made = ovs.Segmenter(WRAPPERS[wrap](seg.model))
    assert np.array_equal(made.segment(photo, NAMES, mode="whole").scores, expected)
    warned = [record for record in caplog.records if "which are not compiled yet" in record.message]
    assert len(warned) == ("compile" in wrap)
    seg.model = WRAPPERS[wrap](seg.model)
    assert np.array_equal(seg.segment(photo, NAMES, mode="whole").scores, expected)


@pytest.mark.parametrize("wrap", ["compile", "DataParallel", "compiled module"])
def test_checkpoints_of_wrapped_models(wrap: str, seg: ovs.Segmenter, tmp_path: Path) -> None:
    expected, file = seg.model.state_dict(), tmp_path / "model.safetensors"
    ovs.checkpoints.save(WRAPPERS[wrap](seg.model), file)
    for fill in (
        lambda model: ovs.checkpoints.load(model, file),
        lambda model: ovs.checkpoints.load_upstream(model, ovs.checkpoints.to_upstream(WRAPPERS[wrap](seg.model))),
    ):
        other = ovs.build(str(seg.model.preset))
        fill(WRAPPERS[wrap](other))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in other.state_dict().items())


def test_a_compiled_part_is_saved_and_loaded_under_its_own_name(seg: ovs.Segmenter, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    plain = ovs.build(str(seg.model.preset))
    name = next(iter(seg.model._modules))
    setattr(seg.model, name, compiled(getattr(seg.model, name)))
    ovs.checkpoints.save(seg.model, file)
    ovs.checkpoints.load(plain, file)
    ovs.checkpoints.load(seg.model, file)


def sharded() -> Any:
    """Whose weights have to be gathered, as those of FSDP2."""
    model = ovs.build("catseg-tiny")
    model.clip.logit_scale.full_tensor = lambda: None  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "model must be a SegmentationModel, got Linear"),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), TypeError, "got DataParallel"),
        (lambda: "catseg-tiny", TypeError, "got str"),
        (lambda: ovs.load("catseg-tiny"), TypeError, "got Segmenter"),
        (sharded, ValueError, "got one whose weights are sharded; gather them first"),
    ],
)
def test_what_is_no_model(make: Callable[[], Any], error: type[Exception], words: str, tmp_path: Path) -> None:
    model = make()
    for use in (
        ovs.Segmenter,
        lambda model: ovs.checkpoints.save(model, tmp_path / "a.safetensors"),
        ovs.checkpoints.to_upstream,
    ):
        with pytest.raises(error, match=words) as caught:
            use(model)
        assert "\n" not in str(caught.value)


def test_models_without_memory_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = ovs.build("catseg-tiny")
    with pytest.raises(ValueError, match="model must hold weights, got one on 'meta'"):
        ovs.Segmenter(model)
    ovs.checkpoints.save(ovs.build("catseg-tiny"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model must have memory for its weights, got one on 'meta'"):
        ovs.checkpoints.load(model, tmp_path / "model.safetensors")


def test_compile_compiles_what_segment_runs(seg: ovs.Segmenter, photo: np.ndarray) -> None:
    torch.compiler.reset()
    expected = seg.segment(photo, NAMES, mode="whole")
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    seg.compile(backend=backend, fullgraph=True)
    result = seg.segment(photo, NAMES, mode="whole")
    assert np.array_equal(result.labels, expected.labels) and np.allclose(result.scores, expected.scores, atol=1e-5)
    assert len(graphs) >= 2  # the encoder and the head
    first = len(graphs)
    seg.segment(photo, NAMES, mode="whole")
    assert len(graphs) == first
    seg.model.train()  # a training model's dropout would be in the graph: it runs uncompiled
    assert np.array_equal(seg.segment(photo, NAMES, mode="whole").labels, expected.labels)


def test_segmenters_can_be_copied_and_pickled(seg: ovs.Segmenter, photo: np.ndarray) -> None:
    expected = seg.segment(photo, NAMES, mode="whole").labels
    encoded = seg.encode(photo, "whole")
    for again in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        assert np.array_equal(again(seg).segment(photo, NAMES, mode="whole").labels, expected)
        assert np.array_equal(again(encoded).segment(NAMES).labels, expected)
    seg.compile(backend="eager")
    seg._runner("decode")
    assert copy.deepcopy(seg)._compile_options == {"backend": "eager"}


def test_only_single_results_keep_their_scores_unless_asked(seg: ovs.Segmenter, photo: np.ndarray) -> None:
    expected = seg.segment(photo, NAMES)
    first, second = seg.segment([photo, photo], NAMES)
    silent, encoded = seg.segment(photo, NAMES, scores=False), seg.encode(photo)
    for result in (first, second, silent, encoded.segment(NAMES, scores=False)):
        assert np.array_equal(result.labels, expected.labels)
        assert result._compute_scores is None and result._compute_top is None
        for ask in (lambda out: out.scores, lambda out: out.top(1)):
            with pytest.raises(RuntimeError, match=NOT_KEPT):
                ask(result)
    (asked,) = seg.segment([photo], NAMES, scores=True)
    assert np.array_equal(asked.scores, expected.scores)
    assert np.array_equal(encoded.segment(NAMES).scores, expected.scores)


def test_results_can_be_pickled_and_copied(seg: ovs.Segmenter, photo: np.ndarray, tmp_path: Path) -> None:
    fresh, used = seg.segment(photo, NAMES), seg.segment(photo, NAMES)
    scores = used.scores
    assert len(pickle.dumps(fresh)) < fresh.labels.nbytes + photo.nbytes + 5000  # no logits
    for result in (fresh, used):
        twin = copy.deepcopy(result)
        assert twin.labels is not result.labels and np.array_equal(twin.labels, result.labels)
        assert np.array_equal(twin.scores, scores) and np.array_equal(twin.top(1)[0], result.top(1)[0])
        loaded = pickle.loads(pickle.dumps(result))
        assert np.array_equal(loaded.labels, result.labels) and loaded.classes == NAMES
        loaded.save(tmp_path / "overlay.png")
        with pytest.raises(RuntimeError, match=NOT_KEPT):
            loaded.top(1)
    assert np.array_equal(pickle.loads(pickle.dumps(used)).scores, scores)
    with pytest.raises(RuntimeError, match=NOT_KEPT):
        pickle.loads(pickle.dumps(seg.segment(photo, NAMES))).save(tmp_path / "labels.npz", scores=True)
    assert not (tmp_path / "labels.npz").exists()


@torch.no_grad()
def spoil(model: nn.Module, part: str, value: float) -> str:
    name, weight = next(item for item in model.named_parameters() if part in item[0])
    weight.view(-1)[0] = value
    return name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["conv1.weight", "ln_final.weight", ".fc1.weight|.linear1.weight"])
def test_weights_that_are_not_finite_give_no_labels(
    part: str, value: float, seg: ovs.Segmenter, photo: np.ndarray
) -> None:
    names = [name for name, _ in seg.model.named_parameters()]
    part = next(choice for choice in part.split("|") if any(choice in name for name in names))
    name = spoil(seg.model, part, value)
    with pytest.raises(FloatingPointError, match=rf"as are the model's weights in '{name}'; load other weights\.$"):
        seg.segment(photo, NAMES)


def test_numbers_that_are_not_finite_end_an_evaluation_and_a_command(
    seg: ovs.Segmenter, photo: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(seg.model, "conv1.weight", float("nan"))
    vocabulary = SimpleNamespace(classes=tuple(NAMES), unseen=(), background=())
    pair = Image.fromarray(photo), np.zeros(photo.shape[:2], np.int64)
    dataset: Any = SimpleNamespace(
        name="one", vocabulary=vocabulary, pairs=[SimpleNamespace(name="photo")], read=lambda index: pair
    )
    with pytest.raises(FloatingPointError, match=r"conv1\.weight"):
        evaluate(seg, dataset, progress=False)
    monkeypatch.setattr(options, "load_model", lambda *_, **__: seg)
    pair[0].save(tmp_path / "photo.png")
    arguments = ["segment", str(tmp_path / "photo.png"), "-c", ", ".join(NAMES), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert "logits are NaN or infinite" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["float16", "autocast"])
def test_overflow_gives_no_labels(kind: str, seg: ovs.Segmenter, photo: np.ndarray) -> None:
    with torch.no_grad():
        for name, parameter in seg.model.named_parameters():
            if "mlp.c_proj.weight" in name:
                parameter.mul_(60_000 / parameter.abs().max())
    text = torch.randn(3, 64)
    if kind == "float16":
        seg.model.half()
    for arguments in ({"classes": NAMES}, {"text": text}):
        with (
            torch.autocast("cpu", torch.float16, enabled=kind == "autocast"),
            pytest.raises(FloatingPointError, match="numbers overflow in float16; use bfloat16 or float32"),
        ):
            seg.segment(photo, **arguments)  # type: ignore[arg-type]
    assert not seg._prompt_cache.embeddings


def test_large_logits_are_no_overflow(photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sum does."""
    seg = ovs.load("catseg-tiny", device="cpu")
    decode = seg.model.decode
    monkeypatch.setattr(seg.model, "decode", lambda *args, **options: decode(*args, **options).sign() * 3e38)
    assert seg.segment(photo, NAMES).labels.shape == (70, 110)


@pytest.mark.parametrize("preset", MODELS)
def test_tracing_is_refused_in_one_sentence(preset: str) -> None:
    model = ovs.build(preset).eval()
    example = torch.rand(1, 3, 96, 96), torch.randn(2, 1, 64) if preset == "catseg-tiny" else torch.randn(2, 64)
    logging.disable(logging.WARNING)
    try:
        with pytest.raises(RuntimeError, match=r"use torch\.export or torch\.onnx\.export\(dynamo=True\)\.$"):
            torch.jit.trace(model, example)
    finally:
        logging.disable(logging.NOTSET)
