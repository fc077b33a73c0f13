#include "emulator.h"

#include <ucontext.h>

#include <memory>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

namespace {

constexpr size_t STACK = 128 * 1024;

// The compiler's own: nothing but the registers in use is kept, which makes a change of fibers cheap. The function that
// jumps must not be the one that was left.
using Context = void *[5];

[[noreturn]] __attribute__((noinline)) void jump(Context &context) { __builtin_longjmp(context, 1); }

enum class State { ready, meeting, at_barrier, done };

struct Copy {
    void *target;
    const void *source;
    int bytes, present;
};

struct Warp {
    int first, lanes, arrived;
    unsigned turn;
    Slot slots[2][WARP];
};

}  // namespace

struct Lane {
    Context context;
    ucontext_t start;
    bool started;
    State state;
    dim3 index;
    int number;  // in the block
    Warp *warp;
    std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last one is still open
};

Lane *self;
dim3 block_index, block_size, grid_size;

namespace {

struct Block {
    std::vector<Lane> lanes;
    std::vector<Warp> warps;
    std::vector<char> stacks;
    unsigned char *memory;
    int alive, arrived;
    bool backwards;
    const std::function<void()> *kernel;
    Context main;
};

Block block;

void enter();

__attribute__((noinline)) void switch_to(Lane *next) {
    if (self && self->state != State::done && __builtin_setjmp(self->context)) return;
    self = next;
    if (next->started) jump(next->context);
    next->started = true;
    setcontext(&next->start);
}

// The next lane that can go on: of this warp first, then of the others.
Lane *runnable() {
    const int step = block.backwards ? -1 : 1;
    const Warp &own = *self->warp;
    for (int i = 1; i < own.lanes; ++i) {
        const int lane = (self->number - own.first + step * i + own.lanes) % own.lanes;
        if (block.lanes[own.first + lane].state == State::ready) return &block.lanes[own.first + lane];
    }
    const int warps = int(block.warps.size()), mine = self->number / WARP;
    for (int i = 1; i < warps; ++i) {
        const Warp &warp = block.warps[(mine + step * i + warps) % warps];
        for (int j = 0; j < warp.lanes; ++j) {
            const int lane = block.backwards ? warp.lanes - 1 - j : j;
            if (block.lanes[warp.first + lane].state == State::ready) return &block.lanes[warp.first + lane];
        }
    }
    return nullptr;
}

void release_barrier() {
    block.arrived = 0;
    for (Lane &lane : block.lanes) {
        if (lane.state == State::at_barrier) lane.state = State::ready;
    }
}

void enter() {
    (*block.kernel)();
    for (const auto &group : self->groups) {
        if (!group.empty()) fail("a thread ends before it has waited for its asynchronous copies");
    }
    self->state = State::done;
    --block.alive;
    if (block.alive && block.arrived == block.alive) release_barrier();
    if (!block.alive) jump(block.main);
    Lane *next = runnable();
    if (!next) fail("threads wait for one that has ended");
    switch_to(next);
}

__attribute__((noinline)) void run_block(size_t shared) {
    memset(block.memory, 0xff, shared);  // NaN in every format
    block.alive = int(block.lanes.size());
    block.arrived = 0;
    for (Warp &warp : block.warps) warp.arrived = 0;
    for (Lane &lane : block.lanes) {
        lane.started = false;
        lane.state = State::ready;
        lane.groups.assign(1, {});
#ifdef __SANITIZE_ADDRESS__
        // The frames that a fiber leaves for ever when it ends are none of the next one's.
        __asan_unpoison_memory_region(block.stacks.data() + lane.number * STACK, STACK);
#endif
        getcontext(&lane.start);
        lane.start.uc_stack.ss_sp = block.stacks.data() + lane.number * STACK;
        lane.start.uc_stack.ss_size = STACK;
        lane.start.uc_link = nullptr;
        makecontext(&lane.start, enter, 0);
    }
    if (!__builtin_setjmp(block.main)) {
        self = nullptr;
        switch_to(&block.lanes[block.backwards ? block.lanes.size() - 1 : 0]);
    }
    self = nullptr;
}

}  // namespace

void fail(const char *what) {
    if (self) {
        fprintf(stderr, "emulated CUDA kernel: %s (block %u %u %u, thread %d)\n", what, block_index.x, block_index.y,
                block_index.z, self->number);
    } else {
        fprintf(stderr, "emulated CUDA kernel: %s\n", what);
    }
    abort();
}

const dim3 &thread_index() { return self->index; }
int lane_index() { return self->number % WARP; }
void *shared_memory() { return block.memory; }

void barrier() {
    if (++block.arrived == block.alive) {
        release_barrier();
        return;
    }
    self->state = State::at_barrier;
    Lane *next = runnable();
    if (!next) fail("some threads wait at a barrier and others for their warp");
    switch_to(next);
}

Slot &slot(int kind) {
    Slot &own = self->warp->slots[self->warp->turn & 1][lane_index()];
    own.kind = kind;
    return own;
}

Slot *meet(void (*finish)(Slot *)) {
    Warp &warp = *self->warp;
    // Two sets of slots: one may be filled for the next meeting while slow lanes still read this one's.
    Slot *slots = warp.slots[warp.turn & 1];
    if (++warp.arrived < warp.lanes) {
        self->state = State::meeting;
        Lane *next = runnable();
        if (!next || next->warp != &warp) fail("lanes of a warp go different ways");
        switch_to(next);
        return slots;
    }
    if (warp.lanes != WARP) fail("a warp with fewer than 32 lanes works together");
    for (int i = 0; i < WARP; ++i) {
        if (slots[i].kind != slots[0].kind) fail("lanes of a warp do different things together");
    }
    if (finish) finish(slots);
    warp.arrived = 0;
    ++warp.turn;
    for (int i = 0; i < warp.lanes; ++i) block.lanes[warp.first + i].state = State::ready;
    return slots;
}

void async_copy(void *target, const void *source, int bytes, int present) {
    check_aligned(target, bytes);
    check_aligned(source, bytes);
    self->groups.back().push_back({target, source, bytes, present});
}

void async_commit() { self->groups.emplace_back(); }

void async_wait(int groups) {
    const int finished = int(self->groups.size()) - 1 - groups;  // the open group is not waited for
    for (int i = 0; i < finished; ++i) {
        for (const Copy &copy : self->groups[i]) {
            memcpy(copy.target, copy.source, copy.present);
            memset(static_cast<char *>(copy.target) + copy.present, 0, copy.bytes - copy.present);
        }
    }
    if (finished > 0) self->groups.erase(self->groups.begin(), self->groups.begin() + finished);
}

static size_t most_shared = 0;

void run(dim3 grid, dim3 size, size_t shared, const std::function<void()> &kernel) {
    const int threads = int(size.x * size.y * size.z);
    block_size = size;
    grid_size = grid;
    most_shared = std::max(most_shared, shared);
    block.kernel = &kernel;
    // Of exactly this size, so that the address sanitizer sees what goes past its end.
    void *memory = nullptr;
    free(block.memory);
    if (posix_memalign(&memory, 128, shared)) fail("there is no memory for the block's shared memory");
    block.memory = static_cast<unsigned char *>(memory);
    // New ones rather than longer ones: a sanitizer minds that what old stacks left behind would be copied.
    if (block.stacks.size() < threads * STACK) block.stacks = std::vector<char>(threads * STACK);
    block.lanes = std::vector<Lane>(threads);
    block.warps = std::vector<Warp>((threads + WARP - 1) / WARP);
    for (int i = 0; i < threads; ++i) {
        Lane &lane = block.lanes[i];
        lane.number = i;
        lane.index = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
        lane.warp = &block.warps[i / WARP];
        if (i % WARP == 0) {
            lane.warp->first = i;
            lane.warp->turn = 0;
        }
        lane.warp->lanes = i % WARP + 1;
    }
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                block_index = dim3(x, y, z);
                block.backwards = (x + y + z) % 2;
                run_block(shared);
            }
        }
    }
}

}  // namespace emulator

// For tests: the most shared memory that a launch has asked for since the last call.
extern "C" __attribute__((visibility("default"))) size_t emulated_shared_memory() {
    return std::exchange(emulator::most_shared, 0);
}
