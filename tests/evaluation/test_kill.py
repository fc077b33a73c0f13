"""An evaluation that is killed without warning resumes to the numbers of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import ovseg_fast as ovs
from evaluation import photo_folder
from ovseg_fast import checkpoints
from ovseg_fast.evaluation.evaluate import evaluate

IMAGES = 60


def images_done(partial) -> int:
    with np.load(partial) as state:
        return int(state["done"].sum())


@pytest.fixture
def one_thread():
    """As in the process that is killed: sums, and with them labels near a tie, depend on how threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_at_a_random_moment(tmp_path):
    photos = photo_folder.make_photos(tmp_path / "photos", IMAGES, random.randrange(2**31))
    photos.pairs[7].image.write_bytes(b"broken")
    torch.manual_seed(random.randrange(2**31))
    model = ovs.build("catseg-tiny")
    checkpoints.save(model, tmp_path / "tiny.safetensors")
    result, partial = tmp_path / "result.json", tmp_path / "result.partial.npz"
    result.write_text("an earlier result")

    command = [sys.executable, photo_folder.__file__, tmp_path / "photos", tmp_path / "tiny.safetensors", result]
    with subprocess.Popen(list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        began = time.monotonic()
        wanted = random.randrange(1, 20)
        while not (partial.exists() and images_done(partial) >= wanted):
            assert process.poll() is None and time.monotonic() - began < 240
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.1))  # in the midst of reading, computing or writing
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert result.read_text() == "an earlier result"
    before = images_done(partial)
    assert wanted <= before < IMAGES

    read = []
    again = photo_folder.PhotoFolder(tmp_path / "photos")
    again.read = lambda index: read.append(index) or photos.read(index)
    segmenter = ovs.load("catseg-tiny", weights=tmp_path / "tiny.safetensors", device="cpu")
    segmenter.model.double()
    evaluate(segmenter, again, result, mode="whole", progress=False)
    assert IMAGES - before <= len(read) <= IMAGES - before + 1  # the broken one may come twice, no other does
    evaluate(segmenter, photos, tmp_path / "undisturbed.json", mode="whole", progress=False)
    resumed, undisturbed = (json.loads(path.read_text()) for path in (result, tmp_path / "undisturbed.json"))
    assert resumed["images"]["evaluated"] == IMAGES - 1
    for key in ("metrics", "classes", "images", "absent_classes", "rules"):
        assert resumed[key] == undisturbed[key]
    assert not partial.exists()
