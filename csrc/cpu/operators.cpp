// The table of the operators of one instruction set.

#include "operators.h"

namespace OVSEG_ISA {

const Operators OPERATORS = {
    class_aggregation,
    class_aggregation_resize,
    encoder_block,
    spatial_aggregation,
};

}  // namespace OVSEG_ISA
