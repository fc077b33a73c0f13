// What the library says about itself.

#include "ovseg.h"

#ifdef OVSEG_ARCHITECTURES
#include <cuda_runtime_api.h>
#endif

namespace {

#ifdef OVSEG_ARCHITECTURES
const int ARCHITECTURES[] = {OVSEG_ARCHITECTURES, 0};  // 0: the end
#else
const int ARCHITECTURES[] = {0};
#endif

}  // namespace

int ovseg_abi_version(void) { return OVSEG_ABI_VERSION; }

const char *ovseg_error_string(int error) {
    switch (error) {
        case OVSEG_OK: return "no error";
        case OVSEG_BAD_DTYPE: return "the kernels take float32, float16 and bfloat16";
        case OVSEG_UNSUPPORTED_SIZE: return "there is no kernel for these sizes";
        case OVSEG_MISALIGNED: return "a tensor does not begin at a multiple of 16 bytes";
        case OVSEG_TOO_LARGE: return "a launch would need more than 2^31 - 1 blocks";
        case OVSEG_TOO_MUCH_SHARED_MEMORY:
            return "this GPU has too little shared memory for the kernel in float32; float16 and bfloat16 need half";
        default:
#ifdef OVSEG_ARCHITECTURES
            return cudaGetErrorString(static_cast<cudaError_t>(error));
#else
            return "unknown error";
#endif
    }
}

int ovseg_architectures(int *architectures, int size) {
    int count = 0;
    for (; ARCHITECTURES[count]; ++count) {
        if (count < size) architectures[count] = ARCHITECTURES[count];
    }
    return count;
}
