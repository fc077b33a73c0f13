"""The memory that a full-size training step takes."""

from __future__ import annotations

import sys

import bench_training
import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_a_training_step_at_171_classes_stays_under_3_gb_above_the_weights():
    _, megabytes = bench_training.measure("rewritten")
    assert 500 < megabytes < 3000  # less would mean that no step was measured
