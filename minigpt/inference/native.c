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

// R rows of weights with one vector: out[r] = w[r] . x. Several rows at once hide the latency of an addition.
#define ROWS 4

static void dots_f32(const float *w, int64_t K, const float *x, float *out, int rows) {
#if FAST
    if (rows == ROWS) {
        __m256 a0 = _mm256_setzero_ps(), a1 = a0, a2 = a0, a3 = a0;
        const float *w1 = w + K, *w2 = w1 + K, *w3 = w2 + K;
        int64_t k = 0;
        for (; k + 8 <= K; k += 8) {
            __m256 v = _mm256_loadu_ps(x + k);
            a0 = _mm256_fmadd_ps(_mm256_loadu_ps(w + k), v, a0);
            a1 = _mm256_fmadd_ps(_mm256_loadu_ps(w1 + k), v, a1);
            a2 = _mm256_fmadd_ps(_mm256_loadu_ps(w2 + k), v, a2);
            a3 = _mm256_fmadd_ps(_mm256_loadu_ps(w3 + k), v, a3);
        }
        out[0] = total(a0), out[1] = total(a1), out[2] = total(a2), out[3] = total(a3);
        for (; k < K; k++)
            for (int r = 0; r < ROWS; r++) out[r] += w[r * K + k] * x[k];
        return;
    }
#endif
    for (int r = 0; r < rows; r++) {
        float s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t k = 0; k < K; k++) s += w[r * K + k] * x[k];
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

static void dots_f16(const uint16_t *w, int64_t K, const float *x, float *out, int rows) {
    for (int r = 0; r < rows; r++) out[r] = 0;
    int64_t k = 0;
#if FAST
    if (rows == ROWS) {
        __m256 a0 = _mm256_setzero_ps(), a1 = a0, a2 = a0, a3 = a0;
        const uint16_t *w1 = w + K, *w2 = w1 + K, *w3 = w2 + K;
#define HALVES(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
        for (; k + 8 <= K; k += 8) {
            __m256 v = _mm256_loadu_ps(x + k);
            a0 = _mm256_fmadd_ps(HALVES(w + k), v, a0);
            a1 = _mm256_fmadd_ps(HALVES(w1 + k), v, a1);
            a2 = _mm256_fmadd_ps(HALVES(w2 + k), v, a2);
            a3 = _mm256_fmadd_ps(HALVES(w3 + k), v, a3);
        }
        out[0] = total(a0), out[1] = total(a1), out[2] = total(a2), out[3] = total(a3);
    }
#endif
    for (int r = 0; r < rows; r++)
        for (int64_t j = k; j < K; j++) out[r] += half_to_float(w[r * K + j]) * x[j];
}

// Both sides are int8: weights with a scale for each row, the input with one for each GROUP.
static void dots_i8(const int8_t *w, const float *row_scales, int64_t K, const int8_t *x, const float *scales,
                    float *out, int rows) {
    int64_t groups = (K + GROUP - 1) / GROUP, whole = K / GROUP;
    for (int r = 0; r < rows; r++, w += K) {
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

static void tile_i8(const int8_t *w, const float *row_scales, int64_t K, const int8_t *x, const float *scales,
                    float out[TILE][ROWS], int row) {
    int64_t groups = (K + GROUP - 1) / GROUP, whole = K / GROUP;
    float s[2][TILE] = {{0}};
    int64_t g = 0;
    w += row * K;
#if FAST
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 acc[2][TILE];
    for (int r = 0; r < 2; r++)
        for (int t = 0; t < TILE; t++) acc[r][t] = _mm256_setzero_ps();
    for (; g < whole; g++) {
        __m256i sum[2][TILE];
        for (int half = 0; half < 2; half++) {
            int64_t at = g * GROUP + half * 32;
            __m256i w0 = _mm256_loadu_si256((const __m256i *)(w + at));
            __m256i w1 = _mm256_loadu_si256((const __m256i *)(w + K + at));
            __m256i a0 = _mm256_abs_epi8(w0), a1 = _mm256_abs_epi8(w1);
            for (int t = 0; t < TILE; t++) {
                __m256i b = _mm256_loadu_si256((const __m256i *)(x + t * K + at));
                __m256i p0 = _mm256_madd_epi16(_mm256_maddubs_epi16(a0, _mm256_sign_epi8(b, w0)), ones);
                __m256i p1 = _mm256_madd_epi16(_mm256_maddubs_epi16(a1, _mm256_sign_epi8(b, w1)), ones);
                sum[0][t] = half ? _mm256_add_epi32(sum[0][t], p0) : p0;
                sum[1][t] = half ? _mm256_add_epi32(sum[1][t], p1) : p1;
            }
        }
        for (int t = 0; t < TILE; t++) {
            __m256 scale = _mm256_set1_ps(scales[t * groups + g]);
            for (int r = 0; r < 2; r++) acc[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][t]), scale, acc[r][t]);
        }
    }
    for (int r = 0; r < 2; r++)
        for (int t = 0; t < TILE; t++) s[r][t] = total(acc[r][t]);
#endif
    for (; g < groups; g++) {
        int64_t end = (g + 1) * GROUP < K ? (g + 1) * GROUP : K;
        for (int r = 0; r < 2; r++)
            for (int t = 0; t < TILE; t++) {
                int32_t sum = 0;
                for (int64_t k = g * GROUP; k < end; k++) sum += (int32_t)w[r * K + k] * x[t * K + k];
                s[r][t] += (float)sum * scales[t * groups + g];
            }
    }
    for (int r = 0; r < 2; r++)
        for (int t = 0; t < TILE; t++) out[t][row + r] = s[r][t] * row_scales[row + r];
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

static inline float activated(float x, int act) {
    if (act == GELU_TANH) {
        // tanh by way of exp: 0.5 (1 + tanh u) = 1 / (1 + exp(-2u))
        return x / (1.0f + exponential(-2.0f * 0.7978845608028654f * (x + 0.044715f * x * x * x)));
    }
    if (act == GELU_EXACT) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    return x;
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
enum { FEW = 4, BLOCK = 128 };

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

// Rows begin ... end of the weights times all inputs.
static void multiply(const Operation *op, int n, int64_t begin, int64_t end, const float *x, const int8_t *q,
                     const float *scales) {
    int64_t K = op->n_in, groups = (K + GROUP - 1) / GROUP;
    for (int block = 0; block < n; block += BLOCK)  // a block's inputs stay in a core's second cache
        for (int64_t i = begin; i < end; i += ROWS) {
            int rows = end - i < ROWS ? (int)(end - i) : ROWS, last = block + BLOCK < n ? block + BLOCK : n;
            for (int t = block, step; t < last; t += step) {
                float sums[2][TILE][ROWS];
                int tile = op->dtype == I8 && rows == ROWS && last - t >= TILE;
                step = tile ? TILE : 1;
                for (int side = 0; side <= (op->act == SWIGLU); side++) {
                    const void *w = side ? op->values : op->weight;
                    const float *ws = side ? op->value_scale : op->scale, *xs = scales + t * groups;
                    const int8_t *w8 = (const int8_t *)w + i * K, *x8 = q + t * K;
                    if (tile)
                        for (int r = 0; r < ROWS; r += 2) tile_i8(w8, ws + i, K, x8, xs, sums[side], r);
                    else if (op->dtype == I8) dots_i8(w8, ws + i, K, x8, xs, sums[side][0], rows);
                    else if (op->dtype == F32) dots_f32((const float *)w + i * K, K, x + t * K, sums[side][0], rows);
                    else dots_f16((const uint16_t *)w + i * K, K, x + t * K, sums[side][0], rows);
                }
                for (int j = 0; j < step; j++) {
                    float *out = op->out + (int64_t)(t + j) * op->stride + i;
                    for (int r = 0; r < rows; r++) {
                        float y = sums[0][j][r] + (op->bias ? op->bias[i + r] : 0);
                        y = op->act == SWIGLU ? y / (1.0f + exponential(-y)) * sums[1][j][r] : activated(y, op->act);
                        out[r] = op->add ? out[r] + y : y;
                    }
                }
            }
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
    for (begin_phase(me, op->n_out, 4 * ROWS); take(me, op->n_out, ROWS, &begin, &end); finished(me)) {
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
        for (int64_t s = 0; s < S; s += ROWS)
            dots_f32(k + s * D, D, q, scores + s, S - s < ROWS ? (int)(S - s) : ROWS);
#pragma omp simd reduction(max : largest)
        for (int64_t s = 0; s < S; s++) {
            scores[s] *= factor;
            largest = scores[s] > largest ? scores[s] : largest;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t s = 0; s < S; s++) sum += scores[s] = exponential(scores[s] - largest);
        memset(out, 0, D * sizeof(float));
        for (int64_t s = 0; s < S; s++) {
            float weight = scores[s] / sum;
            for (int d = 0; d < D; d++) out[d] += weight * v[s * D + d];
        }
    }
}

// ---- the step ----------------------------------------------------------------------------------------------

// Bytes of scratch memory, aligned as floats, that a step needs.
int64_t minigpt_scratch(int count, int n, int64_t columns, int64_t widest, int threads) {
    int64_t groups = (widest + GROUP - 1) / GROUP, copies = n > FEW ? 1 : threads;
    return 2 * count * sizeof(Phase) + copies * n * ((widest + groups) * sizeof(float) + (widest + 3) / 4 * 4) +
           threads * (columns + ROWS) * sizeof(float);
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
        float *scores = notes + (n > FEW ? 1 : threads) * size + number * (columns + ROWS);
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
