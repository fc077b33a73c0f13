"""Text encoding of the 171 COCO-Stuff names (CLIP ViT-B/16, float32): cut after the end tokens, or whole."""

from __future__ import annotations

from typing import Any

from side_by_side import speedup

import literal
from ovseg_fast.data.vocabularies import COCO_STUFF
from ovseg_fast.models.catseg import TEMPLATES
from ovseg_fast.models.clip import CLIP
from ovseg_fast.vocabulary import fill_templates, tokenize


def test_text_encoding(benchmark: Any) -> None:
    """At least 4 times as fast."""
    encoder = CLIP("ViT-B-16-quickgelu").text.eval()
    weights = dict(encoder.named_parameters())
    tokens = tokenize(fill_templates(COCO_STUFF.classes, TEMPLATES))[:, 0]
    ratio = speedup(benchmark, lambda: literal.text_encoder(weights, tokens), lambda: encoder(tokens), rounds=3)
    assert ratio >= 4
