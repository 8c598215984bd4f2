/* Rotary positions, the write of K and V, and causal attention that reads K and V where the block tables say.

   Lanes of a vector are query rows (token x head of the group), so sums over features and keys stay inside a lane: what
   a row computes does not depend on the rows beside it. Keys come in tiles of KEYS at absolute positions, in ascending
   order, with a running maximum (online softmax). A key after the row's own position gets weight 0, and a tile of such
   keys leaves maximum, sum and output as they are: a token has the same bits as a decode row and in any prefill chunk.

   One item of work is a KV head and up to ROWS query rows of one request:

       widen the tile's K -> per 2 * VL rows: scores [KEYS, rows], weights
       widen the tile's V into the same memory (it fits L1) -> per 2 * VL rows: output [features, rows]

   Memory:  kv    [blocks, layers, 2, KV heads, block size, features]
            qkv   [tokens, (heads | KV heads | KV heads) * features], q is rotated in place
            segments int32 [n, 4]: row of the block tables, first token, number of tokens, position of the first */
#include "simd.h"

#include "pool.h"

#define KEYS 32
#define LANES (2 * VL)
#define ROWS 128

struct segment {
    int32_t row, first_token, num_tokens, first_position;
};

struct attention {
    void *qkv, *out, *kv;
    const float *cos, *sin; /* [tokens, head_dim / 2] */
    const int32_t *tables;
    const struct segment *segments;
    struct segment *parts; /* segments cut to at most tokens_per_item tokens */
    float *scratch;
    long num_parts, table_stride, block_size, block_items, layer_items;
    long scratch_floats, rows_per_item;
    int num_heads, num_kv_heads, head_dim, padded_dim, dtype;
};

static long key_offset(const struct attention *a, int32_t row, long position, int value, int head) {
    long block = a->tables[row * a->table_stride + position / a->block_size];
    long in_layer = ((long)value * a->num_kv_heads + head) * a->block_size + position % a->block_size;
    return block * a->block_items + a->layer_items + in_layer * a->head_dim;
}

/* -- rotary positions and the write ----------------------------------------------------------------------------- */

INLINE void read_row_of(const void *p, long at, int count, int dtype, float *out) {
    int i = 0;
    for (; i + VL <= count; i += VL) store_f32(out + i, read_vector(p, at + i, dtype));
    for (; i < count; i++) out[i] = read_item(p, at + i, dtype);
}

static void read_row(const void *p, long at, int count, int dtype, float *out) {
    if (dtype == BFLOAT16)
        read_row_of(p, at, count, BFLOAT16, out);
    else
        read_row_of(p, at, count, FLOAT32, out);
}

static void write_row(void *p, long at, int count, int dtype, const float *in) {
    int i = 0;
    for (; i + VL <= count; i += VL) write_vector(p, at + i, dtype, load_f32(in + i));
    for (; i < count; i++) write_item(p, at + i, dtype, in[i]);
}

static void rotate(const struct attention *a, long token, const void *from, long at, void *to, long to_at) {
    float x[a->head_dim], y[a->head_dim];
    const float *cos = a->cos + token * (a->head_dim / 2), *sin = a->sin + token * (a->head_dim / 2);
    read_row(from, at, a->head_dim, a->dtype, x);
    for (int i = 0; i < a->head_dim / 2; i++) {
        y[2 * i] = x[2 * i] * cos[i] - x[2 * i + 1] * sin[i];
        y[2 * i + 1] = x[2 * i + 1] * cos[i] + x[2 * i] * sin[i];
    }
    write_row(to, to_at, a->head_dim, a->dtype, y);
}

static void rotate_and_store(const void *job, long item, int thread) {
    (void)thread;
    const struct attention *a = job;
    struct segment part = a->parts[item];
    long dim = a->head_dim, row_items = (a->num_heads + 2 * a->num_kv_heads) * dim;
    for (long i = 0; i < part.num_tokens; i++) {
        long token = part.first_token + i, position = part.first_position + i;
        for (int head = 0; head < a->num_heads; head++) {
            long at = token * row_items + head * dim;
            rotate(a, token, a->qkv, at, a->qkv, at);
        }
        for (int head = 0; head < a->num_kv_heads; head++) {
            long k = token * row_items + (a->num_heads + head) * dim, v = k + a->num_kv_heads * dim;
            rotate(a, token, a->qkv, k, a->kv, key_offset(a, part.row, position, 0, head));
            memcpy((char *)a->kv + key_offset(a, part.row, position, 1, head) * item_bytes(a->dtype),
                   (const char *)a->qkv + v * item_bytes(a->dtype), (size_t)(dim * item_bytes(a->dtype)));
        }
    }
}

/* -- attention -------------------------------------------------------------------------------------------------- */

/* A thread's memory for one item. tile: [KEYS][padded_dim]; per vector pair of rows: scores [KEYS][LANES],
   q and out [padded_dim][LANES], factor, top, sum, last [LANES]. */
struct work {
    float *tile, *scores, *q, *out, *factor, *top, *sum, *last;
};

static struct work work_of(const struct attention *a, int thread) {
    long rows = a->rows_per_item;
    float *tile = a->scratch + thread * a->scratch_floats, *scores = tile + KEYS * a->padded_dim;
    float *q = scores + KEYS * rows, *out = q + rows * a->padded_dim, *factor = out + rows * a->padded_dim;
    return (struct work){tile, scores, q, out, factor, factor + rows, factor + 2 * rows, factor + 3 * rows};
}

static long scratch_floats(const struct attention *a) {
    return round_up(KEYS * a->padded_dim + (KEYS + 2 * a->padded_dim + 4) * a->rows_per_item, 64);
}

/* Row r of the item is lane r % LANES of vector pair r / LANES. Lanes past the last row attend to everything with q 0. */
static void load_queries(const struct attention *a, struct segment part, int head, struct work w) {
    long dim = a->head_dim, group = a->num_heads / a->num_kv_heads, rows = part.num_tokens * group;
    float scale = LOG2_E / sqrtf((float)dim), x[dim];
    for (long r = 0; r < round_up(rows, VL); r++) {
        float *q = w.q + r / LANES * a->padded_dim * LANES + r % LANES;
        w.top[r] = -INFINITY;
        w.sum[r] = 0.0f;
        w.last[r] = r < rows ? (float)(part.first_position + r / group) : INFINITY;
        if (r < rows) {
            long token = part.first_token + r / group;
            long at = (token * (a->num_heads + 2 * a->num_kv_heads) + head * group + r % group) * dim;
            read_row(a->qkv, at, (int)dim, a->dtype, x);
        } else {
            memset(x, 0, sizeof x);
        }
        for (long d = 0; d < dim; d++) q[d * LANES] = x[d] * scale;
    }
    memset(w.out, 0, (size_t)(round_up(rows, LANES) * a->padded_dim) * 4);
}

/* count rows of K or V, one block after the other; what a register tile reads beyond them is zero. */
static void load_tile(const struct attention *a, int32_t row, int value, int head, long first, long count, float *out) {
    for (long j = 0; j < count;) {
        long left = a->block_size - (first + j) % a->block_size, at = key_offset(a, row, first + j, value, head);
        for (long end = count - j < left ? count : j + left; j < end; j++, at += a->head_dim)
            read_row(a->kv, at, a->head_dim, a->dtype, out + j * a->padded_dim);
    }
    for (long j = 0; a->head_dim < a->padded_dim && j < count; j++)
        for (int d = a->head_dim; d < a->padded_dim; d++) out[j * a->padded_dim + d] = 0.0f;
    for (long j = count; j < round_up(count, UNROLL); j++)
        memset(out + j * a->padded_dim, 0, (size_t)a->padded_dim * 4);
}

/* scores[j] = keys[j] . q, `vectors` (1 or 2, a constant) vectors of rows. */
INLINE void score(int vectors, const struct attention *a, const float *keys, const float *q, long count, float *scores) {
    long stride = a->padded_dim;
    for (long j = 0; j < count; j += UNROLL, keys += UNROLL * stride) {
        vf sums[UNROLL][2];
#pragma GCC unroll 16
        for (int u = 0; u < UNROLL; u++) sums[u][0] = sums[u][1] = splat(0.0f);
        for (long d = 0; d < a->head_dim; d++) {
            vf q0 = load_f32(q + d * LANES), q1 = load_f32(q + d * LANES + VL);
#pragma GCC unroll 16
            for (int u = 0; u < UNROLL; u++) {
                vf key = splat(keys[u * stride + d]);
                sums[u][0] = fma_v(key, q0, sums[u][0]);
                if (vectors == 2) sums[u][1] = fma_v(key, q1, sums[u][1]);
            }
        }
#pragma GCC unroll 16
        for (int u = 0; u < UNROLL; u++) {
            store_f32(scores + (j + u) * LANES, sums[u][0]);
            if (vectors == 2) store_f32(scores + (j + u) * LANES + VL, sums[u][1]);
        }
    }
}

/* Scores become weights, of one vector of rows; `factor`: what sums so far are worth under the new maximum. */
static void weigh(struct work w, long row, long first, long count) {
    float *scores = w.scores + row / LANES * KEYS * LANES + row % LANES, *top = w.top + row, *sum = w.sum + row;
    vf highest = load_f32(top), last = load_f32(w.last + row);
    for (long j = 0; j < count; j++) {
        vf s = where_above(splat((float)(first + j)), last, splat(-INFINITY), load_f32(scores + j * LANES));
        store_f32(scores + j * LANES, s);
        highest = max_v(highest, s);
    }
    vf factor = exp2_v(load_f32(top) - highest), total = splat(0.0f);
    for (long j = 0; j < count; j++) {
        vf p = exp2_v(load_f32(scores + j * LANES) - highest);
        store_f32(scores + j * LANES, p);
        total += p;
    }
    store_f32(top, highest);
    store_f32(sum, load_f32(sum) * factor + total);
    store_f32(w.factor + row, factor);
}

/* out = out * factor + sum of weights[j] * values[j]. */
INLINE void mix(int vectors, const struct attention *a, const float *values, const float *weights, long count,
                const float *factor, float *out) {
    long stride = a->padded_dim;
    vf factor0 = load_f32(factor), factor1 = load_f32(factor + VL);
    for (long d = 0; d < stride; d += UNROLL, out += UNROLL * LANES) {
        vf sums[UNROLL][2];
#pragma GCC unroll 16
        for (int u = 0; u < UNROLL; u++) {
            sums[u][0] = load_f32(out + u * LANES) * factor0;
            if (vectors == 2) sums[u][1] = load_f32(out + u * LANES + VL) * factor1;
        }
        for (long j = 0; j < count; j++) {
            vf w0 = load_f32(weights + j * LANES), w1 = load_f32(weights + j * LANES + VL);
#pragma GCC unroll 16
            for (int u = 0; u < UNROLL; u++) {
                vf value = splat(values[j * stride + d + u]);
                sums[u][0] = fma_v(value, w0, sums[u][0]);
                if (vectors == 2) sums[u][1] = fma_v(value, w1, sums[u][1]);
            }
        }
#pragma GCC unroll 16
        for (int u = 0; u < UNROLL; u++) {
            store_f32(out + u * LANES, sums[u][0]);
            if (vectors == 2) store_f32(out + u * LANES + VL, sums[u][1]);
        }
    }
}

static void store_output(const struct attention *a, struct segment part, int head, struct work w) {
    long dim = a->head_dim, group = a->num_heads / a->num_kv_heads, rows = part.num_tokens * group;
    float y[dim];
    for (long r = 0; r < rows; r++) {
        const float *out = w.out + r / LANES * a->padded_dim * LANES + r % LANES;
        long token = part.first_token + r / group;
        float inverse = 1.0f / w.sum[r];
        for (long d = 0; d < dim; d++) y[d] = out[d * LANES] * inverse;
        write_row(a->out, (token * a->num_heads + head * group + r % group) * dim, (int)dim, a->dtype, y);
    }
}

static void attend(const void *job, long item, int thread) {
    const struct attention *a = job;
    /* the last parts of a chunk see the most keys: they go first, so that threads end together */
    struct segment part = a->parts[a->num_parts - 1 - item / a->num_kv_heads];
    int head = (int)(item % a->num_kv_heads);
    struct work w = work_of(a, thread);
    long rows = (long)part.num_tokens * (a->num_heads / a->num_kv_heads);
    long num_keys = part.first_position + part.num_tokens;
    load_queries(a, part, head, w);
    for (long first = 0; first < num_keys; first += KEYS) {
        long count = num_keys - first < KEYS ? num_keys - first : KEYS;
        load_tile(a, part.row, 0, head, first, count, w.tile);
        for (long row = 0; row < rows; row += LANES) {
            float *q = w.q + row * a->padded_dim, *scores = w.scores + row * KEYS;
            if (rows - row <= VL)
                score(1, a, w.tile, q, count, scores);
            else
                score(2, a, w.tile, q, count, scores);
        }
        for (long row = 0; row < rows; row += VL) weigh(w, row, first, count);
        load_tile(a, part.row, 1, head, first, count, w.tile);
        for (long row = 0; row < rows; row += LANES) {
            float *out = w.out + row * a->padded_dim, *weights = w.scores + row * KEYS;
            if (rows - row <= VL)
                mix(1, a, w.tile, weights, count, w.factor + row, out);
            else
                mix(2, a, w.tile, weights, count, w.factor + row, out);
        }
    }
    store_output(a, part, head, w);
}

static long cut_segments(const struct segment *segments, long num_segments, long at_most, struct segment *parts) {
    long count = 0;
    for (long s = 0; s < num_segments; s++) {
        for (long done = 0; done < segments[s].num_tokens; done += at_most) {
            long left = segments[s].num_tokens - done;
            if (parts)
                parts[count] = (struct segment){
                    .row = segments[s].row,
                    .first_token = (int32_t)(segments[s].first_token + done),
                    .num_tokens = (int32_t)(left < at_most ? left : at_most),
                    .first_position = (int32_t)(segments[s].first_position + done),
                };
            count++;
        }
    }
    return count;
}

/* out [tokens, heads * head_dim]. Everything in `dtype` but cos and sin. 0, or -1 if memory is short. */
int neap_attention(struct pool *pool, void *qkv, const float *cos, const float *sin, int dtype, int num_heads,
                   int num_kv_heads, int head_dim, void *kv, long layer, long num_layers, long block_size,
                   const int32_t *tables, long table_stride, const int32_t *segments, long num_segments, void *out) {
    long group = num_heads / num_kv_heads, tokens_per_item = group < ROWS ? ROWS / group : 1;
    long layer_items = 2L * num_kv_heads * block_size * head_dim;
    struct attention a = {
        .qkv = qkv, .out = out, .kv = kv, .cos = cos, .sin = sin, .tables = tables,
        .segments = (const struct segment *)segments, .table_stride = table_stride, .block_size = block_size,
        .block_items = num_layers * layer_items, .layer_items = layer * layer_items,
        .rows_per_item = round_up(tokens_per_item * group, LANES), .num_heads = num_heads,
        .num_kv_heads = num_kv_heads, .head_dim = head_dim, .padded_dim = (int)round_up(head_dim, UNROLL),
        .dtype = dtype,
    };
    a.num_parts = cut_segments(a.segments, num_segments, tokens_per_item, NULL);
    a.scratch_floats = scratch_floats(&a);
    a.parts = pool_scratch(pool, SLOT_TILES, (size_t)a.num_parts * sizeof *a.parts);
    a.scratch = pool_scratch(pool, SLOT_ATTENTION, (size_t)(a.scratch_floats * pool_num_threads(pool)) * 4);
    if (!a.parts || !a.scratch) return -1;
    cut_segments(a.segments, num_segments, tokens_per_item, a.parts);
    pool_run(pool, rotate_and_store, &a, a.num_parts);
    pool_run(pool, attend, &a, a.num_parts * num_kv_heads);
    return 0;
}
