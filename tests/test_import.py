"""Importing is cheap and needs nothing optional. Each check runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
import time

import pytest

OPTIONAL = ("triton", "xformers")
LAZY = (*OPTIONAL, "open_clip", "timm", "torchvision", "torch.utils.cpp_extension", "torch._dynamo")


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        cwd=tempfile.gettempdir(),  # from the repository root, Python would import its folders
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_takes_less_than_three_seconds() -> None:
    seconds = []
    for _ in range(3):  # the first one may have to read torch from a cold disk
        start = time.perf_counter()
        run("import ovseg_fast")
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 3:
            return
    pytest.fail(f"python -c 'import ovseg_fast' took {seconds} s")


def test_import_loads_nothing_heavy_or_optional() -> None:
    loaded = run(f"""
        import sys
        import ovseg_fast.ops, ovseg_fast.models, ovseg_fast.segmenter
        print([name for name in {LAZY} if name in sys.modules])
    """)
    assert loaded.strip() == "[]"


def test_a_typing_mistake_is_answered_before_pytorch_is_imported() -> None:
    run("""
        import sys
        from ovseg_fast.cli import main
        for words in (["missing.png", "-c", "cat"], ["missing.png"], ["missing.png", "-c", "cat, cat"]):
            try:
                main(["segment", *words])
            except SystemExit as end:
                assert end.code == 2
        assert "torch" not in sys.modules
    """)


def test_loading_a_model_leaves_the_code_that_draws_the_world_alone() -> None:
    loaded = run("""
        import sys
        import ovseg_fast as ovs
        from ovseg_fast.data import open_dataset
        ovs.load("catseg-tiny", device="cpu")
        before = [name for name in sys.modules if name.startswith("ovseg_fast.data.world.")]
        open_dataset("world", limit=1)
        from ovseg_fast.data import World
        print(before, "ovseg_fast.data.world.drawing" in sys.modules)
    """)
    assert loaded.strip() == "['ovseg_fast.data.world.classes'] True"


def test_import_does_not_initialise_cuda() -> None:
    run("""
        import ovseg_fast, ovseg_fast.kernels, ovseg_fast.ops
        import torch
        assert not torch.cuda.is_initialized()
    """)


def test_import_leaves_the_native_library_alone(tmp_path) -> None:
    """A broken one is told where it is needed first; `auto` then runs something else."""
    (tmp_path / "broken.so").write_text("no library")
    run(
        """
        import ovseg_fast as ovs
        from ovseg_fast import native
        import ovseg_fast.cuda.spatial_aggregation
        assert native.library.cache_info().currsize == 0
        import torch
        ovs.ops.cost_volume(torch.randn(1, 4, 5, 8), torch.randn(3, 2, 8))
        assert "broken.so cannot be loaded" in native.problem()
        """,
        OVSEG_NATIVE_LIBRARY=str(tmp_path / "broken.so"),
    )


def test_import_and_operators_work_without_triton_xformers_and_nvcc() -> None:
    run(
        f"""
        import sys
        for name in {OPTIONAL}:
            sys.modules[name] = None  # import of it raises ImportError
        import ovseg_fast
        import torch
        image, text = torch.randn(1, 4, 5, 8), torch.randn(3, 2, 8)
        assert torch.isfinite(ovseg_fast.ops.cost_volume(image, text)).all()
        """,
        PATH="",
        CUDA_HOME="",
    )


def test_torchvision_imports_and_open_clip_with_it() -> None:
    run("""
        from ovseg_fast import compat
        compat.ensure_importable()
        compat.ensure_importable()
        import torchvision.transforms
        import open_clip
    """)


def stub_torchvision(folder, compiled_half_loads: bool) -> str:
    """A package that behaves on import as torchvision does, with or without its compiled half."""
    package = folder / "torchvision"
    package.mkdir()
    define = """
        import torch
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    """
    (package / "extension.py").write_text(textwrap.dedent(define) if compiled_half_loads else "")
    describe = """
        from . import extension
        import torch
        for name in ("nms", "qnms"):
            torch.library.register_fake("torchvision::" + name)(lambda *arguments: None)
    """
    (package / "__init__.py").write_text(textwrap.dedent(describe))
    return str(folder)


@pytest.mark.parametrize("compiled_half_loads", [True, False])
def test_torchvision_schemas_are_defined_only_when_missing(tmp_path, compiled_half_loads: bool) -> None:
    defined = run(
        """
        from ovseg_fast import compat
        compat.ensure_importable()
        compat.ensure_importable()
        import torch, torchvision
        assert torch.ops.torchvision.nms and torch.ops.torchvision.qnms
        print(len(compat._libraries))
        """,
        PYTHONPATH=stub_torchvision(tmp_path, compiled_half_loads),
    )
    assert int(defined) == (0 if compiled_half_loads else 1)


def test_torchvision_failing_otherwise_is_not_hidden(tmp_path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('another failure')")
    run(
        """
        from ovseg_fast import compat
        try:
            compat.ensure_importable()
        except RuntimeError as error:
            assert str(error) == "another failure"
        else:
            raise SystemExit("no error")
        """,
        PYTHONPATH=str(tmp_path),
    )
