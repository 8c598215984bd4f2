/* Threads spin for about 50 us after a job (the next one of a step follows within 10 us), then sleep in a futex.

   state:  | epoch 31 bits | open | active workers 32 bits |     one 64-bit word
   A worker joins by adding 1 while `open` is set; the caller takes items too, closes the job when none is left, and
   waits for those that joined. A worker that never woke has joined nothing. */
#define _GNU_SOURCE
#include "simd.h"

#include "pool.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define OPEN (1ull << 32)
#define EPOCH (1ull << 33)
#define ACTIVE 0xffffffffull
#define MAX_THREADS 256
#define SPINS 1000
#define HUGE_PAGE (2ul << 20)

struct worker {
    struct pool *pool;
    pthread_t thread;
    int index;
};

struct pool {
    _Alignas(64) _Atomic uint64_t state;
    _Alignas(64) _Atomic uint32_t wake; /* changes with every job; sleepers wait on it */
    _Atomic uint32_t sleepers;
    _Alignas(64) _Atomic long next;
    job_fn *fn;
    const void *job;
    long num_items;
    _Atomic int stop;
    int num_threads;
    struct worker *workers;
    void *scratch[NUM_SLOTS];
    size_t scratch_bytes[NUM_SLOTS];
};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_items(struct pool *pool, int thread) {
    for (;;) {
        long item = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
        if (item >= pool->num_items) return;
        pool->fn(pool->job, item, thread);
    }
}

static int try_join(struct pool *pool, uint64_t *seen) {
    uint64_t state = atomic_load_explicit(&pool->state, memory_order_acquire);
    while ((state & OPEN) && state / EPOCH != *seen) {
        if (atomic_compare_exchange_weak_explicit(&pool->state, &state, state + 1, memory_order_acquire,
                                                  memory_order_acquire)) {
            *seen = state / EPOCH;
            return 1;
        }
    }
    return 0;
}

static void *work(void *argument) {
    struct worker *self = argument;
    struct pool *pool = self->pool;
    uint64_t seen = 0;
    int spins = 0;
    while (!atomic_load_explicit(&pool->stop, memory_order_acquire)) {
        uint32_t wake = atomic_load(&pool->wake);
        if (try_join(pool, &seen)) {
            take_items(pool, self->index);
            atomic_fetch_sub_explicit(&pool->state, 1, memory_order_release);
            spins = 0;
        } else if (spins++ < SPINS) {
            relax();
        } else {
            atomic_fetch_add(&pool->sleepers, 1);
            syscall(SYS_futex, &pool->wake, FUTEX_WAIT_PRIVATE, wake, NULL, NULL, 0);
            atomic_fetch_sub(&pool->sleepers, 1);
            spins = 0;
        }
    }
    return NULL;
}

static void wake_sleepers(struct pool *pool) {
    atomic_fetch_add(&pool->wake, 1);
    if (atomic_load(&pool->sleepers)) syscall(SYS_futex, &pool->wake, FUTEX_WAKE_PRIVATE, MAX_THREADS, NULL, NULL, 0);
}

struct pool *neap_pool_create(int num_threads) {
    struct pool *pool = aligned_alloc(64, round_up(sizeof *pool, 64));
    if (!pool) return NULL;
    memset(pool, 0, sizeof *pool);
    pool->num_threads = 1;
    if (num_threads > MAX_THREADS) num_threads = MAX_THREADS;
    pool->workers = calloc((size_t)num_threads, sizeof *pool->workers);
    if (!pool->workers) {
        free(pool);
        return NULL;
    }
    for (int i = 1; i < num_threads; i++) {
        struct worker *worker = &pool->workers[i];
        *worker = (struct worker){.pool = pool, .index = i};
        if (pthread_create(&worker->thread, NULL, work, worker)) break;
        pool->num_threads = i + 1;
    }
    return pool;
}

void neap_pool_destroy(struct pool *pool) {
    atomic_store(&pool->stop, 1);
    wake_sleepers(pool);
    for (int i = 1; i < pool->num_threads; i++) pthread_join(pool->workers[i].thread, NULL);
    for (int slot = 0; slot < NUM_SLOTS; slot++) free(pool->scratch[slot]);
    free(pool->workers);
    free(pool);
}

int pool_num_threads(const struct pool *pool) { return pool->num_threads; }

void pool_run(struct pool *pool, job_fn *fn, const void *job, long num_items) {
    if (pool->num_threads == 1 || num_items <= 1) {
        for (long item = 0; item < num_items; item++) fn(job, item, 0);
        return;
    }
    pool->fn = fn;
    pool->job = job;
    pool->num_items = num_items;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    atomic_fetch_add_explicit(&pool->state, EPOCH | OPEN, memory_order_release);
    wake_sleepers(pool);
    take_items(pool, 0);
    uint64_t state = atomic_fetch_and_explicit(&pool->state, ~OPEN, memory_order_acq_rel);
    for (int spins = 0; state & ACTIVE; spins++) {
        if (spins < SPINS)
            relax();
        else
            sched_yield(); /* the worker may want this very core */
        state = atomic_load_explicit(&pool->state, memory_order_acquire);
    }
}

void *pool_scratch(struct pool *pool, enum slot slot, size_t bytes) {
    if (bytes > pool->scratch_bytes[slot]) {
        free(pool->scratch[slot]);
        pool->scratch_bytes[slot] = 0;
        size_t page = bytes < HUGE_PAGE ? 4096 : HUGE_PAGE, rounded = (size_t)round_up((long)bytes, (long)page);
        pool->scratch[slot] = aligned_alloc(page, rounded);
        if (!pool->scratch[slot]) return NULL;
        pool->scratch_bytes[slot] = rounded;
        if (page == HUGE_PAGE) madvise(pool->scratch[slot], rounded, MADV_HUGEPAGE);
    }
    return pool->scratch[slot];
}
