// Products of rows of weights with inputs, in float32, float16, bfloat16 and int8. A step spends nearly all of its time
// here.
//
// A product has the same bits if it is computed alone, in a tile with others, or with any number of rows and inputs.
// So a token's logits do not depend on other tokens in the call.
//
// Letters: n inputs, T inputs of a tile, K numbers of an input and of a row of weights.

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define FAST 1
#else
#define FAST 0
#endif
#if FAST && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#define WIDE 1                               // one instruction computes 64 products of integers
#else
#define WIDE 0
#endif
#if defined(__AVX512VL__)
#define REGISTER "+v"
#else
#define REGISTER "+x"
#endif
#define IN_REGISTER(v) __asm__("" : REGISTER(v))  // without this, compilers load v again for each use
#define UNROLLED _Pragma("GCC unroll 16")    // unrolled, arrays of sums become registers

enum { F32, F16, BF16, I8 };                 // formats of weights
enum { GROUP = 128, FOUR = 4 * GROUP };      // an int8 input has one scale for each GROUP of numbers
#define FOURS(K) (((K) + FOUR - 1) / FOUR)
enum { STRIP = 64 };                         // number of rows of weights that are multiplied at a time
enum { PANEL = 32, ACROSS = 8, MANY = 32 };  // int8: rows and inputs of a panel product; needs MANY inputs

typedef struct {                             // scales of four GROUPS of an int8 input
    float scale[4];                          // 0 for GROUPS after the input's end
    int32_t correction[4];                   // -128 times the GROUP's sum, because 128 is added to the weights
} Steps;

// ---- dot products ------------------------------------------------------------------------------------------

#if FAST
static inline float total(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// Computes total() of eight vectors together. The additions and their order are those of total().
static inline __m256 totals(const __m256 *v) {
    __m256 half[4], quarter[2];
    for (int i = 0; i < 4; i++)              // adds the halves of v[i] and of v[i + 4]
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

// Rows of weights times one vector: out[r] = w[r] . x. The rows are read one after another, in the order of the memory,
// because the prefetchers work best for one long stream. Prefetchers stop at the end of a page; prefetching AHEAD
// bytes helps there. Two sums hide the latency of an addition.
enum { AHEAD = 2048, SHORT = 256, LANES = 16 };

#if FAST
#define FLOATS(p) _mm256_loadu_ps(p)
#define HALVES(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define BRAINS(p) _mm256_castsi256_ps(_mm256_slli_epi32( \
    _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
// Defines `sums`, the sums over the first k values; k is the largest multiple of 8 up to K.
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
#define SUM_OF(LOAD, FLOAT) ROW_OF(LOAD) float s = total(sums);
#else                                        // LANES fixes the order of the additions for every compiler
#define SUM_OF(LOAD, FLOAT)                                                        \
    int64_t k = 0;                                                                 \
    float lanes[LANES] = {0}, s = 0;                                               \
    for (; k + LANES <= K; k += LANES)                                             \
        for (int i = 0; i < LANES; i++) lanes[i] += FLOAT(w[k + i]) * x[k + i];    \
    for (int i = 0; i < LANES; i++) s += lanes[i];
#endif
// Computes rows r ... `rows`. LOAD converts eight stored numbers to floats, FLOAT converts one.
#define DOTS_OF(LOAD, FLOAT)                                                       \
    for (; r < rows; r++, w += K) {                                                \
        SUM_OF(LOAD, FLOAT)                                                        \
        for (int64_t j = k; j < K; j++) s += FLOAT(w[j]) * x[j];                   \
        out[r] = s;                                                                \
    }

static void dots_f32(const float *w, int64_t K, const float *x, float *out, int64_t rows) {
    int64_t r = 0;
#if FAST
    if (K <= SHORT && K % 8 == 0)            // short rows, as in attention: totals() for eight rows at once
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

// float16 and bfloat16 are converted to float32 without rounding, and multiplied in float32.
static inline float half_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
    float f;
    memcpy(&f, &bits, 4);
    f *= 0x1p112f;                           // corrects the exponent: its bias is 15 in float16 and 127 in float32
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
// HIGH rows of weights times BROAD inputs. Each loaded vector is used for several products; this makes prompts fast.
// K is a multiple of 8; inputs are `apart` numbers from each other. The additions have the order of `dots`, so a sum
// has the same bits.
enum { HIGH = WIDE ? 4 : 2, BROAD = 2 };     // HIGH * BROAD sums fit into the registers
#define TILE_AT(LOAD, K_HERE, SUMS) do {                                           \
    __m256 rows[HIGH];                                                             \
    UNROLLED for (int r = 0; r < HIGH; r++) {                                      \
        rows[r] = LOAD(w + r * K + (K_HERE));                                      \
        IN_REGISTER(rows[r]);                                                      \
    }                                                                              \
    UNROLLED for (int t = 0; t < BROAD; t++) {                                     \
        __m256 input = _mm256_loadu_ps(x + t * apart + (K_HERE));                  \
        IN_REGISTER(input);                                                        \
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
    UNROLLED for (int i = 0; i < ALL; i++) a[i] = _mm256_add_ps(a[i], b[i]);       \
    float sums[8];                                                                 \
    if (ALL == 8) _mm256_storeu_ps(sums, totals(a));                               \
    else UNROLLED for (int i = 0; i < ALL; i++) sums[i] = total(a[i]);             \
    UNROLLED for (int i = 0; i < ALL; i++) out[i / HIGH * stride + i % HIGH] = sums[i];

// Not inlined, because otherwise the compiler has too few registers for a tile's sums.
static __attribute__((noinline)) void tile_f32(const float *w, int64_t K, const float *x, int64_t apart,
                                               float *out, int64_t stride) {
    TILE_OF(FLOATS)
}

static __attribute__((noinline)) void tile_f16(const uint16_t *w, int64_t K, const float *x, int64_t apart,
                                               float *out, int64_t stride) {
    TILE_OF(HALVES)
}

static __attribute__((noinline)) void tile_bf16(const uint16_t *w, int64_t K, const float *x, int64_t apart,
                                                float *out, int64_t stride) {
    TILE_OF(BRAINS)
}
#endif

// ---- dot products of integers ------------------------------------------------------------------------------

// The products of a GROUP are summed exactly, as integers. The sum of GROUP number g, times its scale, is added to
// float sum number g % 4 of the row. All code below keeps this order, so a product always has the same bits.
#if FAST
#if WIDE
typedef __m512i Bytes;
enum { CHUNK = 64 };
static inline Bytes bytes(const int8_t *p, int64_t left) {
    if (left >= CHUNK) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi8(left > 0 ? ((__mmask64)1 << left) - 1 : 0, p);
}
// The instruction multiplies unsigned by signed bytes. So 128 is added to the weights, and `correction` subtracts it.
static inline Bytes weights_of(Bytes w) { return _mm512_xor_si512(w, _mm512_set1_epi8((char)0x80)); }
static inline Bytes multiplied(Bytes w, Bytes x, Bytes sum) { return _mm512_dpbusd_epi32(sum, w, x); }
static inline __m128i corrected(__m128i sums, const Steps *s) {
    return _mm_add_epi32(sums, _mm_loadu_si128((const __m128i *)s->correction));
}
#define OF_BYTES(name) _mm512_##name
static inline __m128i quartered(Bytes v) {
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
#else
typedef __m256i Bytes;
enum { CHUNK = 32 };
static inline Bytes bytes(const int8_t *p, int64_t left) {
    if (left >= CHUNK) return _mm256_loadu_si256((const __m256i *)p);
    int8_t padded[CHUNK] = {0};
    if (left > 0) memcpy(padded, p, left);
    return _mm256_loadu_si256((const __m256i *)padded);
}
static inline Bytes weights_of(Bytes w) { return w; }
static inline Bytes multiplied(Bytes w, Bytes x, Bytes sum) {
    // |w| times x with w's sign. No value is -128, so the sum of two products fits into 16 bits.
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline __m128i corrected(__m128i sums, const Steps *s) { return (void)s, sums; }
#define OF_BYTES(name) _mm256_##name
static inline __m128i quartered(Bytes v) {
    return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}
#endif

// Computes the sums of four vectors of integers.
static inline __m128i sums_of(const Bytes *v) {
    Bytes a = OF_BYTES(add_epi32)(OF_BYTES(unpacklo_epi32)(v[0], v[1]), OF_BYTES(unpackhi_epi32)(v[0], v[1]));
    Bytes b = OF_BYTES(add_epi32)(OF_BYTES(unpacklo_epi32)(v[2], v[3]), OF_BYTES(unpackhi_epi32)(v[2], v[3]));
    return quartered(OF_BYTES(add_epi32)(OF_BYTES(unpacklo_epi64)(a, b), OF_BYTES(unpackhi_epi64)(a, b)));
}

// Multiplies four GROUPS of a row of weights with T inputs. Only the first `left` bytes of the row exist.
static inline __attribute__((always_inline)) void four_i8(int T, const int8_t *w, int64_t left, const int8_t *x,
                                                          int64_t K, const Steps *steps, int64_t fours, __m128 *acc) {
    enum { CHUNKS = GROUP / CHUNK };
    Bytes row[4 * CHUNKS];
    UNROLLED for (int i = 0; i < 4 * CHUNKS; i++) row[i] = weights_of(bytes(w + i * CHUNK, left - i * CHUNK));
    UNROLLED for (int t = 0; t < T; t++) {
        Bytes sums[4];
        UNROLLED for (int g = 0; g < 4; g++) {
            sums[g] = (Bytes){0};
            UNROLLED for (int i = g * CHUNKS; i < (g + 1) * CHUNKS; i++)
                sums[g] = multiplied(row[i], bytes(x + t * K + i * CHUNK, left - i * CHUNK), sums[g]);
        }
        const Steps *s = steps + t * fours;
        acc[t] = _mm_fmadd_ps(_mm_cvtepi32_ps(corrected(sums_of(sums), s)), _mm_loadu_ps(s->scale), acc[t]);
    }
}

// One row of weights times T inputs: out[t] = w . x[t]. The row has one scale, an input has one for each GROUP.
enum { SOME = 4 };

static inline __attribute__((always_inline)) void row_i8(int T, const int8_t *w, float scale, int64_t K,
                                                         const int8_t *x, const Steps *steps, float *out,
                                                         int64_t stride) {
    int64_t fours = FOURS(K), left = K % FOUR;
    __m128 acc[SOME];
    UNROLLED for (int t = 0; t < T; t++) acc[t] = _mm_setzero_ps();
    for (int64_t f = 0; f < K / FOUR; f++, w += FOUR, x += FOUR, steps++)
        four_i8(T, w, FOUR, x, K, steps, fours, acc);
    // often left == FOUR / 2, and a constant size is faster
    if (T > 1 && left == FOUR / 2) four_i8(T, w, FOUR / 2, x, K, steps, fours, acc);
    else if (left) four_i8(T, w, left, x, K, steps, fours, acc);
    UNROLLED for (int t = 0; t < T; t++) {
        __m128 half = _mm_add_ps(acc[t], _mm_movehl_ps(acc[t], acc[t]));
        out[t * stride] = scale * _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
    }
}

// rows_i8 and tile_i8 are not inlined, so that each can use all registers.
static __attribute__((noinline)) void rows_i8(const int8_t *w, const float *row_scales, int64_t K, const int8_t *x,
                                              const Steps *steps, float *out, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) row_i8(1, w + r * K, row_scales[r], K, x, steps, out + r, 0);
}

static __attribute__((noinline)) void tile_i8(const int8_t *w, float scale, int64_t K, const int8_t *x,
                                              const Steps *steps, float *out, int64_t stride) {
    row_i8(SOME, w, scale, K, x, steps, out, stride);
}

// Rows of weights times n inputs: out (n, rows). The sums of two neighbouring inputs are `stride` apart.
static void dots_i8(const int8_t *w, const float *row_scales, int64_t K, const int8_t *x, const Steps *steps,
                    float *out, int64_t stride, int64_t rows, int64_t n) {
    int64_t tiled = n / SOME * SOME;
    for (int64_t r = 0; r < rows && tiled; r++)
        for (int64_t t = 0; t < tiled; t += SOME)
            tile_i8(w + r * K, row_scales[r], K, x + t * K, steps + t * FOURS(K), out + t * stride + r, stride);
    for (int64_t t = tiled; t < n; t++)
        rows_i8(w, row_scales, K, x + t * K, steps + t * FOURS(K), out + t * stride, rows);
}
#else
static void dots_i8(const int8_t *w, const float *row_scales, int64_t K, const int8_t *x, const Steps *steps,
                    float *out, int64_t stride, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++, w += K)
        for (int64_t t = 0; t < n; t++) {
            const Steps *s = steps + t * FOURS(K);
            float acc[4] = {0};
            for (int64_t g = 0; g * GROUP < K; g++) {
                int64_t end = (g + 1) * GROUP < K ? (g + 1) * GROUP : K;
                int32_t sum = 0;
                for (int64_t k = g * GROUP; k < end; k++) sum += w[k] * x[t * K + k];
                acc[g % 4] += (float)sum * s[g / 4].scale[g % 4];
            }
            out[t * stride + r] = row_scales[r] * (acc[0] + acc[2] + (acc[1] + acc[3]));
        }
}
#endif

#if WIDE
// A panel holds PANEL rows of weights: the first four numbers of each row, then the next four of each row, and so on.
// A vector of a panel times four numbers of an input adds to 16 sums together. No sum across a vector is needed.
static void pack(const int8_t *w, int64_t K, __m512i *panel) {
    for (int64_t k = 0; k < K; k += CHUNK)
        for (int half = 0; half < 2; half++) {
            Bytes a[16], b[16];              // 16 groups of four numbers from each of 16 rows, transposed in four steps
            __m512i *out = panel + k / 2 + half;
            UNROLLED for (int r = 0; r < 16; r++) a[r] = weights_of(bytes(w + (16 * half + r) * K + k, K - k));
            UNROLLED for (int r = 0; r < 16; r += 2) {
                b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
                b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
            }
            UNROLLED for (int r = 0; r < 16; r += 4) UNROLLED for (int i = 0; i < 2; i++) {
                a[r + 2 * i] = _mm512_unpacklo_epi64(b[r + i], b[r + i + 2]);
                a[r + 2 * i + 1] = _mm512_unpackhi_epi64(b[r + i], b[r + i + 2]);
            }
            UNROLLED for (int c = 0; c < 4; c++) UNROLLED for (int i = 0; i < 2; i++) {
                b[c + 8 * i] = _mm512_shuffle_i32x4(a[c + 8 * i], a[c + 8 * i + 4], 0x88);
                b[c + 8 * i + 4] = _mm512_shuffle_i32x4(a[c + 8 * i], a[c + 8 * i + 4], 0xdd);
            }
            UNROLLED for (int c = 0; c < 8; c++) {
                out[2 * c] = _mm512_shuffle_i32x4(b[c], b[c + 8], 0x88);
                out[2 * c + 16] = _mm512_shuffle_i32x4(b[c], b[c + 8], 0xdd);
            }
        }
}

// Multiplies a panel with ACROSS inputs. K is a multiple of GROUP.
enum { SUMS = 2 * ACROSS };
static __attribute__((noinline)) void panel_i8(const __m512i *panel, const float *row_scales, int64_t K,
                                               const int8_t *x, const Steps *steps, float *out, int64_t stride) {
    int64_t fours = FOURS(K);
    __m512 acc[4][SUMS];                     // rows 0 to 15 and 16 to 31 with input 0, then with input 1, ...
    memset(acc, 0, sizeof acc);
    for (int64_t g = 0; g < K / GROUP; g++) {
        __m512i sums[SUMS];
        UNROLLED for (int i = 0; i < SUMS; i++)
            sums[i] = _mm512_set1_epi32(steps[i / 2 * fours + g / 4].correction[g % 4]);
        for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k += 4, panel += 2) {
            UNROLLED for (int t = 0; t < ACROSS; t++) {
                int32_t four;
                memcpy(&four, x + t * K + k, 4);
                __m512i input = _mm512_set1_epi32(four);
                UNROLLED for (int i = 0; i < 2; i++) sums[2 * t + i] = multiplied(panel[i], input, sums[2 * t + i]);
            }
        }
        UNROLLED for (int i = 0; i < SUMS; i++) {
            __m512 scale = _mm512_set1_ps(steps[i / 2 * fours + g / 4].scale[g % 4]);
            acc[g % 4][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i]), scale, acc[g % 4][i]);
        }
    }
    for (int i = 0; i < SUMS; i++) {
        __m512 sum = _mm512_add_ps(_mm512_add_ps(acc[0][i], acc[2][i]), _mm512_add_ps(acc[1][i], acc[3][i]));
        __m512 scales = _mm512_loadu_ps(row_scales + i % 2 * 16);
        _mm512_storeu_ps(out + i / 2 * stride + i % 2 * 16, _mm512_mul_ps(scales, sum));
    }
}
#endif

// Rounds an input to whole steps from -127 to 127. The largest value of a GROUP decides the size of its steps.
static void to_int8(const float *x, int64_t K, int8_t *q, Steps *steps) {
    memset(steps, 0, FOURS(K) * sizeof *steps);
    for (int64_t g = 0; g * GROUP < K; g++) {
        int64_t start = g * GROUP, end = start + GROUP < K ? start + GROUP : K;
        float largest = 0, damage = 0;       // damage: NaN if any x is not finite, because then x - x is NaN
#pragma omp simd reduction(max : largest) reduction(+ : damage)
        for (int64_t k = start; k < end; k++) {
            float size = fabsf(x[k]);
            largest = size > largest ? size : largest;
            damage += x[k] - x[k];
        }
        float factor = largest > 0 ? 127.0f / largest : 0;
        int32_t sum = 0;
        for (int64_t k = start; k < end; k++) sum += q[k] = (int8_t)rintf(x[k] * factor);
        steps[g / 4].scale[g % 4] = largest / 127.0f + damage;
        steps[g / 4].correction[g % 4] = -128 * sum;
    }
}

// ---- rows times inputs --------------------------------------------------------------------------------------

// `count` rows of weights times n inputs -> sums (n, STRIP). `panels`: the same rows, packed, or null.
static void strip_i8(const int8_t *w, const float *row_scales, int64_t K, int count, const char *panels,
                     const int8_t *q, const Steps *steps, int n, float *sums) {
    int packed = 0, across = 0;
#if WIDE
    if (panels) packed = count / PANEL * PANEL, across = n / ACROSS * ACROSS;
    for (int r = 0; r < packed; r += PANEL)
        for (int t = 0; t < across; t += ACROSS)
            panel_i8((const Bytes *)(panels + r * K), row_scales + r, K, q + t * K, steps + t * FOURS(K),
                     sums + t * STRIP + r, STRIP);
#else
    (void)panels;
#endif
    dots_i8(w + packed * K, row_scales + packed, K, q, steps, sums + packed, STRIP, count - packed, across);
    dots_i8(w, row_scales, K, q + across * K, steps + across * FOURS(K), sums + across * STRIP, STRIP, count,
            n - across);
}

// As strip_i8, for weights in float32, float16 and bfloat16.
static void strip(int dtype, const void *matrix, int64_t begin, int64_t K, int count, const float *x, int n,
                  float *sums) {
    const float *w32 = (const float *)matrix + begin * K;
    const uint16_t *w16 = (const uint16_t *)matrix + begin * K;
    int tiled = 0, even = 0;                 // numbers of inputs and rows that are computed in tiles
#if FAST
    if (K % 8 == 0) tiled = n / BROAD * BROAD, even = tiled ? count / HIGH * HIGH : 0;
    for (int r = 0; r < even; r += HIGH)
        for (int t = 0; t < tiled; t += BROAD) {
            float *out = sums + t * STRIP + r;
            if (dtype == F32) tile_f32(w32 + r * K, K, x + t * K, K, out, STRIP);
            else if (dtype == F16) tile_f16(w16 + r * K, K, x + t * K, K, out, STRIP);
            else tile_bf16(w16 + r * K, K, x + t * K, K, out, STRIP);
        }
#endif
    for (int t = 0; t < n; t++) {
        int r = t < tiled ? even : 0;
        float *out = sums + t * STRIP + r;
        if (dtype == F32) dots_f32(w32 + r * K, K, x + t * K, out, count - r);
        else if (dtype == F16) dots_f16(w16 + r * K, K, x + t * K, out, count - r);
        else dots_bf16(w16 + r * K, K, x + t * K, out, count - r);
    }
}
