// Threads that sleep until a call has tasks for them, and the memory of calls and threads.

#include "pool.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#include "ovseg_cpu.h"

thread_local int ovseg_tile_shape = 0;

namespace {

constexpr int MOST_THREADS = 1024;

// Tiles in use would slow every switch of threads down, and other libraries expect them as the system made them.
void give_tiles_back() {
#if defined(__x86_64__)
    if (ovseg_tile_shape) __asm__ volatile("tilerelease" : :);
#endif
    ovseg_tile_shape = 0;
}

struct Job {
    ovseg_task task;
    void *context;
    int64_t count;
    int helpers;                   // more threads that may join; guarded by the pool's mutex
    int working = 0;               // threads that joined and have not left; guarded by the pool's mutex
    std::atomic<int64_t> next{0};  // the task that is taken next
    std::atomic<bool> failed{false};
    Job *after = nullptr;  // in the pool's list; guarded by its mutex

    void work() {
        for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
            if (!task(context, index)) {
                failed = true;
                next = count;
            }
        }
        give_tiles_back();
    }
};

struct Pool {
    std::mutex mutex;
    std::condition_variable wake, left;
    Job *jobs = nullptr;  // all that run, the newest first; their memory is their callers'
    int threads = 0;

    Job *wanting() {
        Job *job = jobs;
        while (job && !job->helpers) job = job->after;
        return job;
    }

    void loop() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            Job *job = wanting();
            if (!job) {
                wake.wait(lock);
                continue;
            }
            --job->helpers;
            ++job->working;
            lock.unlock();
            job->work();
            lock.lock();
            job->helpers = 0;  // nothing is left to take
            if (--job->working == 0) left.notify_all();
        }
    }

    void run(Job &job) {
        const int helpers = job.helpers;
        {
            std::unique_lock<std::mutex> lock(mutex);
            int busy = 0;
            for (const Job *other = jobs; other; other = other->after) busy += other->helpers + other->working;
            while (threads < busy + helpers && threads < MOST_THREADS) {
                try {
                    std::thread([this] { loop(); }).detach();
                } catch (...) {  // the system has no more threads: those that are there do
                    break;
                }
                ++threads;
            }
            job.after = jobs;
            jobs = &job;
        }
        for (int i = 0; i < helpers; ++i) wake.notify_one();  // not all: once there may have been many more
        job.work();
        std::unique_lock<std::mutex> lock(mutex);
        job.helpers = 0;
        left.wait(lock, [&job] { return job.working == 0; });
        Job **place = &jobs;
        while (*place != &job) place = &(*place)->after;
        *place = job.after;
    }
};

// Never destroyed, as its threads sleep on it until the process ends. A forked child has none of the threads, and its
// copy of the mutex may be locked for ever: it begins with a pool of its own.
std::atomic<Pool *> pool{nullptr};
[[maybe_unused]] const int forks = pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });

Pool *the_pool() {
    Pool *found = pool;
    if (found) return found;
    Pool *made = new (std::nothrow) Pool;
    if (made && !pool.compare_exchange_strong(found, made)) {
        delete made;
        return found;
    }
    return made;
}

struct Scratch {
    void *memory = nullptr;
    size_t bytes = 0;
    ~Scratch() { free(memory); }
};

thread_local Scratch scratch;

}  // namespace

int ovseg_parallel(int threads, int64_t count, ovseg_task task, void *context) {
    Job job{};
    job.task = task;
    job.context = context;
    job.count = count;
    job.helpers = int(std::max<int64_t>(0, std::min<int64_t>(threads, count) - 1));
    Pool *shared = job.helpers ? the_pool() : nullptr;
    if (shared) {
        shared->run(job);
    } else {
        job.work();
    }
    return job.failed ? int(OVSEG_OUT_OF_MEMORY) : int(OVSEG_OK);
}

void ovseg_expect_writes(void *memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t LARGE_PAGE = 1 << 21;
    const uintptr_t first = (uintptr_t(memory) + LARGE_PAGE - 1) & ~(LARGE_PAGE - 1),
                    end = (uintptr_t(memory) + bytes) & ~(LARGE_PAGE - 1);
    // Only a wish: the system may have none or be told to give none.
    if (first < end) (void)madvise(reinterpret_cast<void *>(first), end - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

void *ovseg_allocate(size_t bytes) {
    bytes = std::max<size_t>(64, (bytes + 63) / 64 * 64);
    void *memory = aligned_alloc(64, bytes);
    if (memory) ovseg_expect_writes(memory, bytes);
    return memory;
}

void ovseg_release(void *memory) { free(memory); }

void *ovseg_scratch(size_t bytes) {
    if (bytes > scratch.bytes) {
        free(scratch.memory);
        scratch.memory = ovseg_allocate(bytes);
        scratch.bytes = scratch.memory ? bytes : 0;
    }
    return scratch.memory;
}
