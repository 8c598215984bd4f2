/* Root-mean-square norm. */
#include "simd.h"

#include "pool.h"

#define ROWS_AT_ONCE 16

struct norm {
    const void *x, *weight;
    void *out;
    long rows, features;
    float eps;
    int dtype;
};

static void norm_row(const struct norm *n, long row) {
    long at = row * n->features, d = 0;
    vf squares = splat(0.0f);
    for (; d + VL <= n->features; d += VL) {
        vf x = read_vector(n->x, at + d, n->dtype);
        squares = fma_v(x, x, squares);
    }
    float total = sum_v(squares);
    for (; d < n->features; d++) {
        float x = read_item(n->x, at + d, n->dtype);
        total += x * x;
    }
    float scale = 1.0f / sqrtf(total / (float)n->features + n->eps);
    for (d = 0; d + VL <= n->features; d += VL) {
        vf x = read_vector(n->x, at + d, n->dtype) * splat(scale);
        if (n->dtype == BFLOAT16) x = (vf)(bf16_bits(x) << 16); /* the model rounds here, before the weight */
        write_vector(n->out, at + d, n->dtype, x * read_vector(n->weight, d, n->dtype));
    }
    for (; d < n->features; d++) {
        float x = read_item(n->x, at + d, n->dtype) * scale;
        if (n->dtype == BFLOAT16) x = widen(narrow(x));
        write_item(n->out, at + d, n->dtype, x * read_item(n->weight, d, n->dtype));
    }
}

static void norm_rows(const void *job, long item, int thread) {
    (void)thread;
    const struct norm *n = job;
    long end = (item + 1) * ROWS_AT_ONCE < n->rows ? (item + 1) * ROWS_AT_ONCE : n->rows;
    for (long row = item * ROWS_AT_ONCE; row < end; row++) norm_row(n, row);
}

/* out = x / rms(x) * weight, [rows, features] and [features], all of one dtype. */
void neap_rms_norm(struct pool *pool, const void *x, const void *weight, int dtype, long rows, long features, float eps,
                   void *out) {
    struct norm job = {x, weight, out, rows, features, eps, dtype};
    pool_run(pool, norm_rows, &job, (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE);
}
