/* The pieces of a decoder between its matrix products, each in one pass over memory. fleetune/models/kernels/__init__.py compiles
 * and calls this; fleetune/models/fused.py says the same in PyTorch and is what this is tested against.
 *
 * Rows are worked out one by one, each as a whole: a range of rows [first, last) gives the same bits whoever else works on
 * the others.
 */
#include <math.h>
#include <stdint.h>

#include "exponential.h"

typedef int64_t i64;

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* y = w x / rms(x), inverse = 1 / rms(x). x, y: (rows, d); w: (d); inverse: (rows). */
void rms_norm(i64 first, i64 last, i64 d, const float *x, const float *w, float eps, float *restrict y,
              float *restrict inverse) {
    for (i64 row = first; row < last; row++) {
        const float *a = x + row * d;
        float *b = y + row * d, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < d; i++) sum += a[i] * a[i];
        float inv = 1.0f / sqrtf(sum / (float)d + eps);
        inverse[row] = inv;
#pragma omp simd
        for (i64 i = 0; i < d; i++) b[i] = a[i] * inv * w[i];
    }
}

/* dx = through + g w / rms - x <g w, x> / (d rms^3); through may be NULL. */
void rms_norm_backward(i64 first, i64 last, i64 d, const float *g, const float *x, const float *w, const float *inverse,
                       const float *through, float *restrict dx) {
    for (i64 row = first; row < last; row++) {
        const float *a = x + row * d, *c = g + row * d;
        float *out = dx + row * d, inv = inverse[row], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < d; i++) sum += c[i] * w[i] * a[i];
        float shared = sum * inv * inv * inv / (float)d;
        if (through) {
            const float *t = through + row * d;
#pragma omp simd
            for (i64 i = 0; i < d; i++) out[i] = t[i] + (c[i] * w[i] * inv - a[i] * shared);
        } else {
#pragma omp simd
            for (i64 i = 0; i < d; i++) out[i] = c[i] * w[i] * inv - a[i] * shared;
        }
    }
}

/* Rotate the pairs (x_i, x_{i + d/2}) of every head of every token by sign times its position's angle.
 * A row is a token: x[b, s, head] at b * x_batch + s * x_token + head * x_head, y likewise dense as (rows, heads, d);
 * cos and sin at b * c_batch + s * d. */
void rotate(i64 first, i64 last, i64 tokens, i64 heads, i64 d, const float *x, i64 x_batch, i64 x_token, i64 x_head,
            const float *cosine, const float *sine, i64 c_batch, float sign, float *restrict y) {
    i64 half = d / 2;
    for (i64 row = first; row < last; row++) {
        i64 b = row / tokens, s = row % tokens;
        const float *c = cosine + b * c_batch + s * d, *z = sine + b * c_batch + s * d;
        for (i64 head = 0; head < heads; head++) {
            const float *a = x + b * x_batch + s * x_token + head * x_head;
            float *out = y + (row * heads + head) * d;
#pragma omp simd
            for (i64 i = 0; i < half; i++) {
                out[i] = a[i] * c[i] - sign * a[i + half] * z[i];
                out[i + half] = a[i + half] * c[i + half] + sign * a[i] * z[i + half];
            }
        }
    }
}

/* y = silu(gate) up, silu(x) = x sigmoid(x); all (rows, d). */
void swiglu(i64 first, i64 last, i64 d, const float *gate, const float *up, float *restrict y) {
    for (i64 row = first; row < last; row++)
#pragma omp simd
        for (i64 i = row * d; i < (row + 1) * d; i++) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

/* d_up = g silu(gate), d_gate = g up silu'(gate), silu'(x) = s + x s (1 - s) with s = sigmoid(x). */
void swiglu_backward(i64 first, i64 last, i64 d, const float *g, const float *gate, const float *up,
                     float *restrict d_gate, float *restrict d_up) {
    for (i64 row = first; row < last; row++)
#pragma omp simd
        for (i64 i = row * d; i < (row + 1) * d; i++) {
            float s = sigmoid(gate[i]), silu = gate[i] * s;
            d_up[i] = g[i] * silu;
            d_gate[i] = g[i] * up[i] * (s + silu * (1.0f - s));
        }
}

/* loss = log sum_v e^{x_v} - x_target, and that log for the gradient. x: (rows, d) over the vocabulary. */
void cross_entropy(i64 first, i64 last, i64 d, const float *x, const i64 *target, float *restrict loss,
                   float *restrict log_sum) {
    for (i64 row = first; row < last; row++) {
        const float *a = x + row * d;
        float most = a[0], sum = 0.0f;
#pragma omp simd reduction(max : most)
        for (i64 i = 0; i < d; i++) most = a[i] > most ? a[i] : most;
#pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < d; i++) sum += exponential(a[i] - most);
        log_sum[row] = most + logf(sum);
        loss[row] = log_sum[row] - a[target[row]];
    }
}

/* dx = g (softmax(x) - [v = target]), g: (rows). */
void cross_entropy_backward(i64 first, i64 last, i64 d, const float *g, const float *x, const i64 *target,
                            const float *log_sum, float *restrict dx) {
    for (i64 row = first; row < last; row++) {
        const float *a = x + row * d;
        float *out = dx + row * d, weight = g[row], log_of = log_sum[row];
#pragma omp simd
        for (i64 i = 0; i < d; i++) out[i] = weight * exponential(a[i] - log_of);
        out[target[row]] -= weight;
    }
}
