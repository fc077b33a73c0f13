// The table of the operators of one instruction set.

#include "operators.h"

namespace OVSEG_ISA {

#define OVSEG_ENTRY(name) name,
const Operators OPERATORS = {OVSEG_OPERATORS(OVSEG_ENTRY)};

}  // namespace OVSEG_ISA
