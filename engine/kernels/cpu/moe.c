/* Mixture of experts in one call: scores, choice, tokens grouped by expert, two grouped products, the weighted sum.

   A weight panel is streamed once per expert and step. A token's bits depend on its own row: the grouped products keep
   the one order of summation, and the results of its experts are added in the order of its slots. */
#include "simd.h"

#include "product.h"

struct moe {
    const void *x, *add;
    void *out;
    const float *correction_bias;
    float *scores, *weights, *expert_out;
    int32_t *ids, *tokens, *rows;
    long num_tokens, hidden;
    int dtype, num_experts, top_k;
    float norm_min;
};

/* -- routing ---------------------------------------------------------------------------------------------------- */

static void softmax(float *x, int count) {
    float top = -INFINITY, total = 0.0f, part[VL];
    for (int i = 0; i < count; i++) top = x[i] > top ? x[i] : top;
    for (int i = 0; i < count; i += VL) {
        int width = count - i < VL ? count - i : VL;
        for (int j = 0; j < VL; j++) part[j] = j < width ? (x[i + j] - top) * LOG2_E : 0.0f;
        store_f32(part, exp2_v(load_f32(part)));
        memcpy(x + i, part, (size_t)width * 4);
    }
    for (int i = 0; i < count; i++) total += x[i];
    for (int i = 0; i < count; i++) x[i] /= total;
}

/* Scores become probabilities; the highest of score + bias are chosen (ties: the lower expert), unbiased ones weigh. */
static void choose(const void *job, long token, int thread) {
    (void)thread;
    const struct moe *m = job;
    float *scores = m->scores + token * m->num_experts, *weights = m->weights + token * m->top_k, total = 0.0f;
    int32_t *ids = m->ids + token * m->top_k;
    float biased[m->num_experts];
    softmax(scores, m->num_experts);
    for (int e = 0; e < m->num_experts; e++) biased[e] = scores[e] + m->correction_bias[e];
    for (int slot = 0; slot < m->top_k; slot++) {
        int best = -1;
        for (int e = 0; e < m->num_experts; e++) {
            int taken = 0;
            for (int s = 0; s < slot; s++) taken |= ids[s] == e;
            if (!taken && (best < 0 || biased[e] > biased[best])) best = e;
        }
        ids[slot] = best;
        weights[slot] = scores[best];
        total += scores[best];
    }
    if (total < m->norm_min) total = m->norm_min;
    for (int slot = 0; slot < m->top_k; slot++) {
        weights[slot] /= total;
        if (m->dtype == BFLOAT16) weights[slot] = widen(narrow(weights[slot]));
    }
}

/* Fills m->ids and m->weights. */
static int route(struct pool *pool, const struct moe *m, const void *gate) {
    struct group all = {gate, 0, m->num_tokens};
    struct product product = {
        .x = m->x, .groups = &all, .out = m->scores, .num_groups = 1, .num_rows = m->num_tokens,
        .features = m->hidden, .columns = m->num_experts, .x_dtype = m->dtype, .weight_dtype = FLOAT32,
        .out_dtype = FLOAT32,
    };
    if (product_run(pool, &product)) return -1;
    pool_run(pool, choose, m, m->num_tokens);
    return 0;
}

/* -- experts ---------------------------------------------------------------------------------------------------- */

/* Counting sort of (token, slot) pairs by expert: m->tokens by grouped row, m->rows by pair. Returns the groups. */
static long group_by_expert(const struct moe *m, const char *weights, long expert_bytes, struct group *groups) {
    long next[m->num_experts], num_pairs = m->num_tokens * m->top_k, row = 0, num_groups = 0;
    memset(next, 0, sizeof next);
    for (long pair = 0; pair < num_pairs; pair++) next[m->ids[pair]]++;
    for (int e = 0; e < m->num_experts; e++) {
        long count = next[e];
        next[e] = row;
        if (count) groups[num_groups++] = (struct group){weights + e * expert_bytes, row, count};
        row += count;
    }
    for (long pair = 0; pair < num_pairs; pair++) {
        long to = next[m->ids[pair]]++;
        m->tokens[to] = (int32_t)(pair / m->top_k);
        m->rows[pair] = (int32_t)to;
    }
    return num_groups;
}

/* out = (add) + weights[0] * y[0] + weights[1] * y[1] ... in float32, rounded once. */
static void combine(const void *job, long token, int thread) {
    (void)thread;
    const struct moe *m = job;
    const int32_t *rows = m->rows + token * m->top_k;
    const float *weights = m->weights + token * m->top_k;
    float total[m->hidden];
    memset(total, 0, sizeof total);
    for (int slot = 0; slot < m->top_k; slot++) {
        const float *y = m->expert_out + (long)rows[slot] * m->hidden;
        for (long d = 0; d < m->hidden; d++) total[d] += weights[slot] * y[d];
    }
    for (long d = 0; d < m->hidden; d++) {
        long at = token * m->hidden + d;
        float add = m->add ? read_item(m->add, at, m->dtype) : 0.0f;
        write_item(m->out, at, m->dtype, m->add ? total[d] + add : total[d]);
    }
}

/* The choice alone: ids int32 and weights float32 [tokens, top_k]. 0, or -1 if memory is short. */
int neap_route(struct pool *pool, const void *x, int dtype, long num_tokens, long hidden, const void *gate,
               const float *correction_bias, int num_experts, int top_k, float norm_min, int32_t *ids, float *weights) {
    float *scores = pool_scratch(pool, SLOT_EXPERTS, (size_t)(num_tokens * num_experts) * 4);
    struct moe m = {
        .x = x, .correction_bias = correction_bias, .scores = scores, .weights = weights, .ids = ids,
        .num_tokens = num_tokens, .hidden = hidden, .dtype = dtype, .num_experts = num_experts, .top_k = top_k,
        .norm_min = norm_min,
    };
    return scores ? route(pool, &m, gate) : -1;
}

/* out = add + sum of weight * down(silu(gate) * up). gate_up and down: packed weights of the experts, one after the
   other. 0, or -1 if memory is short. */
int neap_moe(struct pool *pool, const void *x, int dtype, long num_tokens, long hidden, const void *gate,
             const float *correction_bias, int num_experts, int top_k, float norm_min, const void *gate_up,
             const void *down, long intermediate, void *out, const void *add) {
    long num_pairs = num_tokens * top_k, num_scores = num_tokens * num_experts;
    size_t words = (size_t)(num_scores + 4 * num_pairs);
    size_t bytes = (size_t)round_up((long)words * 4, 64) + (size_t)num_experts * sizeof(struct group);
    char *scratch = pool_scratch(pool, SLOT_EXPERTS, bytes);
    void *hidden_rows = pool_scratch(pool, SLOT_HIDDEN, (size_t)(num_pairs * intermediate * item_bytes(dtype)));
    float *expert_out = pool_scratch(pool, SLOT_OUT, (size_t)(num_pairs * hidden) * 4);
    if (!scratch || !hidden_rows || !expert_out) return -1;
    float *floats = (float *)scratch;
    int32_t *numbers = (int32_t *)(floats + num_scores + num_pairs);
    struct group *groups = (struct group *)(scratch + round_up((long)words * 4, 64));
    struct moe m = {
        .x = x, .add = add, .out = out, .correction_bias = correction_bias, .scores = floats,
        .weights = floats + num_scores, .ids = numbers, .tokens = numbers + num_pairs,
        .rows = numbers + 2 * num_pairs, .expert_out = expert_out, .num_tokens = num_tokens, .hidden = hidden,
        .dtype = dtype, .num_experts = num_experts, .top_k = top_k, .norm_min = norm_min,
    };
    if (route(pool, &m, gate)) return -1;
    long up_bytes = neap_packed_bytes(dtype, intermediate, hidden, 1);
    long down_bytes = neap_packed_bytes(dtype, hidden, intermediate, 0);
    struct product up = {
        .x = x, .index = m.tokens, .groups = groups, .out = hidden_rows, .num_rows = num_pairs,
        .num_groups = group_by_expert(&m, gate_up, up_bytes, groups), .features = hidden, .columns = intermediate,
        .x_dtype = dtype, .weight_dtype = dtype, .out_dtype = dtype, .gated = 1,
    };
    if (product_run(pool, &up)) return -1;
    struct product back = {
        .x = hidden_rows, .groups = groups, .out = expert_out, .num_rows = num_pairs,
        .num_groups = group_by_expert(&m, down, down_bytes, groups), .features = intermediate, .columns = hidden,
        .x_dtype = dtype, .weight_dtype = dtype, .out_dtype = FLOAT32,
    };
    if (product_run(pool, &back)) return -1;
    pool_run(pool, combine, &m, num_tokens);
    return 0;
}
