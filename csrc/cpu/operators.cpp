// The table of the operators of one instruction set.

#include "operators.h"

namespace OVSEG_ISA {

const Operators OPERATORS = {
    cost_embedding,          cost_volume,     gaussian_aggregation, layer_gather, spatial_aggregation,
    upsampling_decoder_norm, upsampling_head, upsampling_stage,
};

}  // namespace OVSEG_ISA
