"""The literal form of every operator: the published formula with its repeats, concatenations and padding.

Nothing here is rewritten for speed: guidance is repeated for every class and concatenated, classes are padded to 256,
every token of the text context is encoded, every decoder layer is computed in full. The package's operators are tested
and timed against these functions. They are functional: parameters come in a dict under the names of the published
checkpoints, found below a `prefix` that ends in a dot (or is empty). Class tensors are (B, C, T, H, W).
"""

from .cascade_head import cascade_decoder, cascade_head, cascade_masks, cascade_stages, decoder_layer, stage_scores
from .catseg_head import aggregator_layer, catseg_head, class_scores, select_classes
from .class_aggregation import class_aggregation, linear_attention
from .cost_embedding import cost_embedding
from .cost_volume import cost_volume
from .encoder_block import clip_block, clip_value_block
from .gaussian_aggregation import gaussian_aggregation, gaussian_weights
from .image_encoder import dense_image_encoder, prompted_image_encoder, resize_positions
from .label_map import (
    cascade_corners,
    cascade_label_map,
    cascade_scores,
    cascade_window_average,
    catseg_corners,
    catseg_label_map,
    overlap_average,
)
from .layer_gather import layer_gather
from .mask_attention import mask_attention
from .mask_losses import cascade_losses, catseg_loss, one_hot_targets
from .spatial_aggregation import shift_mask, swin_block, swin_pair, window_attention
from .text_encoder import text_encoder
from .upsampling_decoder import decoder, upsampling_stage

__all__ = [
    "aggregator_layer",
    "cascade_corners",
    "cascade_decoder",
    "cascade_head",
    "cascade_label_map",
    "cascade_losses",
    "cascade_masks",
    "cascade_scores",
    "cascade_stages",
    "cascade_window_average",
    "catseg_corners",
    "catseg_head",
    "catseg_label_map",
    "catseg_loss",
    "class_aggregation",
    "class_scores",
    "clip_block",
    "clip_value_block",
    "cost_embedding",
    "cost_volume",
    "decoder",
    "decoder_layer",
    "dense_image_encoder",
    "gaussian_aggregation",
    "gaussian_weights",
    "layer_gather",
    "linear_attention",
    "mask_attention",
    "one_hot_targets",
    "overlap_average",
    "prompted_image_encoder",
    "resize_positions",
    "select_classes",
    "shift_mask",
    "stage_scores",
    "swin_block",
    "swin_pair",
    "text_encoder",
    "upsampling_stage",
    "window_attention",
]
