// Calls a CPU library of another machine for `aarch64.py`: reads calls from the standard input, writes what became of
// their memory to the standard output. All numbers are 64 bits wide.
//
// At first it writes the address of the memory. A call is a function's name, how many arguments it has, how many bytes
// of memory it uses, the arguments and the memory; the answer is the function's result and the memory. Pointers are
// addresses in the memory, floats are given as doubles.

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <type_traits>
#include <utility>

#include "cpu/operators.h"

namespace {

constexpr size_t MOST_BYTES = size_t(1) << 30;

[[noreturn]] void fail(const char *why) {
    fprintf(stderr, "%s\n", why);
    exit(1);
}

void read_all(void *to, size_t bytes) {
    if (fread(to, 1, bytes, stdin) != bytes) fail("the call ends too early");
}

template <typename T> T argument(int64_t word) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(word);
    } else if constexpr (std::is_floating_point_v<T>) {
        double value;
        memcpy(&value, &word, sizeof value);
        return T(value);
    } else {
        return T(word);
    }
}

template <typename... P, size_t... INDEX>
int call(int (*function)(P...), const int64_t *words, int64_t count, std::index_sequence<INDEX...>) {
    if (count != sizeof...(P)) fail("wrong number of arguments");
    return function(argument<P>(words[INDEX])...);
}

template <typename... P> int call(int (*function)(P...), const int64_t *words, int64_t count) {
    return call(function, words, count, std::index_sequence_for<P...>{});
}

int call(void *library, const char *name, const int64_t *words, int64_t count) {
    void *function = dlsym(library, name);
    if (!function) fail(dlerror());
#define IF_IT_IS(operator)                       \
    if (!strcmp(name, "ovseg_" #operator"_fwd")) \
        return call(reinterpret_cast<decltype(ovseg_##operator##_fwd) *>(function), words, count);
    OVSEG_OPERATORS(IF_IT_IS)
    fail("no such function");
}

}  // namespace

int main(int, char **arguments) {
    void *library = dlopen(arguments[1], RTLD_NOW);
    if (!library) fail(dlerror());
    void *memory =
        mmap(nullptr, MOST_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("too little memory");
    const int64_t address = reinterpret_cast<int64_t>(memory);
    fwrite(&address, sizeof address, 1, stdout);
    fflush(stdout);
    char name[64];
    while (fread(name, sizeof name, 1, stdin)) {
        int64_t sizes[2], words[32];
        read_all(sizes, sizeof sizes);
        if (sizes[0] > 32 || size_t(sizes[1]) > MOST_BYTES) fail("the call is too large");
        read_all(words, size_t(sizes[0]) * sizeof *words);
        read_all(memory, size_t(sizes[1]));
        const int64_t result = call(library, name, words, sizes[0]);
        fwrite(&result, sizeof result, 1, stdout);
        fwrite(memory, 1, size_t(sizes[1]), stdout);
        fflush(stdout);
    }
}
