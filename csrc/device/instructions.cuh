// Inline PTX, and launches; emulator/instructions.h has the same functions for CPUs. A word is a register: a float32,
// or two 16-bit numbers, the first in the lower half.

#pragma once

namespace ovseg {

// The block's dynamic shared memory, aligned to 128 bytes.
DEVICE unsigned char *shared_memory() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

// The same number, unknown to the compiler: what a loop computes from it is computed in each iteration, where it would
// otherwise be kept in registers.
DEVICE uint32_t recomputed(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The same for an index. It is not negative: dividing it by a power of two is one instruction, not four.
DEVICE int recomputed(int x) {
    const int same = int(recomputed(uint32_t(x)));
    __builtin_assume(same >= 0);
    return same;
}

DEVICE int recomputed_lane(int lane) {
    lane = recomputed(lane);
    __builtin_assume(lane < 32);
    return lane;
}

// Keeps the two 16-bit numbers of a word in one register, where conditions would part them.
DEVICE void keep_together(Words &words) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm("" : "+r"(words.value[i]));
}

DEVICE void check_aligned(const void *, size_t) {}  // the hardware does

DEVICE Words load_words(const void *address) { return *static_cast<const Words *>(address); }

// 16 bytes to global memory in one store; the compiler would part numbers that come from different places.
DEVICE void store_words(void *address, const Words &words) {
    const uint32_t (&word)[4] = words.value;
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(word[0]),
                 "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
}

// 2ˣ and 1 / x to about 2⁻²²; what is below 2⁻¹²⁶ counts as 0. `exp2f` and `__fdividef` take several instructions more.
DEVICE float fast_exp2(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

DEVICE float fast_reciprocal(float x) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    return inverse;
}

// Two numbers rounded to 16 bits in one conversion. Rounded one by one they may become two slow ones.
template <typename T> DEVICE uint32_t rounded_word(float first, float second) {
    static_assert(sizeof(T) == 2, "16-bit numbers");
    uint32_t word;
    if constexpr (std::is_same_v<T, __half>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    }
    return word;
}

// Copies 16 bytes from global to shared memory in the background; zeros where `present` is false.
DEVICE void copy_async(void *target, const void *source, bool present = true) {
    const uint32_t address = uint32_t(__cvta_generic_to_shared(target));
    const int bytes = present ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
}

// Ends a group of copies; each thread counts its own.
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most GROUPS of this thread's groups are on their way. Other threads' copies need a barrier too.
template <int GROUPS> DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Four 8×8 matrices of 16-bit numbers, one row of one of them at each lane's address.
template <bool TRANSPOSED = false> DEVICE void ldmatrix(uint32_t (&words)[4], const void *address) {
    const uint32_t shared = uint32_t(__cvta_generic_to_shared(address));
#define OVSEG_LDMATRIX(TRANS)                                                                \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" TRANS ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])            \
                 : "r"(shared)                                                               \
                 : "memory")
    if constexpr (TRANSPOSED) {
        OVSEG_LDMATRIX(".trans");
    } else {
        OVSEG_LDMATRIX("");
    }
#undef OVSEG_LDMATRIX
}

// d += a · b: m16n8k16 of 16-bit numbers, m16n8k8 of TF32.
template <typename T> DEVICE void mma_once(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define OVSEG_MMA(SHAPE_AND_FORMATS)                                                                   \
    asm("mma.sync.aligned." SHAPE_AND_FORMATS " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if constexpr (std::is_same_v<T, __half>) {
        OVSEG_MMA("m16n8k16.row.col.f32.f16.f16.f32");
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        OVSEG_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
    } else {
        OVSEG_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
    }
#undef OVSEG_MMA
}

// Queues a kernel on a device's stream without waiting, and leaves the current device as it was.
template <typename Kernel, typename... Arguments>
int queue(Kernel kernel, unsigned blocks, unsigned threads, size_t shared, int device, void *stream,
          Arguments... arguments) {
    int before, most = 0;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
    if (error == cudaSuccess && shared > 48 * 1024) {
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (error == cudaSuccess && shared > size_t(most)) {
            if (before != device) cudaSetDevice(before);
            return OVSEG_TOO_MUCH_SHARED_MEMORY;
        }
    }
    if (error == cudaSuccess && shared > 48 * 1024) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    }
    if (error == cudaSuccess) {
        kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
        error = cudaGetLastError();
        if (before != device) cudaSetDevice(before);
    }
    return int(error);
}

// How many blocks the device runs at once at least: to share out work; results must not depend on it.
inline int multiprocessors(int device) {
    int count = 0;
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 1;
}

}  // namespace ovseg
