// One step of a language model on a CPU: n tokens in, n rows of logits out, as a list of a few simple operations.
//
// Decoding reads every weight once for each token, so its floor is the memory's speed. What keeps a framework
// from that floor is what happens between the reads: some hundred small tensor operations a token, each with
// its dispatch, its allocation and its threads to wake. Here one call does all of them, on threads that stay
// together from the first operation to the last.
//
// This file knows no model. `native.py` writes the list from a model's own modules, and holds the slow twin.
//
// Letters: n tokens of this call, K inputs and N outputs of a product, H heads of queries, G heads of keys and
// values, D channels of a head.

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define FAST 1
#else
#define FAST 0
#endif

enum { EMBED, PRODUCT, ATTENTION };          // kinds of operations
enum { F32, F16, I8 };                       // what weights are stored in
enum { NO_NORM, LAYER_NORM, RMS_NORM };      // before a product
enum { NO_ACT, GELU_TANH, GELU_EXACT, SWIGLU };  // after it
enum { GROUP = 64 };                         // neighbours of an input that share a scale when it becomes int8
enum { STRIP = 64, BLOCK = 64 };             // rows of weights, and inputs, whose products are taken in one go

typedef struct {
    int32_t kind, dtype, norm, act;
    int32_t add, wait, wanted;               // out += instead of =; the next one needs it; only wanted tokens
    int32_t n_out, n_in, stride;             // N, K; from one token's out to the next one's
    int32_t heads, kv_heads, head_dim;       // H, G, D
    float eps;
    const void *weight;                      // (N, K); of EMBED: the table of tokens
    const float *scale;                      // (N,), of I8: one for each row of weights
    const void *values;                      // SWIGLU: `weight` holds the gates, this what passes them, (N, K)
    const float *value_scale;
    const float *bias;                       // (N,) or null
    const float *norm_weight, *norm_bias;    // (K,); bias null for RMS_NORM
    const float *in;                         // (n, width of in)
    float *out;                              // (n, width of out)
    const float *positions;                  // EMBED: table of positions or null. ATTENTION: cos and sin or null
    const float *q_norm, *k_norm;            // (D,) or null: queries and keys are RMS-normed first
    float *cached_keys, *cached_values;      // this layer's cache, (slots, G, columns, D)
} Operation;

typedef struct {                             // one token of the call
    int64_t id;
    int32_t position;                        // its place in its text
    int32_t slot, column, first;             // its row of the cache, its place there, the first place it sees
    int32_t wanted;                          // are its logits asked for?
} Token;

// exp, to 2 units in the last place, in a form that compilers turn into vector instructions: 2^whole times a
// polynomial for what is left, |rest| <= ln(2) / 2. Above 88 and below -87 it stays at that end's value; NaN
// stays NaN.
static inline float exponential(float x) {
    float clipped = x > 88.0f ? 88.0f : x;
    clipped = clipped < -87.0f ? -87.0f : clipped;
    float whole = floorf(clipped * 1.44269504f + 0.5f);
    float rest = clipped - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two parts, exact and small
    float y = 1.0f / 5040;
    y = y * rest + 1.0f / 720;
    y = y * rest + 1.0f / 120;
    y = y * rest + 1.0f / 24;
    y = y * rest + 1.0f / 6;
    y = y * rest + 0.5f;
    y = y * rest + 1.0f;
    y = y * rest + 1.0f;
    union { int32_t bits; float power; } two = {((int32_t)whole + 127) << 23};
    return y * two.power;
}

// ---- dot products ------------------------------------------------------------------------------------------

#if FAST
static inline float total(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
#endif

// R rows of weights with one vector: out[r] = w[r] . x. A row after the other, as they lie in memory: its
// prefetchers follow one long stream further than several short ones, and AHEAD, in bytes, helps them over the
// ends of pages. Four sums hide the latency of an addition.
enum { AHEAD = 2048 };

#if FAST
#define FLOATS(p) _mm256_loadu_ps(p)
#define HALVES(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
// The sum over the first multiple of 8 values, and k there.
#define ROW_OF(LOAD)                                                               \
    __m256 a0 = _mm256_setzero_ps(), a1 = a0, a2 = a0, a3 = a0;                    \
    for (; k + 32 <= K; k += 32) {                                                 \
        for (size_t line = 0; line < 32 * sizeof *w; line += 64)                   \
            _mm_prefetch((const char *)(w + k) + AHEAD + line, _MM_HINT_T0);       \
        a0 = _mm256_fmadd_ps(LOAD(w + k), _mm256_loadu_ps(x + k), a0);             \
        a1 = _mm256_fmadd_ps(LOAD(w + k + 8), _mm256_loadu_ps(x + k + 8), a1);     \
        a2 = _mm256_fmadd_ps(LOAD(w + k + 16), _mm256_loadu_ps(x + k + 16), a2);   \
        a3 = _mm256_fmadd_ps(LOAD(w + k + 24), _mm256_loadu_ps(x + k + 24), a3);   \
    }                                                                              \
    for (; k + 8 <= K; k += 8) a0 = _mm256_fmadd_ps(LOAD(w + k), _mm256_loadu_ps(x + k), a0); \
    s = total(_mm256_add_ps(_mm256_add_ps(a0, a1), _mm256_add_ps(a2, a3)));
#else
#define ROW_OF(LOAD)
#endif

static void dots_f32(const float *w, int64_t K, const float *x, float *out, int64_t rows) {
    for (int64_t r = 0; r < rows; r++, w += K) {
        float s = 0;
        int64_t k = 0;
        ROW_OF(FLOATS)
#pragma omp simd reduction(+ : s)
        for (int64_t j = k; j < K; j++) s += w[j] * x[j];
        out[r] = s;
    }
}

static float half_to_float(uint16_t h) {     // only where there is no instruction for it, and at a row's end
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, bits;
    if (rest >= 0x7c00) bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    else if (rest >= 0x400) bits = sign | ((rest << 13) + ((127 - 15) << 23));
    else {
        float tiny = (float)rest * 0x1p-24f;
        memcpy(&bits, &tiny, 4);
        bits |= sign;
    }
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static void dots_f16(const uint16_t *w, int64_t K, const float *x, float *out, int64_t rows) {
    for (int64_t r = 0; r < rows; r++, w += K) {
        float s = 0;
        int64_t k = 0;
        ROW_OF(HALVES)
        for (; k < K; k++) s += half_to_float(w[k]) * x[k];
        out[r] = s;
    }
}

// Both sides are int8: weights with a scale for each row, the input with one for each GROUP.
static void dots_i8(const int8_t *w, const float *row_scales, int64_t K, const int8_t *x, const float *scales,
                    float *out, int64_t rows) {
    int64_t groups = (K + GROUP - 1) / GROUP, whole = K / GROUP;
    for (int64_t r = 0; r < rows; r++, w += K) {
        float s = 0;
        int64_t g = 0;
#if FAST
        const __m256i ones = _mm256_set1_epi16(1);
        __m256 acc = _mm256_setzero_ps();
        for (; g < whole; g++) {
            __m256i sum = _mm256_setzero_si256();
            for (int j = 0; j < GROUP; j += 32) {
                __m256i a = _mm256_loadu_si256((const __m256i *)(w + g * GROUP + j));
                __m256i b = _mm256_loadu_si256((const __m256i *)(x + g * GROUP + j));
                // |a| times b with a's sign: no value is -128, so two products fit into 16 bits
                __m256i pairs = _mm256_maddubs_epi16(_mm256_sign_epi8(a, a), _mm256_sign_epi8(b, a));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
            }
            acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scales[g]), acc);
        }
        s = total(acc);
#endif
        for (; g < groups; g++) {
            int32_t sum = 0;
            int64_t end = (g + 1) * GROUP < K ? (g + 1) * GROUP : K;
            for (int64_t k = g * GROUP; k < end; k++) sum += (int32_t)w[k] * x[k];
            s += (float)sum * scales[g];
        }
        out[r] = s * row_scales[r];
    }
}

// Two rows of weights with four inputs at once, each sum in the order of dots_i8 and so with its bits. Loading
// and preparing a vector then pays for eight products, which is what makes a prompt of many tokens fast.
enum { TILE = 4 };

#if FAST
// total() of eight vectors, with the same additions in the same order, but side by side.
static inline __m256 totals(const __m256 *v) {
    __m256 half[4], quarter[2];
    for (int i = 0; i < 4; i++)              // of v[i] and v[i + 4]
        half[i] = _mm256_add_ps(_mm256_permute2f128_ps(v[i], v[i + 4], 0x20),
                                _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
    for (int i = 0; i < 2; i++) {
        __m256d a = _mm256_castps_pd(half[2 * i]), b = _mm256_castps_pd(half[2 * i + 1]);
        quarter[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                                   _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    }
    return _mm256_add_ps(_mm256_shuffle_ps(quarter[0], quarter[1], 0x88),
                         _mm256_shuffle_ps(quarter[0], quarter[1], 0xdd));
}
#endif

static void tile_i8(const int8_t *w, const float *row_scales, int64_t K, const int8_t *x, const float *scales,
                    float *out, int64_t stride) {
    int64_t groups = (K + GROUP - 1) / GROUP, whole = K / GROUP;
    float s[2 * TILE] = {0};                 // row 0 with each input, then row 1
    int64_t g = 0;
#if FAST
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 acc[2 * TILE];
    for (int i = 0; i < 2 * TILE; i++) acc[i] = _mm256_setzero_ps();
    for (; g < whole; g++) {
        const __m256i *at = (const __m256i *)(w + g * GROUP), *below = (const __m256i *)(w + K + g * GROUP);
        __m256i w0 = _mm256_loadu_si256(at), w1 = _mm256_loadu_si256(at + 1);
        __m256i u0 = _mm256_loadu_si256(below), u1 = _mm256_loadu_si256(below + 1);
        for (int t = 0; t < TILE; t++) {
            const __m256i *input = (const __m256i *)(x + t * K + g * GROUP);
            __m256i b0 = _mm256_loadu_si256(input), b1 = _mm256_loadu_si256(input + 1);
#define PRODUCTS(w, b) _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(b, w)), ones)
            __m256i sum0 = _mm256_add_epi32(PRODUCTS(w0, b0), PRODUCTS(w1, b1));
            __m256i sum1 = _mm256_add_epi32(PRODUCTS(u0, b0), PRODUCTS(u1, b1));
            __m256 scale = _mm256_set1_ps(scales[t * groups + g]);
            acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum0), scale, acc[t]);
            acc[TILE + t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum1), scale, acc[TILE + t]);
        }
    }
    _mm256_storeu_ps(s, totals(acc));
#endif
    for (; g < groups; g++) {
        int64_t end = (g + 1) * GROUP < K ? (g + 1) * GROUP : K;
        for (int i = 0; i < 2 * TILE; i++) {
            int32_t sum = 0, t = i % TILE, r = i / TILE;
            for (int64_t k = g * GROUP; k < end; k++) sum += (int32_t)w[r * K + k] * x[t * K + k];
            s[i] += (float)sum * scales[t * groups + g];
        }
    }
    for (int i = 0; i < 2 * TILE; i++) out[i % TILE * stride + i / TILE] = s[i] * row_scales[i / TILE];
}

// ---- what stands around a product --------------------------------------------------------------------------

static void normed(const Operation *op, const float *x, float *out) {
    int64_t K = op->n_in;
    if (op->norm == NO_NORM) {
        memcpy(out, x, K * sizeof(float));
        return;
    }
    float mean = 0, squares = 0;
    if (op->norm == LAYER_NORM) {
#pragma omp simd reduction(+ : mean)
        for (int64_t k = 0; k < K; k++) mean += x[k];
        mean /= (float)K;
    }
#pragma omp simd reduction(+ : squares)
    for (int64_t k = 0; k < K; k++) squares += (x[k] - mean) * (x[k] - mean);
    float factor = 1.0f / sqrtf(squares / (float)K + op->eps);
    if (op->norm_bias)
        for (int64_t k = 0; k < K; k++) out[k] = (x[k] - mean) * factor * op->norm_weight[k] + op->norm_bias[k];
    else
        for (int64_t k = 0; k < K; k++) out[k] = (x[k] - mean) * factor * op->norm_weight[k];
}

// Rounds to the nearest of -127 ... 127 steps; a group's largest value decides its step.
static void to_int8(const float *x, int64_t K, int8_t *q, float *scales) {
    for (int64_t g = 0; g * GROUP < K; g++) {
        int64_t start = g * GROUP, end = start + GROUP < K ? start + GROUP : K;
        float largest = 0, damage = 0;       // x - x: 0, but NaN for what is not finite, which a maximum passes over
#pragma omp simd reduction(max : largest) reduction(+ : damage)
        for (int64_t k = start; k < end; k++) {
            largest = fmaxf(largest, fabsf(x[k]));
            damage += x[k] - x[k];
        }
        scales[g] = largest / 127.0f + damage;
        float factor = largest > 0 ? 127.0f / largest : 0;
        for (int64_t k = start; k < end; k++) q[k] = (int8_t)rintf(x[k] * factor);
    }
}

// What follows a product, for a row of sums: out = or += activation(sums + bias).
static void finish(const Operation *op, int64_t begin, int count, const float *sums, const float *values,
                   float *out) {
    float y[STRIP];
    for (int r = 0; r < count; r++) y[r] = sums[r] + (op->bias ? op->bias[begin + r] : 0);
    switch (op->act) {
    case GELU_TANH:                          // tanh by way of exp: 0.5 (1 + tanh u) = 1 / (1 + exp(-2u))
        for (int r = 0; r < count; r++)
            y[r] /= 1.0f + exponential(-2.0f * 0.7978845608028654f * (y[r] + 0.044715f * y[r] * y[r] * y[r]));
        break;
    case GELU_EXACT:
        for (int r = 0; r < count; r++) y[r] = 0.5f * y[r] * (1.0f + erff(y[r] * 0.70710678118654752f));
        break;
    case SWIGLU:
        for (int r = 0; r < count; r++) y[r] = y[r] / (1.0f + exponential(-y[r])) * values[r];
    }
    if (op->add)
        for (int r = 0; r < count; r++) out[r] += y[r];
    else memcpy(out, y, count * sizeof(float));
}

// ---- sharing the work --------------------------------------------------------------------------------------

// Threads take pieces of a phase until none is left, and wait for the pieces that others are at, not for the
// others themselves: one that the system has put to sleep holds nobody up, unless in the middle of a piece.
typedef struct {
    atomic_int taken, done;
} Phase;

enum { AT_ONCE = 4 };                        // phases that may run without waiting for each other

typedef struct {
    Phase *phases;                           // all of the call; every thread goes through them in order
    int at, waited, threads;                 // the phase this thread is in; those before `waited` are done
    int pieces[AT_ONCE];                     // of the phases since then
} Worker;

// Starts a phase over 0 ... count: a few pieces for each thread, but none smaller than `least`.
static void begin_phase(Worker *me, int64_t count, int64_t least) {
    int64_t pieces = count / least, most = 4 * (int64_t)me->threads;
    if (pieces > most) pieces = most;
    me->pieces[me->at - me->waited] = me->threads == 1 || pieces < 1 ? 1 : (int)pieces;
}

// The next piece that nobody has, cut at multiples of `unit`; returns 0 if all are taken.
static int take(Worker *me, int64_t count, int64_t unit, int64_t *begin, int64_t *end) {
    int64_t pieces = me->pieces[me->at - me->waited], units = (count + unit - 1) / unit;
    int64_t piece = atomic_fetch_add_explicit(&me->phases[me->at].taken, 1, memory_order_relaxed);
    if (piece >= pieces) return 0;
    *begin = units * piece / pieces * unit;
    *end = units * (piece + 1) / pieces * unit;
    if (*end > count) *end = count;
    return 1;
}

static void finished(Worker *me) {
    atomic_fetch_add_explicit(&me->phases[me->at].done, 1, memory_order_release);
}

static void end_phase(Worker *me, int wait) {
    me->at++;
    if (!wait && me->at - me->waited < AT_ONCE) return;
    for (int i = 0; me->waited < me->at; me->waited++, i++)
        for (int spins = 0;
             atomic_load_explicit(&me->phases[me->waited].done, memory_order_acquire) < me->pieces[i]; spins++)
            if (spins > 2000) sched_yield();
}

// Few tokens: every thread prepares the input for itself, which costs less than to wait for one that does it
// for all. Many: they share that, too.
enum { FEW = 4 };

static void prepare_input(const Operation *op, const Token *tokens, int64_t begin, int64_t end, float *x,
                          int8_t *q, float *scales) {
    int64_t K = op->n_in, groups = (K + GROUP - 1) / GROUP;
    int place = 0;                           // in the last product: not every token's logits are asked for
    for (int64_t t = 0; t < end; t++) {
        int64_t to = op->wanted ? place : t;
        if (op->wanted && !tokens[t].wanted) continue;
        place++;
        if (t < begin) continue;
        normed(op, op->in + t * K, x + to * K);
        if (op->dtype == I8) to_int8(x + to * K, K, q + to * K, scales + to * groups);
    }
}

// `count` rows of one matrix, from row `begin` on, times `n` inputs: sums (n, STRIP).
static void strip(const Operation *op, int side, int64_t begin, int count, int n, const float *x, const int8_t *q,
                  const float *scales, float *sums) {
    int64_t K = op->n_in, groups = (K + GROUP - 1) / GROUP;
    const void *matrix = side ? op->values : op->weight;
    const int8_t *w8 = (const int8_t *)matrix + begin * K;
    const float *w32 = (const float *)matrix + begin * K;
    const uint16_t *w16 = (const uint16_t *)matrix + begin * K;
    const float *row_scales = (side ? op->value_scale : op->scale) + begin;
    int tiled = op->dtype == I8 ? n / TILE * TILE : 0, even = tiled ? count / 2 * 2 : 0;
    for (int r = 0; r < even; r += 2)
        for (int t = 0; t < tiled; t += TILE)
            tile_i8(w8 + r * K, row_scales + r, K, q + t * K, scales + t * groups, sums + t * STRIP + r, STRIP);
    for (int t = 0; t < n; t++) {
        int r = t < tiled ? even : 0;
        float *out = sums + t * STRIP + r;
        if (op->dtype == I8) dots_i8(w8 + r * K, row_scales + r, K, q + t * K, scales + t * groups, out, count - r);
        else if (op->dtype == F32) dots_f32(w32 + r * K, K, x + t * K, out, count - r);
        else dots_f16(w16 + r * K, K, x + t * K, out, count - r);
    }
}

// Rows begin ... end of the weights times all inputs.
static void multiply(const Operation *op, int n, int64_t begin, int64_t end, const float *x, const int8_t *q,
                     const float *scales) {
    int64_t K = op->n_in, groups = (K + GROUP - 1) / GROUP;
    float sums[2][BLOCK * STRIP];
    for (int t = 0; t < n; t += BLOCK)       // a block's inputs stay in a core's second cache
        for (int64_t i = begin; i < end; i += STRIP) {
            int inputs = n - t < BLOCK ? n - t : BLOCK, rows = end - i < STRIP ? (int)(end - i) : STRIP;
            for (int side = 0; side <= (op->act == SWIGLU); side++)
                strip(op, side, i, rows, inputs, x + t * K, q + t * K, scales + t * groups, sums[side]);
            for (int j = 0; j < inputs; j++)
                finish(op, i, rows, sums[0] + j * STRIP, sums[1] + j * STRIP, op->out + (int64_t)(t + j) * op->stride + i);
        }
}

static void product(const Operation *op, const Token *tokens, int n, Worker *me, float *x, int8_t *q,
                    float *scales) {
    int64_t begin, end;
    int shared = n > FEW, ready = shared, rows = n;
    if (op->wanted)
        for (int t = 0; t < n; t++) rows -= !tokens[t].wanted;
    if (shared) {
        for (begin_phase(me, n, 4); take(me, n, 1, &begin, &end); finished(me))
            prepare_input(op, tokens, begin, end, x, q, scales);
        end_phase(me, 1);
    }
    for (begin_phase(me, op->n_out, 16); take(me, op->n_out, 4, &begin, &end); finished(me)) {
        if (!ready) prepare_input(op, tokens, 0, n, x, q, scales);
        ready = 1;
        multiply(op, rows, begin, end, x, q, scales);
    }
    end_phase(me, op->wait || shared);
}

// ---- embedding and attention -------------------------------------------------------------------------------

static void embed(const Operation *op, const Token *tokens, int64_t begin, int64_t end) {
    int64_t C = op->n_out;
    for (int64_t t = begin; t < end; t++) {
        const float *row = (const float *)op->weight + tokens[t].id * C;
        for (int64_t c = 0; c < C; c++) op->out[t * C + c] = row[c];
        if (op->positions)
            for (int64_t c = 0; c < C; c++) op->out[t * C + c] += op->positions[tokens[t].position * C + c];
    }
}

// One head of a query or key: RMS norm and rotation, where the model has them.
static void prepare_head(const Operation *op, const float *norm, int32_t position, const float *x, float *out) {
    int D = op->head_dim;
    float factor = 1;
    if (norm) {
        float squares = 0;
        for (int d = 0; d < D; d++) squares += x[d] * x[d];
        factor = 1.0f / sqrtf(squares / (float)D + op->eps);
    }
    for (int d = 0; d < D; d++) out[d] = norm ? x[d] * factor * norm[d] : x[d];
    if (op->positions) {                     // cos (D/2) and sin (D/2) of each position
        const float *cosine = op->positions + (int64_t)position * D, *sine = cosine + D / 2;
        for (int d = 0; d < D / 2; d++) {
            float a = out[d], b = out[d + D / 2];
            out[d] = a * cosine[d] - b * sine[d];
            out[d + D / 2] = b * cosine[d] + a * sine[d];
        }
    }
}

static float *cached(const Operation *op, float *cache, int64_t columns, const Token *t, int g, int64_t column) {
    return cache + (((int64_t)t->slot * op->kv_heads + g) * columns + column) * op->head_dim;
}

// in: n rows of H query heads, G key heads, G value heads. Keys and values go into the cache, queries stay.
static void remember(const Operation *op, const Token *tokens, int64_t begin, int64_t end, int64_t columns) {
    int H = op->heads, G = op->kv_heads, D = op->head_dim;
    int64_t width = (int64_t)(H + 2 * G) * D;
    for (int64_t task = begin; task < end; task++) {
        int head = (int)(task % (H + 2 * G));
        const Token *t = tokens + task / (H + 2 * G);
        float *x = (float *)op->in + (t - tokens) * width + (int64_t)head * D;
        if (head < H) prepare_head(op, op->q_norm, t->position, x, x);
        else if (head < H + G)
            prepare_head(op, op->k_norm, t->position, x, cached(op, op->cached_keys, columns, t, head - H, t->column));
        else memcpy(cached(op, op->cached_values, columns, t, head - H - G, t->column), x, D * sizeof(float));
    }
}

// out += weights (4,) times rows (4, D), one after the other: `out` is read and written once for the four.
static inline void add_four(float *restrict out, const float *restrict rows, int64_t D, const float *weights) {
    for (int64_t d = 0; d < D; d++) {
        float sum = out[d] + weights[0] * rows[d];
        sum += weights[1] * rows[D + d];
        sum += weights[2] * rows[2 * D + d];
        out[d] = sum + weights[3] * rows[3 * D + d];
    }
}

static void attend(const Operation *op, const Token *tokens, int64_t begin, int64_t end, int64_t columns,
                   float *scores) {
    int H = op->heads, G = op->kv_heads, D = op->head_dim;
    int64_t width = (int64_t)(H + 2 * G) * D;
    float factor = 1.0f / sqrtf((float)D);
    for (int64_t task = begin; task < end; task++) {
        int head = (int)(task % H), g = head / (H / G);
        const Token *t = tokens + task / H;
        const float *q = op->in + (t - tokens) * width + (int64_t)head * D;
        const float *k = cached(op, op->cached_keys, columns, t, g, t->first);
        const float *v = cached(op, op->cached_values, columns, t, g, t->first);
        float *out = op->out + (t - tokens) * (int64_t)H * D + (int64_t)head * D;
        int64_t S = t->column - t->first + 1;  // below 1: padding, of which nothing is asked
        float largest = -INFINITY, sum = 0;
        if (S > 0) dots_f32(k, D, q, scores, S);
#pragma omp simd reduction(max : largest)
        for (int64_t s = 0; s < S; s++) {
            scores[s] *= factor;
            largest = scores[s] > largest ? scores[s] : largest;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t s = 0; s < S; s++) sum += scores[s] = exponential(scores[s] - largest);
        for (int64_t s = 0; s < S; s++) scores[s] /= sum;
        memset(out, 0, D * sizeof(float));
        int64_t s = 0;
        for (; s + 4 <= S; s += 4) add_four(out, v + s * D, D, scores + s);
        for (; s < S; s++)
            for (int d = 0; d < D; d++) out[d] += scores[s] * v[s * D + d];
    }
}

// ---- the step ----------------------------------------------------------------------------------------------

// Bytes of scratch memory, aligned as floats, that a step needs.
int64_t minigpt_scratch(int count, int n, int64_t columns, int64_t widest, int threads) {
    int64_t groups = (widest + GROUP - 1) / GROUP, copies = n > FEW ? 1 : threads;
    return 2 * count * sizeof(Phase) + copies * n * ((widest + groups) * sizeof(float) + (widest + 3) / 4 * 4) +
           threads * columns * sizeof(float);
}

void minigpt_step(const Operation *operations, int count, const Token *tokens, int n, int64_t columns,
                  int64_t widest, int threads, void *scratch) {
    Phase *phases = scratch;
    memset(phases, 0, 2 * count * sizeof(Phase));
#pragma omp parallel num_threads(threads)
    {
        int64_t groups = (widest + GROUP - 1) / GROUP, number = omp_get_thread_num(), begin, end;
        int64_t size = n * (widest + groups + (widest + 3) / 4), copy = n > FEW ? 0 : number;
        float *notes = (float *)(phases + 2 * count), *x = notes + copy * size, *scales = x + n * widest;
        int8_t *q = (int8_t *)(scales + n * groups);
        float *scores = notes + (n > FEW ? 1 : threads) * size + number * columns;
        Worker me = {.phases = phases, .threads = threads};
        for (int i = 0; i < count; i++) {
            const Operation *op = operations + i;
            int64_t heads = (int64_t)n * (op->heads + 2 * op->kv_heads), queries = (int64_t)n * op->heads;
            if (op->kind == PRODUCT) product(op, tokens, n, &me, x, q, scales);
            if (op->kind == EMBED) {
                for (begin_phase(&me, n, 4); take(&me, n, 1, &begin, &end); finished(&me))
                    embed(op, tokens, begin, end);
                end_phase(&me, 1);
            }
            if (op->kind == ATTENTION) {
                for (begin_phase(&me, heads, 4); take(&me, heads, 1, &begin, &end); finished(&me))
                    remember(op, tokens, begin, end, columns);
                end_phase(&me, 1);
                for (begin_phase(&me, queries, 1); take(&me, queries, 1, &begin, &end); finished(&me))
                    attend(op, tokens, begin, end, columns, scores);
                end_phase(&me, 1);
            }
        }
    }
}
