/* One vector width per build, and the few operations that the kernels need beyond C's own.

   Contraction is off (-ffp-contract=off): a fused multiply-add happens where fma_v is written and nowhere else, so
   every kernel that adds in the same order gives the same bits. */
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* VL: floats per vector. MAX_ROWS: rows of a register tile of the matrix product, two vectors each.
   UNROLL: keys (or features) of a register tile of attention, up to two vectors each. */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>
#define VL 16
#define MAX_ROWS 12
#define UNROLL 8
#define ISA "avx512"
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define VL 8
#define MAX_ROWS 5
#define UNROLL 4
#define ISA "avx2"
#elif defined(__aarch64__)
#include <arm_neon.h>
#define VL 4
#define MAX_ROWS 10
#define UNROLL 8
#define ISA "neon"
#else
#error "no kernels for this processor"
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

#define INLINE static inline __attribute__((always_inline))

enum dtype { FLOAT32 = 0, BFLOAT16 = 1 };

static inline long item_bytes(int dtype) { return dtype == BFLOAT16 ? 2 : 4; }

static inline long round_up(long value, long multiple) { return (value + multiple - 1) / multiple * multiple; }

INLINE vf splat(float x) {
#if VL == 16
    return (vf)_mm512_set1_ps(x);
#elif VL == 8
    return (vf)_mm256_set1_ps(x);
#else
    return (vf)vdupq_n_f32(x);
#endif
}

/* a * b + c, rounded once. */
INLINE vf fma_v(vf a, vf b, vf c) {
#if VL == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VL == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}

INLINE vf load_f32(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_f32(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf load_bf16(const uint16_t *p) {
    vh v;
    memcpy(&v, p, sizeof v);
    return (vf)(__builtin_convertvector(v, vu) << 16);
}

/* To the nearest bfloat16, ties to even, as torch rounds; NaN stays NaN. */
INLINE vu bf16_bits(vf v) {
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(v != v);
    return (rounded & ~nan) | (0x7fc0 & nan);
}

INLINE void store_bf16(uint16_t *p, vf v) {
    vh half = __builtin_convertvector(bf16_bits(v), vh);
    memcpy(p, &half, sizeof half);
}

static inline float widen(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

static inline uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float read_item(const void *p, long i, int dtype) {
    return dtype == BFLOAT16 ? widen(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

static inline void write_item(void *p, long i, int dtype, float x) {
    if (dtype == BFLOAT16)
        ((uint16_t *)p)[i] = narrow(x);
    else
        ((float *)p)[i] = x;
}

INLINE vf read_vector(const void *p, long i, int dtype) {
    return dtype == BFLOAT16 ? load_bf16((const uint16_t *)p + i) : load_f32((const float *)p + i);
}

INLINE void write_vector(void *p, long i, int dtype, vf v) {
    if (dtype == BFLOAT16)
        store_bf16((uint16_t *)p + i, v);
    else
        store_f32((float *)p + i, v);
}

/* Lane by lane: a > b ? yes : no. */
INLINE vf where_above(vf a, vf b, vf yes, vf no) {
#if VL == 16
    return (vf)_mm512_mask_blend_ps(_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ), (__m512)no, (__m512)yes);
#elif VL == 8
    return (vf)_mm256_blendv_ps((__m256)no, (__m256)yes, _mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ));
#else
    return (vf)vbslq_f32((uint32x4_t)(a > b), (float32x4_t)yes, (float32x4_t)no);
#endif
}

INLINE vf max_v(vf a, vf b) { return where_above(a, b, a, b); }

/* 2 ** x. Relative error below 2e-7 for -126 <= x <= 126; 0 below (so also at -inf); above 126 as at 126; NaN stays.
   x = n + r with |r| <= 1/2: the sum with 1.5 * 2 ** 23 leaves n in the low bits, 2 ** r is its Taylor polynomial. */
INLINE vf exp2_v(vf x) {
    const vf magic = splat(12582912.0f);
    vf bounded = where_above(x, splat(126.0f), splat(126.0f), x);
    vf shifted = bounded + magic;
    vf r = bounded - (shifted - magic);
    vf p = splat(1.5403530e-4f);
    p = fma_v(p, r, splat(1.3333558e-3f));
    p = fma_v(p, r, splat(9.6181291e-3f));
    p = fma_v(p, r, splat(5.5504109e-2f));
    p = fma_v(p, r, splat(2.4022651e-1f));
    p = fma_v(p, r, splat(6.9314718e-1f));
    p = fma_v(p, r, splat(1.0f));
    vf scaled = (vf)((vi)p + ((vi)shifted << 23));
    return where_above(splat(-126.0f), x, splat(0.0f), scaled);
}

#define LOG2_E 1.44269504088896341f

/* x / (1 + exp(-x)). */
INLINE vf silu_v(vf x) { return x / (splat(1.0f) + exp2_v(x * splat(-LOG2_E))); }

/* The sum of a vector's entries, always in the same order. */
static inline float sum_v(vf v) {
    float part[VL];
    store_f32(part, v);
    for (int width = VL / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}
