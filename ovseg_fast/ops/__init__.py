"""The operators: one file each, holding the formula and its PyTorch form.

Every operator is a plain differentiable function of tensors. The PyTorch form runs everywhere, defines the truth, and
already uses the exact rewrites that make it cheap: terms that all classes share are computed once, padding classes
enter as constants, work proceeds through the classes in tiles that stay in the cache. Kernels replace it behind the
same name.

Tensors are channels-last tokens: B images, T classes, P prompts a class, H × W patches, S = H·W, C channels.
"""

from .class_aggregation import ClassAggregationWeights, class_aggregation
from .cost_embedding import cost_embedding, embed_volume
from .cost_volume import cost_volume
from .encoder_block import EncoderBlockWeights, encoder_block
from .gaussian_aggregation import gaussian_aggregation
from .label_map import KeptLogits, Placement, label_map, score_map, top_labels
from .layer_gather import layer_gather
from .mask_attention import mask_attention, mask_scores
from .mask_losses import mask_losses
from .spatial_aggregation import SpatialAggregationWeights, spatial_aggregation
from .upsampling_decoder import guidance_term, upsampling_decoder

__all__ = [
    "ClassAggregationWeights",
    "EncoderBlockWeights",
    "KeptLogits",
    "Placement",
    "SpatialAggregationWeights",
    "class_aggregation",
    "cost_embedding",
    "cost_volume",
    "embed_volume",
    "encoder_block",
    "gaussian_aggregation",
    "guidance_term",
    "label_map",
    "layer_gather",
    "mask_attention",
    "mask_losses",
    "mask_scores",
    "score_map",
    "spatial_aggregation",
    "top_labels",
    "upsampling_decoder",
]
