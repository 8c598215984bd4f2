/* Matrix products with packed weights: y[row] = x[row] @ weight.T, one weight per group of rows.

   One order of summation for every output: features in ascending order into one float32 accumulator (with bf16 dot
   products: pairs of features in ascending order), whatever the number of rows, the tile, or the thread. */
#pragma once

#include "pool.h"

/* Output columns per panel: two vectors. Features are padded to whole blocks of KB, with zeros. */
#define NR (2 * VL)
#define KB 16

/* Rows [first_row, first_row + num_rows) of the product take this packed weight. */
struct group {
    const void *weight;
    long first_row, num_rows;
};

/* x: row r is x[index[r]], or x[r] without index; out: row r is out[r]. `features` of x, `columns` of out.
   gated: the weight has 2 * columns rows, and out = silu(gate) * up. add: the same shape and dtype as out, or NULL. */
struct product {
    const void *x;
    const int32_t *index;
    const struct group *groups;
    const void *add;
    void *out;
    long num_groups, num_rows, features, columns;
    int x_dtype, weight_dtype, out_dtype, gated;
};

/* 0, or -1 if memory is short. */
int product_run(struct pool *pool, const struct product *product);

/* Bytes of a packed weight of `columns` outputs (gated: of 2 * columns rows). */
long neap_packed_bytes(int dtype, long columns, long features, int gated);
