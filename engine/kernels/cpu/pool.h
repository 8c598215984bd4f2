/* A small thread pool: a job is a function over numbered items, handed out one at a time to whoever is free.

   The results of a job may not depend on who runs an item or when. Threads that sleep are woken but not waited for:
   on a busy machine the caller does the work alone rather than wait for a core. */
#pragma once

struct pool;

/* thread: 0 is the caller, others up to the pool's number of threads - 1. */
typedef void job_fn(const void *job, long item, int thread);

/* num_threads counts the caller. NULL if memory is short; with fewer threads than asked for if the system gives no more. */
struct pool *neap_pool_create(int num_threads);
void neap_pool_destroy(struct pool *pool);

int pool_num_threads(const struct pool *pool);
void pool_run(struct pool *pool, job_fn *fn, const void *job, long num_items);

/* Scratch memory of the pool by slot, kept between calls, grown as needed; 64-byte aligned. NULL if memory is short. */
enum slot { SLOT_ROWS, SLOT_TILES, SLOT_EXPERTS, SLOT_HIDDEN, SLOT_OUT, SLOT_ATTENTION, NUM_SLOTS };
void *pool_scratch(struct pool *pool, enum slot slot, size_t bytes);
