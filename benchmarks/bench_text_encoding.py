"""Text encoding of the 171 COCO-Stuff names (CLIP ViT-B/16, float32): cut after the end tokens against all of it."""

from __future__ import annotations

import statistics
import time

import torch

import literal
from ovseg_fast.data.vocabularies import COCO_STUFF
from ovseg_fast.models.clip import CLIP
from ovseg_fast.vocabulary import CATSEG_TEMPLATES, fill_templates, prompt_name, tokenize
from tolerances import REWRITE_FLOAT32, relative_error


def test_text_encoding(benchmark):
    """At least 4 times as fast, after the two agree; the forms take turns in one process."""
    torch.manual_seed(0)
    encoder = CLIP("ViT-B-16-quickgelu").text.eval()
    weights = dict(encoder.named_parameters())
    names = [prompt_name(name) for name in COCO_STUFF.classes]
    tokens = tokenize(fill_templates(names, CATSEG_TEMPLATES))[:, 0]
    literal_times: list[float] = []

    def time_literal() -> None:
        start = time.perf_counter()
        literal.text_encoder(weights, tokens)
        literal_times.append(time.perf_counter() - start)

    with torch.inference_mode():
        error = relative_error(encoder(tokens), literal.text_encoder(weights, tokens))
        assert error <= REWRITE_FLOAT32
        benchmark.pedantic(encoder, args=(tokens,), setup=time_literal, rounds=3, warmup_rounds=1)
    ratio = statistics.median(literal_times) / benchmark.stats["median"]
    benchmark.extra_info.update(
        literal_median=round(statistics.median(literal_times), 4),
        speedup=round(ratio, 2),
        relative_error=error,
        threads=torch.get_num_threads(),
    )
    assert ratio >= 4
