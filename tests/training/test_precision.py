"""Training steps under autocast, and the gradient scaler of fp16."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import ovseg_fast as ovs
from ovseg_fast.training import run as training_run
from ovseg_fast.training.finetuning import set_trainable
from ovseg_fast.training.run import CHECKPOINT, train
from ovseg_fast.training.state import State
from training.colours import assert_equal, configuration, make_data, told, weights

# (loss, gradients), relative to float32. Over three seeds and both models on a CPU, the largest were 6.5e-4 and 1.3e-2
# in bfloat16, 1.3e-4 and 3.1e-3 in float16.
LIMITS = {torch.bfloat16: (2e-3, 4e-2), torch.float16: (5e-4, 1e-2)}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", ["catseg-tiny", "cascade-clip-tiny"])
def test_a_step_under_autocast_is_close_to_float32(name, dtype, rng):
    model = ovs.build(name).eval()  # without dropout
    set_trainable(model, "full")
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=rng)
    labels = torch.randint(-1, 5, (2, 96, 96), generator=rng)
    tokens = torch.randint(1, 400, (5, model.prompts_per_class or 1, 77), generator=rng)

    def step(scale: float, enabled: bool) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            losses = model.loss(images, labels, model.text_from_prompts(model.encode_text(tokens)))
        assert all(loss.isfinite() for loss in losses.values())
        (losses["loss"] * scale).backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        return losses["loss"].item(), torch.cat(gradients) / scale

    loss, gradient = step(1.0, enabled=False)
    low_loss, low_gradient = step(1024.0 if dtype == torch.float16 else 1.0, enabled=True)
    assert low_gradient.isfinite().all()
    assert abs(low_loss - loss) <= LIMITS[dtype][0] * loss
    assert (low_gradient - gradient).norm() <= LIMITS[dtype][1] * gradient.norm()


@pytest.mark.parametrize("model", ["catseg-tiny", "cascade-clip-tiny"])
def test_a_run_in_bf16(tmp_path, model):
    make_data(tmp_path / "data")
    losses = {}
    for precision in ("fp32", "bf16"):
        config = configuration(
            tmp_path, model=model, steps=2, batch=2, log_every=1, precision=precision, out=str(tmp_path / precision)
        )
        train(config, progress=False)
        losses[precision] = [row["loss"] for row in told(tmp_path / precision)]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2) and losses["bf16"] != losses["fp32"]


def test_a_run_in_fp16_resumes_exactly(tmp_path, monkeypatch):
    """On a CPU, where accelerate refuses fp16: with its scaler and autocast set by hand."""
    make_data(tmp_path / "data")
    accelerator_of = training_run._accelerator

    def with_scaler(config):
        accelerator = accelerator_of(dataclasses.replace(config, precision="fp32"))
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
        return accelerator

    monkeypatch.setattr(training_run, "_accelerator", with_scaler)
    config = configuration(tmp_path, steps=4, batch=2, precision="fp16")
    whole = train(dataclasses.replace(config, out=str(tmp_path / "whole")), progress=False)
    run = training_run.Run(config, progress=False)
    run.prepare(restart=False)
    step = run._step
    run._step = lambda number, parts: step(number, parts) if number < 3 else 1 / 0  # after the checkpoint of step 2
    with pytest.raises(ZeroDivisionError):
        run.go()
    resumed = train(config, progress=False)
    assert_equal(weights(resumed), weights(whole))
    scalers = [State.load(folder / CHECKPOINT).scaler for folder in (tmp_path / "run", tmp_path / "whole")]
    assert scalers[0] == scalers[1] and scalers[0]["scale"] == 512.0, "grown after three steps, one of them before"
