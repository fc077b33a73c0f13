// The instruction set that a source is compiled for. CMake compiles every operator once for each, with OVSEG_ISA, a
// namespace, to tell the copies apart; library.cpp chooses one of them when it is loaded.
//
// What is written here uses the compiler's vector types and no standard templates: the linker would keep one copy of a
// template for all instruction sets, and the one it keeps might be of a set that the machine lacks.

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define OVSEG_LANES 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define OVSEG_LANES 8
#else
#define OVSEG_LANES 4
#endif

// Whether products of bfloat16 pairs are one instruction. Without it, bfloat16 is widened to float32 first.
#if defined(__AVX512BF16__)
#define OVSEG_BF16_PRODUCTS 1
#else
#define OVSEG_BF16_PRODUCTS 0
#endif

// Whether they are made in the tile registers of AMX, 16 × 32 by 32 × 16 numbers an instruction.
#if defined(__AMX_BF16__)
#define OVSEG_TILE_PRODUCTS 1
#else
#define OVSEG_TILE_PRODUCTS 0
#endif

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

namespace {

constexpr int LANES = OVSEG_LANES;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct Bf16 {
    uint16_t bits;
};

// What a packed operand of a product holds for tensors of a type, and how many of its values lie in one lane.
template <typename T> struct Operand {
    typedef float Type;
    static constexpr int PAIR = 1;
};
#if OVSEG_BF16_PRODUCTS
template <> struct Operand<Bf16> {
    typedef Bf16 Type;
    static constexpr int PAIR = 2;
};
#endif

}  // namespace
