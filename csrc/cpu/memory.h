// Several arrays in one piece of memory, each aligned to a cache line.

#pragma once

#include <stddef.h>
#include <stdint.h>

namespace {

// Gives out arrays one after the other. Without memory (null) it gives none, and `bytes` tells how much is needed.
struct Arena {
    char *memory;
    size_t bytes = 0;

    explicit Arena(void *memory) : memory(static_cast<char *>(memory)) {}

    template <typename T> T *take(int64_t count) {
        char *found = memory ? memory + bytes : nullptr;
        bytes += (size_t(count) * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T *>(found);
    }
};

}  // namespace
