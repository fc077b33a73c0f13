// device/instructions.cuh for the CPU, where its functions are said in full.

#pragma once

#include "emulator.h"

namespace ovseg {

inline unsigned char *shared_memory() { return static_cast<unsigned char *>(emulator::shared_memory()); }

inline uint32_t recomputed(uint32_t x) { return x; }
inline int recomputed(int x) { return x; }
inline int recomputed_lane(int lane) { return lane; }
inline void keep_together(Words &) {}

inline void check_aligned(const void *address, size_t bytes) { emulator::check_aligned(address, bytes); }

inline Words load_words(const void *address) {
    check_aligned(address, 16);
    Words words;
    memcpy(&words, address, 16);
    return words;
}

inline void store_words(void *address, const Words &words) {
    check_aligned(address, 16);
    memcpy(address, &words, 16);
}

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

inline float number(__half x) { return __half2float(x); }
inline float number(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> uint32_t rounded_word(float first, float second) {
    T pair[2];
    if constexpr (std::is_same_v<T, __half>) {
        pair[0] = __float2half_rn(first), pair[1] = __float2half_rn(second);
    } else {
        pair[0] = __float2bfloat16_rn(first), pair[1] = __float2bfloat16_rn(second);
    }
    uint32_t word;
    memcpy(&word, pair, 4);
    return word;
}

inline void copy_async(void *target, const void *source, bool present = true) {
    emulator::async_copy(target, source, 16, present ? 16 : 0);
}
inline void commit_copies() { emulator::async_commit(); }

template <int GROUPS> void wait_for_copies() { emulator::async_wait(GROUPS); }

constexpr int LDMATRIX = 3, PRODUCT = 4;  // kinds of meetings

template <bool TRANSPOSED = false> void ldmatrix(uint32_t (&words)[4], const void *address) {
    check_aligned(address, 16);
    emulator::slot(LDMATRIX).address = address;
    const emulator::Slot *slots = emulator::meet();
    const int g = emulator::lane_index() / 4, t = emulator::lane_index() % 4;
    for (int i = 0; i < 4; ++i) {
        const auto row = [&](int r) { return static_cast<const uint16_t *>(slots[8 * i + r].address); };
        const uint16_t pair[2] = {TRANSPOSED ? row(2 * t)[g] : row(g)[2 * t],
                                  TRANSPOSED ? row(2 * t + 1)[g] : row(g)[2 * t + 1]};
        memcpy(&words[i], pair, 4);
    }
    emulator::slot(LDMATRIX);  // nobody overwrites the rows before all have read them
    emulator::meet();
}

// The product of all lanes' fragments: a in words 0..3 of their slots, b in 4 and 5, d in 6..9, the result in 10..13.
template <typename T> void multiply_fragments(emulator::Slot *slots) {
    constexpr int K = 32 / int(sizeof(T));
    float a[16][K], b[8][K];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int word = 0; word < 6; ++word) {  // the last two are of b
            const int i = word < 4 ? word / 2 : word - 4;
            float *const row = word < 4 ? a[g + word % 2 * 8] : b[g];
            if constexpr (sizeof(T) == 2) {
                T pair[2];
                memcpy(pair, &slots[lane].words[word], 4);
                for (int j = 0; j < 2; ++j) row[2 * t + i * 8 + j] = number(pair[j]);
            } else {
                row[t + i * 4] = __uint_as_float(slots[lane].words[word] & 0xffffe000u);  // TF32 has no lower bits
            }
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            float sum = slots[lane].floats[6 + i];
            for (int j = 0; j < K; ++j) sum += a[lane / 4 + i / 2 * 8][j] * b[lane % 4 * 2 + i % 2][j];
            slots[lane].floats[10 + i] = sum;
        }
    }
}

template <typename T> void mma_once(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::Slot &slot = emulator::slot(PRODUCT + int(sizeof(T)));
    memcpy(slot.words, a, 16);
    memcpy(slot.words + 4, b, 8);
    memcpy(slot.words + 6, d, 16);
    memcpy(d, emulator::meet(multiply_fragments<T>)[emulator::lane_index()].words + 10, 16);
}

template <typename Kernel, typename... Arguments>
int queue(Kernel kernel, unsigned blocks, unsigned threads, size_t shared, int, void *, Arguments... arguments) {
    emulator::run(dim3(blocks), dim3(threads), shared, [=] { kernel(arguments...); });
    return OVSEG_OK;
}

inline int multiprocessors(int) { return 2; }

}  // namespace ovseg
