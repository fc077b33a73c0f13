"""The models that `claims.py` compares: the published tiny ones, and what the two papers compare their methods with.

A variant is the published model with a part replaced or removed, so that all variants of a method and a seed start from
the same weights in what they share. A variant has nothing that it does not use, so nothing idle is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovseg_fast import ops
from ovseg_fast.layers.cascade_head import CascadeHead
from ovseg_fast.layers.cost_aggregator import DROPPED_LOGIT, CostAggregator
from ovseg_fast.models import CascadeCLIP, CATSeg, build

# --- CAT-Seg ---


class FeatureAggregator(CostAggregator):
    """Feature aggregation: a pair's embedding is a linear map of its image feature plus one of its text feature, in
    place of the convolution over its cosine costs (the baseline of CAT-Seg, section 4.3).

    All else is the published aggregator, including the choice of `pad_length` classes of an image by their costs.
    """

    def __init__(self, published: CostAggregator) -> None:
        nn.Module.__init__(self)
        self.pad_length = published.pad_length
        for name, part in published.named_children():
            if name != "cost_embedding":
                self.add_module(name, part)
        width, channels = published.text_projection.in_features, published.cost_embedding.out_channels
        self.image_embedding = nn.Linear(width, channels)
        self.text_embedding = nn.Linear(width, channels, bias=False)

    def forward(
        self, image: Tensor, text: Tensor, appearance: Sequence[Tensor], pooling: int, kept: bool = False
    ) -> Tensor:
        """As `CostAggregator.forward`, but dense even if the computed classes alone would do."""
        text = F.normalize(text, dim=-1)
        if len(text) <= self.pad_length:
            return self._aggregate(self.embed(image, text), image, text, appearance, pooling)
        costs = ops.cost_volume(image, text).detach().amax((2, 3, 4))
        best = costs.topk(self.pad_length, sorted=False).indices.sort().values
        logits = self._aggregate(self.embed(image, text[best]), image, text[best], appearance, pooling)
        full = logits.new_full((len(image), len(text), *logits.shape[-2:]), DROPPED_LOGIT)
        return full.index_put((torch.arange(len(image), device=image.device).unsqueeze(1), best), logits)

    def embed(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, H, W, E) and unit-length (T, P, E) or (B, T, P, E) -> (B, T, H, W, C)."""
        of_image = self.image_embedding(F.normalize(image, dim=-1))
        of_text = self.text_embedding(F.normalize(text.mean(-2), dim=-1))
        return of_image.unsqueeze(1) + of_text[..., None, None, :]


class Skip(nn.Module):
    """Stands in for a layer that is left out: returns its first argument unchanged."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


def _features(model: CATSeg) -> None:
    model.aggregator = FeatureAggregator(model.aggregator)


def _leave_out(*parts: str) -> Callable[[CATSeg], None]:
    """Without `spatial` or `classes` aggregation, and without the projection that would guide it."""
    projections = {"spatial": "appearance_projection", "classes": "text_projection"}

    def change(model: CATSeg) -> None:
        for part in parts:
            setattr(model.aggregator, projections[part], Skip())
            for layer in model.aggregator.layers:
                setattr(layer, part, Skip())

    return change


# --- Cascade-CLIP ---


class FixedWeights(nn.Module):
    """Fixed weights (L,) of each stage's layers, in place of `CascadeHead.stage_weights`."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        for stage, values in enumerate(weights):
            self.register_buffer(str(stage), values)

    def __iter__(self) -> Iterator[Tensor]:
        return self.buffers(recurse=False)


class OneDecoder(CascadeHead):
    """The published head's last decoder alone, on the sum of all stages' maps."""

    def __init__(self, published: CascadeHead, weights: FixedWeights) -> None:
        nn.Module.__init__(self)
        self.stage_weights = weights  # type: ignore[assignment]
        self.query_projections = published.query_projections[-1:]
        self.decoders = published.decoders[-1:]

    def forward(self, stages: Sequence[Tensor], global_embedding: Tensor, text: Tensor) -> Tensor:
        """As `CascadeHead.forward`."""
        return super().forward([torch.stack(list(stages)).sum(0)], global_embedding, text)


def _last_layer(model: CascadeCLIP) -> None:
    encoder = model.image_encoder
    encoder.gathered = ()
    for name in ("norm_weight", "norm_bias", "proj_layers"):
        setattr(encoder, name, nn.Parameter(getattr(encoder, name).detach()[:0]))
    model.head = OneDecoder(model.head, FixedWeights([]))


def _summed_layers(model: CascadeCLIP) -> None:
    model.head = OneDecoder(model.head, FixedWeights([torch.ones(len(each)) for each in model.head.stage_weights]))


def _mean_of_stage(model: CascadeCLIP) -> None:
    weights = [torch.full((len(each),), 1 / len(each)) for each in model.head.stage_weights]
    model.head.stage_weights = FixedWeights(weights)  # type: ignore[assignment]


def _sum_of_stage(model: CascadeCLIP) -> None:
    weights = [torch.ones(len(each)) for each in model.head.stage_weights]
    model.head.stage_weights = FixedWeights(weights)  # type: ignore[assignment]


# --- all of them ---


@dataclass(frozen=True)
class Variant:
    """A model to train.

    Attributes:
        preset: the published model. change: turns it into the variant, in place; None leaves it as it is.
        policy: what of CLIP is trained, see `training.finetuning`; None for the published policy.
    """

    preset: str
    change: Callable[[Any], None] | None = None
    policy: str | None = None

    def build(self, seed: int, clip: str | None) -> CATSeg | CascadeCLIP:
        """The model at the start; `seed` draws all weights but CLIP's, `clip` is as in `models.build`."""
        torch.manual_seed(seed)
        model = build(self.preset, clip_pretrained=clip)
        if self.change is not None:
            self.change(model)
        return model


VARIANTS = {
    "catseg": Variant("catseg-tiny"),
    "catseg-features": Variant("catseg-tiny", _features),
    "catseg-spatial": Variant("catseg-tiny", _leave_out("classes")),
    "catseg-classes": Variant("catseg-tiny", _leave_out("spatial")),
    "catseg-neither": Variant("catseg-tiny", _leave_out("spatial", "classes")),
    "catseg-frozen": Variant("catseg-tiny", policy="none"),
    "catseg-full": Variant("catseg-tiny", policy="full"),
    "cascade": Variant("cascade-clip-tiny"),
    "cascade-last": Variant("cascade-clip-tiny", _last_layer),
    "cascade-one-decoder": Variant("cascade-clip-tiny", _summed_layers),
    "cascade-mean": Variant("cascade-clip-tiny", _mean_of_stage),
    "cascade-sum": Variant("cascade-clip-tiny", _sum_of_stage),
}

# Title -> label -> variant; the published model is in several.
COMPARISONS = {
    "CAT-Seg: what is aggregated": {"features": "catseg-features", "costs (published)": "catseg"},
    "CAT-Seg: aggregation": {
        "neither": "catseg-neither",
        "spatial only": "catseg-spatial",
        "class only": "catseg-classes",
        "both (published)": "catseg",
    },
    "CAT-Seg: fine-tuning of CLIP": {
        "none": "catseg-frozen",
        "attention (published)": "catseg",
        "full": "catseg-full",
    },
    "Cascade-CLIP: decoders": {
        "one, last layer only": "cascade-last",
        "one, sum of the layers": "cascade-one-decoder",
        "independent, cascaded (published)": "cascade",
    },
    "Cascade-CLIP: layers of a stage": {
        "mean": "cascade-mean",
        "sum": "cascade-sum",
        "NGA (published)": "cascade",
    },
}
