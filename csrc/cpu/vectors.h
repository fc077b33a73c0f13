// Loads, stores and the functions of numbers that the operators need, a vector at a time.

#pragma once

#include "isa.h"

namespace {

INLINE Floats broadcast(float value) { return value - Floats{}; }
INLINE Floats bits_to_floats(Words bits) { return (Floats)bits; }
INLINE Words floats_to_bits(Floats x) { return (Words)x; }

INLINE Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }
// The larger or smaller ones; of a pair with NaN, the second.
INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select(a > b, a, b);
#endif
}
INLINE Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_min_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return select(a < b, a, b);
#endif
}
// NaN in x stays.
INLINE Floats at_least(Floats x, Floats low) { return larger(low, x); }
INLINE Floats at_most(Floats x, Floats high) { return smaller(high, x); }

INLINE Words widen(Halves halves) { return __builtin_convertvector(halves, Words); }

INLINE Floats load(const float *from) {
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE Floats load(const Bf16 *from) {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return bits_to_floats(widen(halves) << 16);
}

INLINE void store(float *to, Floats x) { memcpy(to, &x, sizeof x); }

// Rounded to the nearest, ties to even; NaN stays NaN.
INLINE Words bf16_bits(Floats x) {
    const Words bits = floats_to_bits(x);
    const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (Words)select(x == x, bits_to_floats(rounded), bits_to_floats((bits >> 16) | 0x40u));
}

INLINE void store(Bf16 *to, Floats x) {
#if OVSEG_BF16_PRODUCTS
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
#else
    const Halves halves = __builtin_convertvector(bf16_bits(x), Halves);
#endif
    memcpy(to, &halves, sizeof halves);
}

// bfloat16 of both, those of `low` in the lower halves of the words.
INLINE Words bf16_pairs(Floats low, Floats high) {
#if OVSEG_BF16_PRODUCTS
    const Halves first = (Halves)_mm512_cvtneps_pbh((__m512)low), second = (Halves)_mm512_cvtneps_pbh((__m512)high);
    return widen(first) | widen(second) << 16;
#else
    return bf16_bits(low) | bf16_bits(high) << 16;
#endif
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(Bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE void from_float(float *to, float x) { *to = x; }
INLINE void from_float(Bf16 *to, float x) {
    const Words bits = bf16_bits(broadcast(x));
    to->bits = (uint16_t)bits[0];
}

// Written out, as GCC makes no constant of a loop over lanes.
#if OVSEG_LANES == 16
constexpr Ints LANE_NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif OVSEG_LANES == 8
constexpr Ints LANE_NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr Ints LANE_NUMBERS = {0, 1, 2, 3};
#endif

// The lanes of x, or of x and y behind it, that `lanes` names.
#if defined(__clang__)  // whose own shuffles take constants only; it makes such of these where it can
INLINE Floats shuffle(Floats x, Ints lanes) {
#if defined(__AVX512F__)
    return (Floats)_mm512_permutexvar_ps((__m512i)lanes, (__m512)x);
#elif defined(__AVX2__)
    return (Floats)_mm256_permutevar8x32_ps((__m256)x, (__m256i)lanes);
#else
    Floats shuffled = x;
#pragma GCC unroll 4
    for (int lane = 0; lane < LANES; ++lane) shuffled[lane] = x[lanes[lane] % LANES];
    return shuffled;
#endif
}
INLINE Floats shuffle(Floats x, Floats y, Ints lanes) {
    return select(lanes >= LANES, shuffle(y, lanes), shuffle(x, lanes));
}
#else
INLINE Floats shuffle(Floats x, Ints lanes) { return __builtin_shuffle(x, lanes); }
INLINE Floats shuffle(Floats x, Floats y, Ints lanes) { return __builtin_shuffle(x, y, lanes); }
#endif

// Lanes from the other half of each group of 2 · `half` lanes.
INLINE Floats swap_halves(Floats x, int half) { return shuffle(x, LANE_NUMBERS ^ half); }

INLINE float sum(Floats x) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2) x += swap_halves(x, half);
    return x[0];
}

// Whether any lane of a comparison holds.
INLINE bool any(Ints mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    typedef int64_t Pairs __attribute__((vector_size(4 * LANES)));
    const Pairs pairs = (Pairs)mask;
    int64_t found = 0;
    for (int pair = 0; pair < LANES / 2; ++pair) found |= pairs[pair];
    return found != 0;
#endif
}

// Of lanes without NaN.
INLINE float largest(Floats x) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2) x = larger(x, swap_halves(x, half));
    return x[0];
}

// p[0] rⁿ⁻¹ + … + p[n − 1].
template <int COUNT> INLINE Floats polynomial(const float (&p)[COUNT], Floats r) {
    Floats q = broadcast(p[0]);
#pragma GCC unroll 16
    for (int i = 1; i < COUNT; ++i) q = q * r + broadcast(p[i]);
    return q;
}

// What follows is as exact as products of operands P deserve: with bfloat16, which rounds by up to 2e-3, fewer terms,
// off by less than 1e-4, will do.

// 1 / x for 1 <= x <= 2¹²⁶, to about 1 in the last place: an estimate, and for float32 one step of Newton's.
template <typename P> INLINE Floats reciprocal(Floats x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const Floats estimate = (Floats)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)x);
#else
    const Floats estimate = (Floats)_mm256_rcp_ps((__m256)x);
#endif
    return sizeof(P) == sizeof(Bf16) ? estimate : estimate + estimate * (broadcast(1.0f) - x * estimate);
#else
    return broadcast(1.0f) / x;
#endif
}

// 2ˣ for |x| <= 126 to 2e-7 (8e-5) of it, with a polynomial of least error on −½..½.
template <typename P> INLINE Floats power_of_two(Floats x) {
    const Floats magic = broadcast(12582912.0f);  // 1.5 · 2²³: the sum ends in the nearest whole number
    const Floats shifted = x + magic, r = x - (shifted - magic);
    constexpr float EXACT[] = {1.326472731e-3f, 9.671512991e-3f, 5.550733581e-2f,
                               2.402224243e-1f, 6.931470037e-1f, 1.0f};
    constexpr float SHORT[] = {5.508868381e-2f, 2.426040515e-1f, 6.932762417e-1f, 9.999289404e-1f};
    const Floats p = sizeof(P) == sizeof(Bf16) ? polynomial(SHORT, r) : polynomial(EXACT, r);
    return p * bits_to_floats((floats_to_bits(shifted) << 23) + 0x3F800000u);
}

// eˣ for x ≤ 0; 0 below −87.3; NaN stays.
template <typename P> INLINE Floats exponential_of_negative(Floats x) {
    const Floats power = at_least(x * broadcast(1.44269504f), broadcast(-126.0f));
    return select(x < broadcast(-87.3f), Floats{}, power_of_two<P>(power));
}

// 1 / (1 + exp(−x)) to 1e-6 (1e-4) of it; 0 below −87.3; NaN stays.
template <typename P> INLINE Floats sigmoid(Floats x) {
    const Floats power = at_most(at_least(x * broadcast(-1.44269504f), broadcast(-126.0f)), broadcast(126.0f));
    const Floats share = reciprocal<P>(broadcast(1.0f) + power_of_two<P>(power));
    return select(x < broadcast(-87.3f), Floats{}, share);
}

// x Φ(x), the exact GELU, with an error of Φ of at most 2e-7 (4e-5). Φ(x) − ½ = x p(x²) on −5..5 (−4..4), p fitted to
// Chebyshev nodes; beyond, Φ is 0 or 1.
template <typename P> INLINE Floats gelu(Floats x) {
    constexpr bool BRIEF = sizeof(P) == sizeof(Bf16);
    constexpr float EXACT[] = {9.60935927e-05f, -0.00029224189f, 0.000393648814f, -0.000724244836f, 0.00185189657f,
                               -0.00372089941f, 0.0064360329f,   -0.0105887103f,  0.0163535348f,    -0.0234232565f,
                               0.0314568892f,   -0.0404249425f,  0.05151919f,     -0.0702968522f,   0.141363805f};
    constexpr float SHORT[] = {-0.00318867783f, 0.00863753632f, -0.0127505613f, 0.0211628890f,
                               -0.0366318487f,  0.0561660305f,  -0.0843514801f, 0.175943896f};
    constexpr float END = BRIEF ? 4.0f : 5.0f;
    const Floats within = at_most(at_least(x, broadcast(-END)), broadcast(END));
    const Floats w = within * within * broadcast(2.0f / (END * END)) - broadcast(1.0f);
    const Floats q = BRIEF ? polynomial(SHORT, w) : polynomial(EXACT, w);
    const Floats phi = select(x < broadcast(-END), Floats{}, within * q + broadcast(0.5f));
    return x * select(x > broadcast(END), broadcast(1.0f), phi);
}

}  // namespace
