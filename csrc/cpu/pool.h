// Threads that sleep until a call has work for them, and each thread's scratch memory.

#pragma once

#include <stddef.h>
#include <stdint.h>

// One task of a call; any thread may run it, and none waits for another. False if it lacks memory.
typedef bool (*ovseg_task)(void *context, int64_t index);

// Runs tasks 0..count-1 on up to `threads` threads, the calling one among them; returns OVSEG_OK, or
// OVSEG_OUT_OF_MEMORY if a task lacked memory. Several threads may call it at once, also after a fork.
int ovseg_parallel(int threads, int64_t count, ovseg_task task, void *context);

// At least that many bytes for the calling thread, aligned to 64, until it calls again; null without memory.
void *ovseg_scratch(size_t bytes);

// Tells the system that this memory is about to be filled, once. Fresh memory then comes in large pages where there are
// some: to be given it 4 KB at a time takes several times as long as to write it.
void ovseg_expect_writes(void *memory, size_t bytes);

// Memory for a whole call, aligned alike, or null.
void *ovseg_allocate(size_t bytes);
void ovseg_release(void *memory);

// The shape that the thread's AMX tiles have, 0 for none: see tiles.h. It gives them back after its tasks.
extern thread_local int ovseg_tile_shape;
