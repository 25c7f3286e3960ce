/* Causal attention over short sequences with rotary positions, forward and backward. fleetune/models/kernels/__init__.py compiles and
 * calls this; fleetune/models/fused.py says the same in PyTorch and is what this is tested against.
 *
 * One head at a time and LANES of its queries at once, against the keys that the last of them sees. Scores lie as (keys,
 * LANES), a query to a lane, so that sums over keys need no sum across a vector. The backward pass makes the probabilities
 * again from each query's largest score and sum of exponentials (Dao et al. 2022, arXiv 2205.14135).
 *
 * A row is a sequence's key head with the query heads that share it, so that a range of rows [first, last) gives the same
 * bits whoever else works on the others.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "exponential.h"

typedef int64_t i64;

/* Floats of a vector register. Tiles of LANES x LANES sums stay in registers. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));

static inline vec get(const float *at) {
    vec v;
    memcpy(&v, at, sizeof v);
    return v;
}

static inline void put(float *at, vec v) { memcpy(at, &v, sizeof v); }

static inline i64 padded(i64 n) { return (n + LANES - 1) / LANES * LANES; }

/* c[r, :] (+)= sum_k a(r, k) b[k, :], LANES rows and columns; a(r, k) = a[r a_row + k a_k]. */
static inline void tile(i64 depth, const float *restrict a, i64 a_row, i64 a_k, const float *restrict b, i64 b_k,
                        float *restrict c, i64 c_row, int add) {
    vec sums[LANES];
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) sums[r] = add ? get(c + r * c_row) : (vec){0};
    for (i64 k = 0; k < depth; k++) {
        vec row = get(b + k * b_k);
#pragma GCC unroll 16
        for (int r = 0; r < LANES; r++) sums[r] += a[r * a_row + k * a_k] * row;
    }
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) put(c + r * c_row, sums[r]);
}

/* What the heads of one call have in common. */
typedef struct {
    i64 tokens, d, width; /* width: d, padded with zeros */
    const float *cosine, *sine;
} Shape;

/* out (n, width) <- tokens [from, from + n) of a head, turned by their positions or not; 0 from the last token on. */
static inline void fetch(Shape s, const float *x, i64 x_token, i64 from, i64 n, int turned, float *restrict out) {
    i64 half = s.d / 2;
    for (i64 t = from; t < from + n; t++, out += s.width) {
        memset(out, 0, s.width * sizeof *out);
        if (t >= s.tokens) continue;
        const float *a = x + t * x_token, *c = s.cosine + t * s.d, *z = s.sine + t * s.d;
        if (turned) {
#pragma omp simd
            for (i64 i = 0; i < half; i++) {
                out[i] = a[i] * c[i] - a[i + half] * z[i];
                out[i + half] = a[i + half] * c[i + half] + a[i] * z[i + half];
            }
        } else {
            memcpy(out, a, s.d * sizeof *out);
        }
    }
}

/* Gradients (n, width) of tokens [from, from + n), turned back or not, to where they belong. */
static inline void bring(Shape s, const float *restrict g, i64 from, i64 n, int turned, float *restrict out, i64 out_token) {
    i64 half = s.d / 2;
    for (i64 t = from; t < from + n && t < s.tokens; t++, g += s.width) {
        const float *c = s.cosine + t * s.d, *z = s.sine + t * s.d;
        float *b = out + t * out_token;
        if (turned) {
#pragma omp simd
            for (i64 i = 0; i < half; i++) {
                b[i] = g[i] * c[i] + g[i + half] * z[i + half];
                b[i + half] = g[i + half] * c[i + half] - g[i] * z[i];
            }
        } else {
            memcpy(b, g, s.d * sizeof *b);
        }
    }
}

/* (LANES, width) -> (width, LANES). */
static inline void transpose(i64 width, const float *restrict x, float *restrict out) {
    for (i64 i = 0; i < width; i++)
        for (i64 t = 0; t < LANES; t++) out[i * LANES + t] = x[t * width + i];
}

/* (keys, LANES) = x y^T: rows of x (keys, width) by LANES rows of y, given as (width, LANES). */
static inline void by_key(Shape s, i64 keys, const float *x, const float *y, float *restrict out) {
    for (i64 j = 0; j < keys; j += LANES) tile(s.d, x + j * s.width, s.width, 1, y, LANES, out + j * LANES, LANES, 0);
}

/* (LANES, width) = weights^T x: rows of x (keys, width) summed with weights (keys, LANES). */
static inline void by_query(Shape s, i64 keys, const float *weights, const float *x, float *restrict out) {
    for (i64 i = 0; i < s.width; i += LANES) tile(keys, weights, 1, LANES, x + i, s.width, out + i, s.width, 0);
}

/* out (keys, width) += weights y: LANES rows of y (LANES, width) summed with weights (keys, LANES). */
static inline void add_to_keys(Shape s, i64 keys, const float *weights, const float *y, float *restrict out) {
    for (i64 j = 0; j < keys; j += LANES)
        for (i64 i = 0; i < s.width; i += LANES)
            tile(LANES, weights + j * LANES, LANES, 1, y + i, s.width, out + j * s.width + i, s.width, 1);
}

/* x (keys, LANES) <- -infinity, whose exponential is 0, where a key comes after its query: only the last LANES keys can. */
static inline void hide(i64 keys, float *restrict x) {
    for (i64 j = 1; j < LANES; j++)
        for (i64 l = 0; l < j; l++) x[(keys - LANES + j) * LANES + l] = -INFINITY;
}

/* Scratch for n floats. */
static float *scratch(i64 n) { return aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64); }

/* out (sequences, tokens, heads, d), and of every query, by (sequences, heads, tokens), its largest score and 1 / the sum of
 * exponentials. q, k, v[b, t, head] at b * batch + t * token + head * d, strides: (batch, token) of each; cosine and sine at
 * b * c_batch + t * d. */
void attention(i64 first, i64 last, i64 tokens, i64 kv_heads, i64 group, i64 d, float scale, const float *q, const float *k,
               const float *v, const i64 *strides, const float *cosine, const float *sine, i64 c_batch, float *restrict out,
               float *restrict largest, float *restrict inverse) {
    i64 heads = kv_heads * group, rows = padded(tokens), width = padded(d);
    float *keys = scratch((2 * rows + 3 * LANES) * width + rows * LANES), *values = keys + rows * width,
          *queries = values + rows * width, *turned = queries + LANES * width, *mixed = turned + LANES * width,
          *p = mixed + LANES * width;
    for (i64 row = first; row < last; row++) {
        i64 b = row / kv_heads, kv = row % kv_heads;
        Shape s = {tokens, d, width, cosine + b * c_batch, sine + b * c_batch};
        fetch(s, k + b * strides[2] + kv * d, strides[3], 0, rows, 1, keys);
        fetch(s, v + b * strides[4] + kv * d, strides[5], 0, rows, 0, values);
        for (i64 head = kv * group; head < (kv + 1) * group; head++) {
            for (i64 at = 0; at < tokens; at += LANES) {
                i64 seen = at + LANES, real = tokens - at < LANES ? tokens - at : LANES;
                fetch(s, q + b * strides[0] + head * d, strides[1], at, LANES, 1, queries);
                transpose(width, queries, turned);
                by_key(s, seen, keys, turned, p);
                hide(seen, p);
                float most[LANES], sum[LANES];
                for (i64 l = 0; l < LANES; l++) most[l] = p[l], sum[l] = 0.0f;
                for (i64 j = 1; j < seen; j++)
#pragma omp simd
                    for (i64 l = 0; l < LANES; l++) most[l] = p[j * LANES + l] > most[l] ? p[j * LANES + l] : most[l];
                for (i64 l = 0; l < LANES; l++) most[l] *= scale;
                for (i64 j = 0; j < seen; j++)
#pragma omp simd
                    for (i64 l = 0; l < LANES; l++) {
                        float e = exponential(p[j * LANES + l] * scale - most[l]);
                        p[j * LANES + l] = e;
                        sum[l] += e;
                    }
                by_query(s, seen, p, values, mixed);
                i64 place = (b * heads + head) * tokens + at;
                for (i64 r = 0; r < real; r++) {
                    float *y = out + ((b * tokens + at + r) * heads + head) * d, inv = 1.0f / sum[r];
                    largest[place + r] = most[r], inverse[place + r] = inv;
                    for (i64 i = 0; i < d; i++) y[i] = mixed[r * width + i] * inv;
                }
            }
        }
    }
    free(keys);
}

/* dq (sequences, tokens, heads, d), dk and dv (sequences, tokens, kv heads, d) from g, which lies as out did. */
void attention_backward(i64 first, i64 last, i64 tokens, i64 kv_heads, i64 group, i64 d, float scale, const float *q,
                        const float *k, const float *v, const i64 *strides, const float *cosine, const float *sine,
                        i64 c_batch, const float *g, const float *largest, const float *inverse, float *restrict dq,
                        float *restrict dk, float *restrict dv) {
    i64 heads = kv_heads * group, rows = padded(tokens), width = padded(d);
    float *keys = scratch((4 * rows + 5 * LANES) * width + 2 * rows * LANES), *values = keys + rows * width,
          *d_keys = values + rows * width, *d_values = d_keys + rows * width, *queries = d_values + rows * width,
          *grads = queries + LANES * width, *turned = grads + LANES * width, *grads_turned = turned + LANES * width,
          *d_queries = grads_turned + LANES * width, *p = d_queries + LANES * width, *ds = p + rows * LANES;
    for (i64 row = first; row < last; row++) {
        i64 b = row / kv_heads, kv = row % kv_heads;
        Shape s = {tokens, d, width, cosine + b * c_batch, sine + b * c_batch};
        fetch(s, k + b * strides[2] + kv * d, strides[3], 0, rows, 1, keys);
        fetch(s, v + b * strides[4] + kv * d, strides[5], 0, rows, 0, values);
        memset(d_keys, 0, 2 * rows * width * sizeof *d_keys);
        for (i64 head = kv * group; head < (kv + 1) * group; head++) {
            for (i64 at = 0; at < tokens; at += LANES) {
                i64 seen = at + LANES, real = tokens - at < LANES ? tokens - at : LANES;
                i64 place = (b * heads + head) * tokens + at;
                fetch(s, q + b * strides[0] + head * d, strides[1], at, LANES, 1, queries);
                fetch(s, g + (b * tokens * heads + head) * d, heads * d, at, LANES, 0, grads);
                transpose(width, queries, turned);
                transpose(width, grads, grads_turned);
                by_key(s, seen, keys, turned, p);
                by_key(s, seen, values, grads_turned, ds);
                float most[LANES] = {0}, inv[LANES] = {0}, shared[LANES] = {0};
                memcpy(most, largest + place, real * sizeof *most);
                memcpy(inv, inverse + place, real * sizeof *inv);
                hide(seen, p);
                for (i64 j = 0; j < seen; j++)
#pragma omp simd
                    for (i64 l = 0; l < LANES; l++) {
                        float e = exponential(p[j * LANES + l] * scale - most[l]) * inv[l];
                        p[j * LANES + l] = e;
                        shared[l] += e * ds[j * LANES + l];
                    }
                for (i64 j = 0; j < seen; j++)
#pragma omp simd
                    for (i64 l = 0; l < LANES; l++)
                        ds[j * LANES + l] = p[j * LANES + l] * (ds[j * LANES + l] - shared[l]) * scale;
                by_query(s, seen, ds, keys, d_queries);
                bring(s, d_queries, at, LANES, 1, dq + (b * tokens * heads + head) * d, heads * d);
                add_to_keys(s, seen, ds, queries, d_keys);
                add_to_keys(s, seen, p, grads, d_values);
            }
        }
        bring(s, d_keys, 0, rows, 1, dk + (b * tokens * kv_heads + kv) * d, kv_heads * d);
        bring(s, d_values, 0, rows, 0, dv + (b * tokens * kv_heads + kv) * d, kv_heads * d);
    }
    free(keys);
}
