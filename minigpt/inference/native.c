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
#if FAST && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#define WIDE 1                               // one instruction for 64 products of whole numbers
#else
#define WIDE 0
#endif
#define UNROLLED _Pragma("GCC unroll 16")    // so that arrays of sums become registers

enum { EMBED, PRODUCT, ATTENTION };          // kinds of operations
enum { F32, F16, BF16, I8 };                 // what weights are stored in
enum { NO_NORM, LAYER_NORM, RMS_NORM };      // before a product
enum { NO_ACT, GELU_TANH, GELU_EXACT, SWIGLU };  // after it
enum { GROUP = 128 };                        // neighbours of an input that share a scale when it becomes int8
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

typedef struct {                             // what became of a GROUP of an input that became int8
    float scale;
    int32_t correction;                      // -128 times its sum: for weights that are taken as 128 more than they are
} Step;

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

// R rows of weights with one vector: out[r] = w[r] . x. A row after the other, as they lie in memory: its
// prefetchers follow one long stream further than several short ones, and AHEAD, in bytes, helps them over the
// ends of pages. Two sums hide the latency of an addition, as far as memory is faster.
enum { AHEAD = 2048, SHORT = 256 };

#if FAST
#define FLOATS(p) _mm256_loadu_ps(p)
#define HALVES(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define BRAINS(p) _mm256_castsi256_ps(_mm256_slli_epi32( \
    _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
// `sums` over the first multiple of 8 values, and k there.
#define ROW_OF(LOAD)                                                               \
    int64_t k = 0;                                                                 \
    __m256 a = _mm256_setzero_ps(), b = a;                                         \
    for (; k + 32 <= K; k += 32) {                                                 \
        for (size_t line = 0; line < 32 * sizeof *w; line += 64)                   \
            _mm_prefetch((const char *)(w + k) + AHEAD + line, _MM_HINT_T0);       \
        a = _mm256_fmadd_ps(LOAD(w + k), _mm256_loadu_ps(x + k), a);               \
        b = _mm256_fmadd_ps(LOAD(w + k + 8), _mm256_loadu_ps(x + k + 8), b);       \
        a = _mm256_fmadd_ps(LOAD(w + k + 16), _mm256_loadu_ps(x + k + 16), a);     \
        b = _mm256_fmadd_ps(LOAD(w + k + 24), _mm256_loadu_ps(x + k + 24), b);     \
    }                                                                              \
    for (; k + 16 <= K; k += 16) {                                                 \
        a = _mm256_fmadd_ps(LOAD(w + k), _mm256_loadu_ps(x + k), a);               \
        b = _mm256_fmadd_ps(LOAD(w + k + 8), _mm256_loadu_ps(x + k + 8), b);       \
    }                                                                              \
    for (; k + 8 <= K; k += 8) a = _mm256_fmadd_ps(LOAD(w + k), _mm256_loadu_ps(x + k), a); \
    __m256 sums = _mm256_add_ps(a, b);
#endif

#if FAST
#define SUM_OF(LOAD) ROW_OF(LOAD) float s = total(sums);
#else
#define SUM_OF(LOAD) int64_t k = 0; float s = 0;
#endif
// Rows r ... `rows`; LOAD makes eight floats of what is stored, FLOAT one.
#define DOTS_OF(LOAD, FLOAT)                                                       \
    for (; r < rows; r++, w += K) {                                                \
        SUM_OF(LOAD)                                                               \
        _Pragma("omp simd reduction(+ : s)")                                       \
        for (int64_t j = k; j < K; j++) s += FLOAT(w[j]) * x[j];                   \
        out[r] = s;                                                                \
    }

static void dots_f32(const float *w, int64_t K, const float *x, float *out, int64_t rows) {
    int64_t r = 0;
#if FAST
    if (K <= SHORT && K % 8 == 0)            // an attention's head: adding up a row's lanes costs as much as the row
        for (; r + 8 <= rows; r += 8) {
            __m256 eight[8];
            for (int i = 0; i < 8; i++, w += K) {
                ROW_OF(FLOATS)
                eight[i] = sums;
            }
            _mm256_storeu_ps(out + r, totals(eight));
        }
#endif
    DOTS_OF(FLOATS, (float))
}

// float16 and bfloat16 are exact in float32, and multiplied there.
static inline float half_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
    float f;
    memcpy(&f, &bits, 4);
    f *= 0x1p112f;                           // float32 counts its exponents from 112 lower
    memcpy(&bits, &f, 4);
    bits |= (uint32_t)(h & 0x8000) << 16 | ((h & 0x7fff) < 0x7c00 ? 0 : 0x7f800000);  // NaN and infinity stay
    memcpy(&f, &bits, 4);
    return f;
}

static inline float brain_to_float(uint16_t b) {
    uint32_t bits = (uint32_t)b << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static void dots_f16(const uint16_t *w, int64_t K, const float *x, float *out, int64_t rows) {
    int64_t r = 0;
    DOTS_OF(HALVES, half_to_float)
}

static void dots_bf16(const uint16_t *w, int64_t K, const float *x, float *out, int64_t rows) {
    int64_t r = 0;
    DOTS_OF(BRAINS, brain_to_float)
}

#if FAST
// HIGH rows of weights with BROAD inputs: a loaded vector serves several products, which is what makes a prompt
// fast. K is a multiple of 8. The additions are those of `dots`, in the same order: a sum has the bits that it has
// alone.
enum { HIGH = WIDE ? 4 : 2, BROAD = 2 };     // as many sums as there are registers for
#define TILE_AT(LOAD, K_HERE, SUMS) do {                                           \
    __m256 rows[HIGH];                                                             \
    UNROLLED for (int r = 0; r < HIGH; r++) rows[r] = LOAD(w + r * K + (K_HERE));  \
    UNROLLED for (int t = 0; t < BROAD; t++) {                                     \
        __m256 input = _mm256_loadu_ps(x + t * K + (K_HERE));                      \
        UNROLLED for (int r = 0; r < HIGH; r++)                                    \
            SUMS[t * HIGH + r] = _mm256_fmadd_ps(rows[r], input, SUMS[t * HIGH + r]); \
    }                                                                              \
} while (0)
#define TILE_OF(LOAD)                                                              \
    enum { ALL = HIGH * BROAD };                                                   \
    __m256 a[ALL], b[ALL];                                                         \
    UNROLLED for (int i = 0; i < ALL; i++) a[i] = b[i] = _mm256_setzero_ps();      \
    int64_t k = 0;                                                                 \
    for (; k + 16 <= K; k += 16) {                                                 \
        TILE_AT(LOAD, k, a);                                                       \
        TILE_AT(LOAD, k + 8, b);                                                   \
    }                                                                              \
    if (k < K) TILE_AT(LOAD, k, a);                                                \
    UNROLLED for (int i = 0; i < ALL; i++)                                         \
        out[i / HIGH * stride + i % HIGH] = total(_mm256_add_ps(a[i], b[i]));

// Not inlined: the compiler finds registers for a tile's sums only where it has nothing else to keep.
static __attribute__((noinline)) void tile_f32(const float *w, int64_t K, const float *x, float *out,
                                               int64_t stride) {
    TILE_OF(FLOATS)
}

static __attribute__((noinline)) void tile_f16(const uint16_t *w, int64_t K, const float *x, float *out,
                                               int64_t stride) {
    TILE_OF(HALVES)
}

static __attribute__((noinline)) void tile_bf16(const uint16_t *w, int64_t K, const float *x, float *out,
                                                int64_t stride) {
    TILE_OF(BRAINS)
}
#endif

// ---- dot products of whole numbers -------------------------------------------------------------------------

// What they are made of, for one CHUNK of a row's bytes. Loads stop at a row's end: `left` bytes are there.
#if WIDE
typedef __m512i Bytes;
typedef __m512i Ints;
typedef __m512 Floats;
enum { CHUNK = 64, ROWS = 4, TILE = 2 };
static inline Bytes bytes(const int8_t *p, int64_t left) {
    return _mm512_maskz_loadu_epi8(left < CHUNK ? ((__mmask64)1 << left) - 1 : ~(__mmask64)0, p);
}
// The instruction multiplies unsigned by signed bytes: 128 is added to the weights, and taken off by `correction`.
static inline Bytes weights_of(Bytes w) { return _mm512_xor_si512(w, _mm512_set1_epi8((char)0x80)); }
static inline Ints start(Step step) { return _mm512_maskz_set1_epi32(1, step.correction); }
static inline Ints multiplied(Bytes w, Bytes x, Ints sum) { return _mm512_dpbusd_epi32(sum, w, x); }
static inline Floats scaled(Ints sum, float scale, Floats acc) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale), acc);
}
static inline __m256 halved(Floats v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
#elif FAST
typedef __m256i Bytes;
typedef __m256i Ints;
typedef __m256 Floats;
enum { CHUNK = 32, ROWS = 2, TILE = 4 };
static inline Bytes bytes(const int8_t *p, int64_t left) {
    if (left >= CHUNK) return _mm256_loadu_si256((const __m256i *)p);
    int8_t padded[CHUNK] = {0};
    memcpy(padded, p, left);
    return _mm256_loadu_si256((const __m256i *)padded);
}
static inline Bytes weights_of(Bytes w) { return w; }
static inline Ints start(Step step) { return (void)step, _mm256_setzero_si256(); }
static inline Ints multiplied(Bytes w, Bytes x, Ints sum) {
    // |w| times x with w's sign: no value is -128, so two products fit into 16 bits
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline Floats scaled(Ints sum, float scale, Floats acc) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale), acc);
}
static inline __m256 halved(Floats v) { return v; }
#else
typedef int32_t Bytes;
typedef int32_t Ints;
typedef float Floats;
enum { CHUNK = 1, ROWS = 1, TILE = 1 };
static inline Bytes bytes(const int8_t *p, int64_t left) { return (void)left, *p; }
static inline Bytes weights_of(Bytes w) { return w; }
static inline Ints start(Step step) { return (void)step, 0; }
static inline Ints multiplied(Bytes w, Bytes x, Ints sum) { return sum + w * x; }
static inline Floats scaled(Ints sum, float scale, Floats acc) { return acc + (float)sum * scale; }
static inline float halved(Floats v) { return v; }
static inline float total(float v) { return v; }
#endif
enum { MOST = ROWS * TILE };

// R rows of weights, which have a scale each, with T inputs, which have one for each GROUP: out[t][r] = w[r] . x[t].
// In a tile a loaded vector serves several products, which is what makes a prompt fast; a sum has the same bits in
// a tile and alone.
static inline __attribute__((always_inline)) void products_i8(int R, int T, const int8_t *w, const float *row_scales,
                                                              int64_t K, const int8_t *x, const Step *steps, float *out,
                                                              int64_t stride) {
    int64_t groups = (K + GROUP - 1) / GROUP;
    Floats acc[MOST];                        // row 0 with each input, then row 1, ...
    UNROLLED for (int i = 0; i < R * T; i++) acc[i] = (Floats){0};
    for (int64_t g = 0; g < groups; g++) {
        Ints sums[MOST];
        UNROLLED for (int i = 0; i < R * T; i++) sums[i] = start(steps[i % T * groups + g]);
        UNROLLED for (int j = 0; j < GROUP; j += CHUNK) {
            int64_t k = g * GROUP + j, left = K - k;
            if (left <= 0) break;
            Bytes rows[ROWS];
            UNROLLED for (int r = 0; r < R; r++) rows[r] = weights_of(bytes(w + r * K + k, left));
            UNROLLED for (int t = 0; t < T; t++) {
                Bytes input = bytes(x + t * K + k, left);
                UNROLLED for (int r = 0; r < R; r++) sums[r * T + t] = multiplied(rows[r], input, sums[r * T + t]);
            }
        }
        UNROLLED for (int i = 0; i < R * T; i++) acc[i] = scaled(sums[i], steps[i % T * groups + g].scale, acc[i]);
    }
    float s[MOST];
#if FAST
    if (R * T == 8) {
        __m256 eight[8];
        UNROLLED for (int i = 0; i < 8; i++) eight[i] = halved(acc[i]);
        _mm256_storeu_ps(s, totals(eight));
    } else
#endif
    for (int i = 0; i < R * T; i++) s[i] = total(halved(acc[i]));
    for (int i = 0; i < R * T; i++) out[i % T * stride + i / T] = s[i] * row_scales[i / T];
}

static void dots_i8(const int8_t *w, const float *row_scales, int64_t K, const int8_t *x, const Step *steps, float *out,
                    int64_t rows) {
    for (int64_t r = 0; r < rows; r++) products_i8(1, 1, w + r * K, row_scales + r, K, x, steps, out + r, 0);
}

static __attribute__((noinline)) void tile_i8(const int8_t *w, const float *row_scales, int64_t K, const int8_t *x,
                                              const Step *steps, float *out, int64_t stride) {
    products_i8(ROWS, TILE, w, row_scales, K, x, steps, out, stride);
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
static void to_int8(const float *x, int64_t K, int8_t *q, Step *steps) {
    for (int64_t g = 0; g * GROUP < K; g++) {
        int64_t start = g * GROUP, end = start + GROUP < K ? start + GROUP : K;
        float largest = 0, damage = 0;       // x - x: 0, but NaN for what is not finite, which a maximum passes over
#pragma omp simd reduction(max : largest) reduction(+ : damage)
        for (int64_t k = start; k < end; k++) {
            float size = fabsf(x[k]);
            largest = size > largest ? size : largest;
            damage += x[k] - x[k];
        }
        float factor = largest > 0 ? 127.0f / largest : 0;
        int32_t sum = 0;
        for (int64_t k = start; k < end; k++) sum += q[k] = (int8_t)rintf(x[k] * factor);
        steps[g] = (Step){largest / 127.0f + damage, -128 * sum};
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
                          int8_t *q, Step *steps) {
    int64_t K = op->n_in, groups = (K + GROUP - 1) / GROUP;
    int place = 0;                           // in the last product: not every token's logits are asked for
    for (int64_t t = 0; t < end; t++) {
        int64_t to = op->wanted ? place : t;
        if (op->wanted && !tokens[t].wanted) continue;
        place++;
        if (t < begin) continue;
        normed(op, op->in + t * K, x + to * K);
        if (op->dtype == I8) to_int8(x + to * K, K, q + to * K, steps + to * groups);
    }
}

// `count` rows of one matrix, from row `begin` on, times `n` inputs: sums (n, STRIP).
static void strip(const Operation *op, int side, int64_t begin, int count, int n, const float *x, const int8_t *q,
                  const Step *steps, float *sums) {
    int64_t K = op->n_in, groups = (K + GROUP - 1) / GROUP;
    const void *matrix = side ? op->values : op->weight;
    const int8_t *w8 = (const int8_t *)matrix + begin * K;
    const float *w32 = (const float *)matrix + begin * K;
    const uint16_t *w16 = (const uint16_t *)matrix + begin * K;
    const float *row_scales = (side ? op->value_scale : op->scale) + begin;
    int high = ROWS, broad = TILE;
#if FAST
    if (op->dtype != I8) high = HIGH, broad = BROAD;
#endif
    int tiles = op->dtype == I8 || (FAST && K % 8 == 0);
    int tiled = tiles ? n / broad * broad : 0, even = tiled ? count / high * high : 0;
    for (int r = 0; r < even; r += high)
        for (int t = 0; t < tiled; t += broad) {
            float *out = sums + t * STRIP + r;
            if (op->dtype == I8) tile_i8(w8 + r * K, row_scales + r, K, q + t * K, steps + t * groups, out, STRIP);
#if FAST
            else if (op->dtype == F32) tile_f32(w32 + r * K, K, x + t * K, out, STRIP);
            else if (op->dtype == F16) tile_f16(w16 + r * K, K, x + t * K, out, STRIP);
            else tile_bf16(w16 + r * K, K, x + t * K, out, STRIP);
#endif
        }
    for (int t = 0; t < n; t++) {
        int r = t < tiled ? even : 0;
        float *out = sums + t * STRIP + r;
        if (op->dtype == I8) dots_i8(w8 + r * K, row_scales + r, K, q + t * K, steps + t * groups, out, count - r);
        else if (op->dtype == F32) dots_f32(w32 + r * K, K, x + t * K, out, count - r);
        else if (op->dtype == F16) dots_f16(w16 + r * K, K, x + t * K, out, count - r);
        else dots_bf16(w16 + r * K, K, x + t * K, out, count - r);
    }
}

// Rows begin ... end of the weights times all inputs.
static void multiply(const Operation *op, int n, int64_t begin, int64_t end, const float *x, const int8_t *q,
                     const Step *steps) {
    int64_t K = op->n_in, groups = (K + GROUP - 1) / GROUP;
    float sums[2][BLOCK * STRIP];
    for (int t = 0; t < n; t += BLOCK)       // a block's inputs stay in a core's second cache
        for (int64_t i = begin; i < end; i += STRIP) {
            int inputs = n - t < BLOCK ? n - t : BLOCK, rows = end - i < STRIP ? (int)(end - i) : STRIP;
            for (int side = 0; side <= (op->act == SWIGLU); side++)
                strip(op, side, i, rows, inputs, x + t * K, q + t * K, steps + t * groups, sums[side]);
            for (int j = 0; j < inputs; j++)
                finish(op, i, rows, sums[0] + j * STRIP, sums[1] + j * STRIP,
                       op->out + (int64_t)(t + j) * op->stride + i);
        }
}

static void product(const Operation *op, const Token *tokens, int n, Worker *me, float *x, int8_t *q,
                    Step *steps) {
    int64_t begin, end;
    int shared = n > FEW, ready = shared, rows = n;
    if (op->wanted)
        for (int t = 0; t < n; t++) rows -= !tokens[t].wanted;
    if (shared) {
        for (begin_phase(me, n, 4); take(me, n, 1, &begin, &end); finished(me))
            prepare_input(op, tokens, begin, end, x, q, steps);
        end_phase(me, 1);
    }
    for (begin_phase(me, op->n_out, 16); take(me, op->n_out, 4, &begin, &end); finished(me)) {
        if (!ready) prepare_input(op, tokens, 0, n, x, q, steps);
        ready = 1;
        multiply(op, rows, begin, end, x, q, steps);
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

// out (D,) = weights (S,) times rows (S, D); the sums stay in registers from the first row to the last.
static void mix(const float *weights, const float *rows, int64_t S, int64_t D, float *out) {
    int64_t d = 0;
#if FAST
    for (; d + 32 <= D; d += 32) {
        __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int64_t s = 0; s < S; s++) {
            __m256 weight = _mm256_set1_ps(weights[s]);
            const float *row = rows + s * D + d;
            UNROLLED for (int i = 0; i < 4; i++) sums[i] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(row + 8 * i), sums[i]);
        }
        UNROLLED for (int i = 0; i < 4; i++) _mm256_storeu_ps(out + d + 8 * i, sums[i]);
    }
#endif
    memset(out + d, 0, (D - d) * sizeof(float));
    for (int64_t s = 0; s < S; s++)
        for (int64_t c = d; c < D; c++) out[c] += weights[s] * rows[s * D + c];
}

static void attend(const Operation *op, const Token *tokens, int n, int64_t begin, int64_t end, int64_t columns,
                   float *scores) {
    int H = op->heads, G = op->kv_heads, D = op->head_dim;
    int64_t width = (int64_t)(H + 2 * G) * D;
    float factor = 1.0f / sqrtf((float)D);
    for (int64_t task = begin; task < end; task++) {
        int head = (int)(task / n), g = head / (H / G);  // head by head: its keys and values stay in a core's cache
        const Token *t = tokens + task % n;
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
        mix(scores, v, S, D, out);
    }
}

// ---- the step ----------------------------------------------------------------------------------------------

// Bytes of scratch memory, aligned as floats, that a step needs.
int64_t minigpt_scratch(int count, int n, int64_t columns, int64_t widest, int threads) {
    int64_t groups = (widest + GROUP - 1) / GROUP, copies = n > FEW ? 1 : threads;
    int64_t of_token = widest * sizeof(float) + groups * sizeof(Step) + (widest + 3) / 4 * 4;
    return 2 * count * sizeof(Phase) + copies * n * of_token + threads * columns * sizeof(float);
}

void minigpt_step(const Operation *operations, int count, const Token *tokens, int n, int64_t columns,
                  int64_t widest, int threads, void *scratch) {
    Phase *phases = scratch;
    memset(phases, 0, 2 * count * sizeof(Phase));
#pragma omp parallel num_threads(threads)
    {
        int64_t groups = (widest + GROUP - 1) / GROUP, number = omp_get_thread_num(), begin, end;
        int64_t size = n * (widest + 2 * groups + (widest + 3) / 4), copy = n > FEW ? 0 : number;
        float *notes = (float *)(phases + 2 * count), *x = notes + copy * size;
        Step *steps = (Step *)(x + n * widest);
        int8_t *q = (int8_t *)(steps + n * groups);
        float *scores = notes + (n > FEW ? 1 : threads) * size + number * columns;
        Worker me = {.phases = phases, .threads = threads};
        for (int i = 0; i < count; i++) {
            const Operation *op = operations + i;
            int64_t heads = (int64_t)n * (op->heads + 2 * op->kv_heads), queries = (int64_t)n * op->heads;
            if (op->kind == PRODUCT) product(op, tokens, n, &me, x, q, steps);
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
                    attend(op, tokens, n, begin, end, columns, scores);
                end_phase(&me, 1);
            }
        }
    }
}

// ---- after it ----------------------------------------------------------------------------------------------

enum { GLANCE = 512 };

// Of each row of scores (rows, V): where its highest number is, the first of several, and the number; NaN if the
// row has one.
void minigpt_likeliest(const float *scores, int rows, int64_t V, int64_t *places, float *highest) {
    for (int r = 0; r < rows; r++) {
        const float *row = scores + r * V;
        int64_t place = 0;
        float largest = -INFINITY;
        int odd = 0;
        for (int64_t i = 0; i < V; i += GLANCE) {
            int64_t end = V - i < GLANCE ? V : i + GLANCE;
            float here = -INFINITY;
#pragma omp simd reduction(max : here) reduction(| : odd)
            for (int64_t v = i; v < end; v++) {
                here = row[v] > here ? row[v] : here;
                odd |= row[v] != row[v];
            }
            if (here > largest) largest = here, place = i;
        }
        while (place < V - 1 && row[place] != largest) place++;
        places[r] = place;
        highest[r] = odd ? NAN : largest;
    }
}
