"""Threads that share Segmenters: their labels must be those of serial calls.

    python benchmarks/torture/threads.py [CALLS]

Each of 8 threads makes CALLS calls (400), half of them on each small model, which is in training mode: on two
Segmenters of one model, with images encoded by other threads, under autocast and inference mode, while the text cache
is emptied.
Prints how many results were wrong, and exits with 1 if any was.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter

import numpy as np
import torch
from torch import autocast, inference_mode

import ovseg_fast as ovs
from ovseg_fast.data.world.classes import NAMES

THREADS = 8
MODELS = "cascade-clip-tiny", "catseg-tiny"


def main(calls: int) -> int:
    """Run `calls` calls in each of 8 threads; returns the number of wrong results."""
    return sum(_stress(name, -(-calls // len(MODELS))) for name in MODELS)


def _stress(name: str, calls: int) -> int:
    words = list(NAMES)[::4]
    lists = [words[first : first + 2 + first % 7] for first in range(24)]
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (48, 48 + 8 * i, 3), dtype=np.uint8) for i in range(3)]
    serial = ovs.load(name, device="cpu")
    truth = {(i, k): serial.segment(image, lists[k], mode="whole") for i, image in enumerate(images) for k in range(24)}
    for result in truth.values():
        result.scores  # noqa: B018
    shared = ovs.load(name, device="cpu")
    shared.model.train()
    other = ovs.Segmenter(shared.model)  # two Segmenters of one model
    encoded = [shared.encode(image, "whole") for image in images]
    wrong: Counter[str] = Counter()
    lock, barrier = threading.Lock(), threading.Barrier(THREADS + 1)
    stop = threading.Event()

    def work(number: int) -> None:
        chance = random.Random(number)
        barrier.wait()
        for _ in range(calls):
            i, k, seg = chance.randrange(3), chance.randrange(24), chance.choice((shared, other))
            kind, scores = chance.choice(("segment", "prompt", "inference", "autocast")), None
            try:
                if kind == "segment":
                    labels = seg.segment(images[i], lists[k], mode="whole").labels
                elif kind == "prompt":
                    result = encoded[i].segment(lists[k])
                    labels, scores = result.labels, result.scores
                elif kind == "inference":
                    with inference_mode():
                        labels = seg.segment(images[i], lists[k], mode="whole").labels
                else:  # its own numbers differ; what it leaves behind must not reach the others
                    with autocast("cpu", torch.bfloat16):
                        seg.segment(images[i], lists[k], mode="whole")
                    continue
                bad = not np.array_equal(labels, truth[i, k].labels)
                bad |= scores is not None and np.abs(scores - truth[i, k].scores).max() > 1e-5
            except Exception as error:
                kind, bad = f"{kind}: {type(error).__name__} {error}", True
            if bad or not shared.model.training:
                with lock:
                    wrong[kind if bad else "mode"] += 1

    def empty() -> None:
        barrier.wait()
        while not stop.wait(0.02):
            shared._prompt_cache.embeddings.clear()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    emptying = threading.Thread(target=empty)
    began = time.monotonic()
    for thread in (*threads, emptying):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    emptying.join()
    seconds = time.monotonic() - began
    print(f"{name}: {wrong.total()} wrong of {THREADS * calls} calls in {seconds:.0f} s {dict(wrong) or ''}".rstrip())
    return wrong.total()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 400) > 0)
