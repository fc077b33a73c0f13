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
#include <vector>

#include "ovseg_cpu.h"

namespace {

struct Job {
    ovseg_task task;
    void *context;
    int64_t count;
    int helpers;                   // more threads that may join; guarded by the pool's mutex
    int working = 0;               // threads that joined and have not left; guarded by the pool's mutex
    std::atomic<int64_t> next{0};  // the task that is taken next
    std::atomic<bool> failed{false};

    void work() {
        for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
            if (!task(context, index)) {
                failed = true;
                next = count;
            }
        }
    }
};

struct Pool {
    std::mutex mutex;
    std::condition_variable wake, left;
    std::vector<Job *> jobs;
    int threads = 0;

    void loop() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            auto found = std::find_if(jobs.begin(), jobs.end(), [](const Job *job) { return job->helpers > 0; });
            if (found == jobs.end()) {
                wake.wait(lock);
                continue;
            }
            Job *job = *found;
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
        {
            std::unique_lock<std::mutex> lock(mutex);
            int busy = 0;
            for (const Job *other : jobs) busy += other->helpers + other->working;
            while (threads < busy + job.helpers && threads < 1024) {
                try {
                    std::thread([this] { loop(); }).detach();
                } catch (...) {  // the system has no more threads: those that are there do
                    break;
                }
                ++threads;
            }
            jobs.push_back(&job);
        }
        wake.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex);
        job.helpers = 0;
        left.wait(lock, [&job] { return job.working == 0; });
        jobs.erase(std::find(jobs.begin(), jobs.end(), &job));
    }
};

// Never destroyed, as its threads sleep on it until the process ends. A forked child has none of the threads: it begins
// with a pool of its own.
std::atomic<Pool *> pool{nullptr};

Pool *the_pool() {
    Pool *found = pool;
    if (found) return found;
    static const int once = pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });
    (void)once;
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
