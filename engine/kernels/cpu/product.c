/* Packed weights:  [panels][features / 2][NR columns][2 features]  bfloat16      [panels][features][NR]  float32

   A gated panel holds VL columns of gate, then the same VL columns of up, so that silu(gate) * up needs one tile only.
   Rows of x are widened into blocks that a tile reads with one pointer: [features / KB][rows][KB].

   The loop:  panels that fit L2 (threads share these out) -> tile of rows -> panel -> features */
#include "simd.h"

#include "product.h"

#include <unistd.h>

/* BF16_DOT: products of bfloat16 pairs by one instruction. EMULATE_BF16_DOT does the same without it (tests). */
#if defined(EMULATE_BF16_DOT)
#define BF16_DOT 1
#elif defined(__AVX512BF16__) && VL == 16
#define BF16_DOT 1
#else
#define BF16_DOT 0
#endif

/* Rows up to this many are widened once for all threads: they stay in every core's L2. */
#define MAX_SHARED_ROWS 36

const char *neap_isa(void) { return BF16_DOT ? ISA "+bf16dot" : ISA; }

static long panel_columns(int gated) { return gated ? VL : NR; }

static long num_panels(long columns, int gated) {
    return (columns + panel_columns(gated) - 1) / panel_columns(gated);
}

static long panel_bytes(int dtype, long features) { return round_up(features, KB) * NR * item_bytes(dtype); }

long neap_packed_bytes(int dtype, long columns, long features, int gated) {
    return num_panels(columns, gated) * panel_bytes(dtype, features);
}

/* -- packing weights ------------------------------------------------------------------------------------------- */

struct packing {
    const char *weight;
    char *packed;
    long columns, features;
    int dtype, gated;
};

/* The weight's row that fills column c of a panel, or -1. */
static long weight_row(const struct packing *p, long panel, long c) {
    long column = panel * panel_columns(p->gated) + (p->gated ? c % VL : c);
    if (column >= p->columns) return -1;
    return p->gated && c >= VL ? p->columns + column : column;
}

static void pack_panel(const void *job, long panel, int thread) {
    (void)thread;
    const struct packing *p = job;
    long padded = round_up(p->features, KB), size = item_bytes(p->dtype);
    char *out = p->packed + panel * panel_bytes(p->dtype, p->features);
    memset(out, 0, (size_t)panel_bytes(p->dtype, p->features));
    for (long first = 0; first < padded; first += KB) {
        long end = first + KB < p->features ? first + KB : p->features;
        for (long c = 0; c < NR; c++) {
            long row = weight_row(p, panel, c);
            if (row < 0) continue;
            const char *in = p->weight + row * p->features * size;
            for (long k = first; k < end; k++) {
                if (p->dtype == BFLOAT16)
                    ((uint16_t *)out)[(k / 2 * NR + c) * 2 + k % 2] = ((const uint16_t *)in)[k];
                else
                    ((float *)out)[k * NR + c] = ((const float *)in)[k];
            }
        }
    }
}

/* weight: [columns, features], or [2 * columns, features] (gate, then up) if gated; packed: neap_packed_bytes. */
void neap_pack(struct pool *pool, const void *weight, int dtype, long columns, long features, int gated, void *packed) {
    struct packing job = {weight, packed, columns, features, dtype, gated};
    pool_run(pool, pack_panel, &job, num_panels(columns, gated));
}

/* Rows of a packed weight as they were: out [count, features]. The embedding and the LM head share one copy so. */
void neap_unpack_rows(const void *packed, int dtype, long features, const int64_t *rows, long count, void *out) {
    for (long i = 0; i < count; i++) {
        const char *panel = (const char *)packed + rows[i] / NR * panel_bytes(dtype, features);
        long c = rows[i] % NR;
        for (long k = 0; k < features; k++) {
            if (dtype == BFLOAT16)
                ((uint16_t *)out)[i * features + k] = ((const uint16_t *)panel)[(k / 2 * NR + c) * 2 + k % 2];
            else
                ((float *)out)[i * features + k] = ((const float *)panel)[k * NR + c];
        }
    }
}

/* -- tiles ----------------------------------------------------------------------------------------------------- */

/* sums [rows][NR] of a tile; x: [blocks][rows][KB] float32. `rows` is a constant wherever this is inlined. */
INLINE void tile_f32(int rows, const float *x, const float *w, long blocks, float *sums) {
    vf left[MAX_ROWS], right[MAX_ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) left[r] = right[r] = splat(0.0f);
    for (long block = 0; block < blocks; block++, x += rows * KB) {
        for (int k = 0; k < KB; k++, w += NR) {
            vf w0 = load_f32(w), w1 = load_f32(w + VL);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                vf value = splat(x[r * KB + k]);
                left[r] = fma_v(value, w0, left[r]);
                right[r] = fma_v(value, w1, right[r]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        store_f32(sums + r * NR, left[r]);
        store_f32(sums + r * NR + VL, right[r]);
    }
}

#if BF16_DOT
/* sums + pair of x . pair of weights, lane by lane; x holds two bfloat16. */
INLINE vf dot_pairs(vf sums, float x, vu weights) {
#if defined(EMULATE_BF16_DOT)
    vu pair = (vu)splat(x);
    sums = fma_v((vf)(pair & 0xffff0000u), (vf)(weights & 0xffff0000u), sums);
    return fma_v((vf)(pair << 16), (vf)(weights << 16), sums);
#else
    return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_ps(x), (__m512bh)weights);
#endif
}
#endif

/* The same with bfloat16 weights: two features per 32-bit lane, widened in registers; or dotted with pairs of x. */
INLINE void tile_bf16(int rows, const float *x, const uint16_t *w, long blocks, float *sums) {
    vf left[MAX_ROWS], right[MAX_ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) left[r] = right[r] = splat(0.0f);
    for (long block = 0; block < blocks; block++, x += BF16_DOT ? rows * KB / 2 : rows * KB) {
        for (int k = 0; k < KB; k += 2, w += 2 * NR) {
            vu pair0, pair1;
            memcpy(&pair0, w, sizeof pair0);
            memcpy(&pair1, w + NR, sizeof pair1);
#if BF16_DOT
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                left[r] = dot_pairs(left[r], x[r * KB / 2 + k / 2], pair0);
                right[r] = dot_pairs(right[r], x[r * KB / 2 + k / 2], pair1);
            }
#else
            vf w0 = (vf)(pair0 << 16), w1 = (vf)(pair1 << 16);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                vf value = splat(x[r * KB + k]);
                left[r] = fma_v(value, w0, left[r]);
                right[r] = fma_v(value, w1, right[r]);
            }
            w0 = (vf)(pair0 & 0xffff0000u), w1 = (vf)(pair1 & 0xffff0000u);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                vf value = splat(x[r * KB + k + 1]);
                left[r] = fma_v(value, w0, left[r]);
                right[r] = fma_v(value, w1, right[r]);
            }
#endif
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        store_f32(sums + r * NR, left[r]);
        store_f32(sums + r * NR + VL, right[r]);
    }
}

static void tile(int rows, int dtype, const float *x, const void *w, long blocks, float *sums) {
#define CASE(n)                                                                \
    case n:                                                                    \
        if (dtype == BFLOAT16)                                                 \
            tile_bf16(n <= MAX_ROWS ? n : 1, x, w, blocks, sums);              \
        else                                                                   \
            tile_f32(n <= MAX_ROWS ? n : 1, x, w, blocks, sums);               \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}

/* -- the product ----------------------------------------------------------------------------------------------- */

struct tile_rows {
    long first_row;
    int num_rows;
};

/* What the threads share. Tiles of group g are [first_tile[g], first_tile[g + 1]). `rows`: few rows are widened once,
   into memory that all threads read; many rows tile by tile, into a thread's own part of it. */
struct plan {
    const struct product *product;
    const struct tile_rows *tiles;
    const long *first_tile;
    float *rows;
    long panels, panels_at_once, groups_of_panels, blocks, row_floats;
    int dot, widen_once;
};

static void widen_row(const struct plan *plan, long row, float *out, long stride) {
    const struct product *p = plan->product;
    const char *x = (const char *)p->x + (p->index ? p->index[row] : row) * p->features * item_bytes(p->x_dtype);
    for (long block = 0; block < plan->blocks; block++, out += stride) {
        long left = p->features - block * KB;
        if (left >= KB && plan->dot) {
            memcpy(out, x + block * KB * 2, KB * 2);
        } else if (left >= KB) {
            for (int k = 0; k < KB; k += VL) store_f32(out + k, read_vector(x, block * KB + k, p->x_dtype));
        } else {
            memset(out, 0, (size_t)KB * (plan->dot ? 2 : 4));
            for (int k = 0; k < left; k++)
                write_item(out, k, plan->dot ? BFLOAT16 : FLOAT32, read_item(x, block * KB + k, p->x_dtype));
        }
    }
}

/* [blocks][rows][KB] float32, or the pairs of bfloat16 as they are for dot products. */
static void widen_tile(const struct plan *plan, struct tile_rows tile, float *out) {
    long block_floats = plan->dot ? KB / 2 : KB;
    for (int r = 0; r < tile.num_rows; r++)
        widen_row(plan, tile.first_row + r, out + r * block_floats, tile.num_rows * block_floats);
}

static void store_tile(const struct product *p, struct tile_rows tile, long panel, const float *sums) {
    long width = panel_columns(p->gated), first = panel * width;
    long count = p->columns - first < width ? p->columns - first : width;
    for (int r = 0; r < tile.num_rows; r++, sums += NR) {
        long at = (tile.first_row + r) * p->columns + first;
        float values[NR];
        if (p->gated)
            store_f32(values, silu_v(load_f32(sums)) * load_f32(sums + VL));
        else
            memcpy(values, sums, sizeof values);
        if (count == width) {
            for (long c = 0; c < width; c += VL) {
                vf value = load_f32(values + c);
                if (p->add) value += read_vector(p->add, at + c, p->out_dtype);
                write_vector(p->out, at + c, p->out_dtype, value);
            }
        } else {
            for (long c = 0; c < count; c++)
                write_item(p->out, at + c, p->out_dtype,
                           p->add ? values[c] + read_item(p->add, at + c, p->out_dtype) : values[c]);
        }
    }
}

static void multiply(const void *job, long item, int thread) {
    const struct plan *plan = job;
    const struct product *p = plan->product;
    long group = item / plan->groups_of_panels;
    long first = item % plan->groups_of_panels * plan->panels_at_once;
    long end = first + plan->panels_at_once < plan->panels ? first + plan->panels_at_once : plan->panels;
    const char *weight = p->groups[group].weight;
    _Alignas(64) float sums[MAX_ROWS * NR];
    for (long t = plan->first_tile[group]; t < plan->first_tile[group + 1]; t++) {
        struct tile_rows rows = plan->tiles[t];
        float *x = plan->rows + (plan->widen_once ? rows.first_row : thread * MAX_ROWS) * plan->row_floats;
        if (!plan->widen_once) widen_tile(plan, rows, x);
        for (long panel = first; panel < end; panel++) {
            const char *w = weight + panel * panel_bytes(p->weight_dtype, p->features);
            tile(rows.num_rows, p->weight_dtype, x, w, plan->blocks, sums);
            store_tile(p, rows, panel, sums);
        }
    }
}

/* Tiles of equal size: 13 rows are 7 + 6, not 12 + 1. */
static long cut_into_tiles(const struct product *p, struct tile_rows *tiles, long *first_tile) {
    long count = 0;
    for (long g = 0; g < p->num_groups; g++) {
        long rows = p->groups[g].num_rows, row = p->groups[g].first_row;
        first_tile[g] = count;
        for (long parts = (rows + MAX_ROWS - 1) / MAX_ROWS; parts; parts--) {
            int size = (int)((rows + parts - 1) / parts);
            tiles[count++] = (struct tile_rows){row, size};
            row += size;
            rows -= size;
        }
    }
    first_tile[p->num_groups] = count;
    return count;
}

/* Bytes of weight that stay in a core's L2 beside a tile of x, while all rows pass by. */
static long cached_bytes(void) {
    long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return (l2 > (256 << 10) ? l2 : 256 << 10) * 5 / 8;
}

int product_run(struct pool *pool, const struct product *p) {
    struct plan plan = {.product = p, .panels = num_panels(p->columns, p->gated)};
    plan.blocks = round_up(p->features, KB) / KB;
    plan.dot = BF16_DOT && p->weight_dtype == BFLOAT16;
    plan.row_floats = plan.blocks * KB / (plan.dot ? 2 : 1);
    plan.widen_once = p->num_rows <= MAX_SHARED_ROWS;
    long most_rows = plan.widen_once ? p->num_rows : (long)pool_num_threads(pool) * MAX_ROWS;
    /* a group of n rows has at most n / MAX_ROWS + 1 tiles */
    size_t most_tiles = (size_t)(p->num_rows / MAX_ROWS + p->num_groups);
    size_t tile_bytes = most_tiles * sizeof(struct tile_rows);
    char *tables = pool_scratch(pool, SLOT_TILES, tile_bytes + (size_t)(p->num_groups + 1) * sizeof(long));
    plan.rows = pool_scratch(pool, SLOT_ROWS, (size_t)(most_rows * plan.row_floats) * 4);
    if (!tables || !plan.rows) return -1;
    plan.tiles = (struct tile_rows *)tables;
    plan.first_tile = (long *)(tables + tile_bytes);
    long num_tiles = cut_into_tiles(p, (struct tile_rows *)tables, (long *)(tables + tile_bytes));
    long at_once = cached_bytes() / panel_bytes(p->weight_dtype, p->features);
    /* few rows: the weight is read once anyway, so hand out single panels */
    plan.panels_at_once = plan.widen_once || at_once < 1 ? 1 : at_once;
    /* as many groups for each thread */
    long num_groups = round_up((plan.panels + plan.panels_at_once - 1) / plan.panels_at_once, pool_num_threads(pool));
    plan.panels_at_once = (plan.panels + num_groups - 1) / num_groups;
    plan.groups_of_panels = (plan.panels + plan.panels_at_once - 1) / plan.panels_at_once;
    if (plan.widen_once)
        for (long t = 0; t < num_tiles; t++)
            widen_tile(&plan, plan.tiles[t], plan.rows + plan.tiles[t].first_row * plan.row_floats);
    pool_run(pool, multiply, &plan, p->num_groups * plan.groups_of_panels);
    return 0;
}

/* out [rows, columns] = x [rows, features] @ weight.T (+ add). 0, or -1 if memory is short. */
int neap_linear(struct pool *pool, const void *x, int x_dtype, long rows, const void *packed, int weight_dtype,
                long columns, long features, int gated, void *out, int out_dtype, const void *add) {
    struct group all = {packed, 0, rows};
    struct product product = {
        .x = x, .groups = &all, .add = add, .out = out, .num_groups = 1, .num_rows = rows, .features = features,
        .columns = columns, .x_dtype = x_dtype, .weight_dtype = weight_dtype, .out_dtype = out_dtype, .gated = gated,
    };
    return product_run(pool, &product);
}
