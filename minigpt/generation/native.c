// One step of a language model on a CPU: n tokens in, n rows of logits out, as a list of a few simple operations.
//
// Decoding reads every weight once for each token, so the memory's bandwidth limits its speed. A framework is
// slower than this limit, because it executes some hundred small tensor operations for each token. Each of them
// costs a dispatch and an allocation, and wakes threads. Here one call executes all operations, and the
// threads stay awake from the first operation to the last.
//
// This file knows no model. `native.py` builds the list of operations from a model's modules. Tests compare the
// results with these slower modules.
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
#include "products.h"

enum { EMBED, PRODUCT, ATTENTION };          // kinds of operations
enum { NO_NORM, LAYER_NORM, RMS_NORM };      // the norm before a product
enum { NO_ACT, GELU_TANH, GELU_EXACT, SWIGLU };  // the activation after a product
enum { BLOCK = 64 };                         // number of inputs that are multiplied together with a STRIP of weights
enum { TOGETHER = 8 };                       // number of queries that read the same keys together

typedef struct {
    int32_t kind, dtype, norm, act;
    int32_t add, wait, wanted;               // flags: add to out; wait at the end; compute wanted tokens only
    int32_t n_out, n_in, stride;             // N, K; distance between the outputs of two tokens
    int32_t heads, kv_heads, head_dim;       // H, G, D
    float eps;
    const void *weight;                      // (N, K); EMBED: the table of token vectors
    const float *scale;                      // (N,), only for I8: a scale for each row of weights
    const void *values;                      // SWIGLU: the matrix of the gated values, (N, K); `weight` gives the gates
    const float *value_scale;
    const float *bias;                       // (N,) or null
    const float *norm_weight, *norm_bias;    // (K,); bias null for RMS_NORM
    const float *in;                         // (n, width of in)
    float *out;                              // (n, width of out)
    const float *positions;                  // EMBED: the table of positions or null. ATTENTION: cos and sin or null
    const float *q_norm, *k_norm;            // weights of the RMSNorm of queries and keys, (D,), or null
    float *cached_keys, *cached_values;      // this layer's cache, (slots, G, columns, D)
} Operation;

typedef struct {                             // one token of the call
    int64_t id;
    int32_t slot, column;                    // slot of the cache; column in the slot, which is the token's position
    int32_t wanted;                          // 1: the token's logits are needed
} Token;

// exp(x), exact to 2 units in the last place, written so that compilers use vector instructions. It is 2^whole times
// a polynomial of the rest, |rest| <= ln(2) / 2. x is clipped to -87 ... 88; NaN stays NaN.
static inline float exponential(float x) {
    float clipped = x > 88.0f ? 88.0f : x;
    clipped = clipped < -87.0f ? -87.0f : clipped;
    float whole = floorf(clipped * 1.44269504f + 0.5f);
    float rest = clipped - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 = a short exact part + a small part
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

// ---- norms and activations ---------------------------------------------------------------------------------

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

// Finishes a row of sums: out = activation(sums + bias), or out += activation(sums + bias).
static void finish(const Operation *op, int64_t begin, int count, const float *sums, const float *values,
                   float *out) {
    float y[STRIP];
    for (int r = 0; r < count; r++) y[r] = sums[r] + (op->bias ? op->bias[begin + r] : 0);
    switch (op->act) {
    case GELU_TANH:                          // tanh from exp: 0.5 (1 + tanh u) = 1 / (1 + exp(-2u))
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

// Threads take pieces of a phase until none is left. Then they wait for unfinished pieces, not for other threads. So
// a thread that the system has put to sleep delays the others only if it sleeps inside a piece.
typedef struct {
    atomic_int taken, done;
} Phase;

enum { AT_ONCE = 4 };                        // number of phases that may run without waiting for each other

typedef struct {
    Phase *phases;                           // all phases of the call; every thread goes through them in order
    int at, waited, threads;                 // the phase of this thread; phases before `waited` are done
    int pieces[AT_ONCE];                     // numbers of pieces of the phases from `waited` on
} Worker;

// Starts a phase over 0 ... count. The phase has a few pieces for each thread, but no piece is smaller than `least`.
static void begin_phase(Worker *me, int64_t count, int64_t least) {
    int64_t pieces = count / least, most = 4 * (int64_t)me->threads;
    if (pieces > most) pieces = most;
    me->pieces[me->at - me->waited] = me->threads == 1 || pieces < 1 ? 1 : (int)pieces;
}

// Takes the next free piece, cut at multiples of `unit`. Returns 0 if all pieces are taken.
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

// With up to FEW tokens, every thread prepares the whole input for itself, because waiting for another thread would
// cost more. With more tokens, the threads share this work.
enum { FEW = 4 };

typedef struct {                             // scratch memory of a thread
    Phase *phases;
    float *x;                                // (n, K): the input of a product
    int8_t *q;                               // (n, K): the input as int8
    Steps *steps;                            // (n, FOURS(K)): the scales of q
    float *scores;                           // (TOGETHER, columns)
    char *panels;                        // two packed STRIPs of K bytes per row
} Workspace;

// Places the workspace of thread `number` in memory that is aligned at 64 bytes. Returns the number of bytes that all
// threads need.
static int64_t workspace(Workspace *mine, void *memory, int count, int n, int64_t columns, int64_t widest, int threads,
                         int number) {
    enum { PARTS = 6 };
    int64_t fours = FOURS(widest), own = n <= FEW, copies = own ? threads : 1, total = 0;
    int64_t sizes[PARTS] = {2 * count * sizeof(Phase), n * widest * sizeof(float), n * widest,
                            n * fours * sizeof(Steps), TOGETHER * columns * sizeof(float),
                            n < MANY ? 0 : 2 * STRIP * widest};
    int64_t times[PARTS] = {1, copies, copies, copies, threads, threads};
    void *parts[PARTS];
    for (int i = 0; i < PARTS; i++) {
        int64_t size = (sizes[i] + 63) / 64 * 64;
        parts[i] = (char *)memory + total + (times[i] == threads ? number * size : 0);
        total += times[i] * size;
    }
    *mine = (Workspace){parts[0], parts[1], parts[2], parts[3], parts[4], parts[5]};
    return total;
}

static void prepare_input(const Operation *op, const Token *tokens, int64_t begin, int64_t end,
                          const Workspace *mine) {
    int64_t K = op->n_in, fours = FOURS(K);
    int place = 0;                           // row of x: the last product leaves out tokens without wanted logits
    for (int64_t t = 0; t < end; t++) {
        int64_t to = op->wanted ? place : t;
        if (op->wanted && !tokens[t].wanted) continue;
        place++;
        if (t < begin) continue;
        normed(op, op->in + t * K, mine->x + to * K);
        if (op->dtype == I8) to_int8(mine->x + to * K, K, mine->q + to * K, mine->steps + to * fours);
    }
}

// Multiplies rows begin ... end of the weights with all inputs.
static void multiply(const Operation *op, int n, int64_t begin, int64_t end, const Workspace *mine) {
    const void *matrices[2] = {op->weight, op->values};
    const float *scales[2] = {op->scale, op->value_scale};
    int64_t K = op->n_in;
    int sides = op->act == SWIGLU ? 2 : 1;
    float sums[2][BLOCK * STRIP];
    for (int64_t i = begin; i < end; i += STRIP) {
        int rows = end - i < STRIP ? (int)(end - i) : STRIP;
        char *panels[2] = {0};
#if WIDE
        if (op->dtype == I8 && n >= MANY && K % GROUP == 0)
            for (int side = 0; side < sides; side++) {
                panels[side] = mine->panels + side * STRIP * K;
                for (int r = 0; r + PANEL <= rows; r += PANEL)
                    pack((const int8_t *)matrices[side] + (i + r) * K, K, (Bytes *)(panels[side] + r * K));
            }
#endif
        for (int t = 0; t < n; t += BLOCK) {
            int inputs = n - t < BLOCK ? n - t : BLOCK;
            for (int side = 0; side < sides; side++)
                if (op->dtype == I8)
                    strip_i8((const int8_t *)matrices[side] + i * K, scales[side] + i, K, rows, panels[side],
                             mine->q + t * K, mine->steps + t * FOURS(K), inputs, sums[side]);
                else strip(op->dtype, matrices[side], i, K, rows, mine->x + t * K, inputs, sums[side]);
            for (int j = 0; j < inputs; j++)
                finish(op, i, rows, sums[0] + j * STRIP, sums[1] + j * STRIP,
                       op->out + (int64_t)(t + j) * op->stride + i);
        }
    }
}

static void product(const Operation *op, const Token *tokens, int n, Worker *me, const Workspace *mine) {
    int64_t begin, end;
    int shared = n > FEW, ready = shared, rows = n;
    if (op->wanted)
        for (int t = 0; t < n; t++) rows -= !tokens[t].wanted;
    if (shared) {
        for (begin_phase(me, n, 4); take(me, n, 1, &begin, &end); finished(me))
            prepare_input(op, tokens, begin, end, mine);
        end_phase(me, 1);
    }
    for (begin_phase(me, op->n_out, 16); take(me, op->n_out, 4, &begin, &end); finished(me)) {
        if (!ready) prepare_input(op, tokens, 0, n, mine);
        ready = 1;
        multiply(op, rows, begin, end, mine);
    }
    end_phase(me, op->wait || shared);
}

// ---- embedding and attention -------------------------------------------------------------------------------

static void embed(const Operation *op, const Token *tokens, int64_t begin, int64_t end) {
    int64_t C = op->n_out;
    for (int64_t t = begin; t < end; t++) {
        float *out = op->out + t * C;
        const uint16_t *narrow = (const uint16_t *)op->weight + tokens[t].id * C;
        if (op->dtype == F32) memcpy(out, (const float *)op->weight + tokens[t].id * C, C * sizeof(float));
        else if (op->dtype == F16)
            for (int64_t c = 0; c < C; c++) out[c] = half_to_float(narrow[c]);
        else
            for (int64_t c = 0; c < C; c++) out[c] = brain_to_float(narrow[c]);
        if (op->positions)
            for (int64_t c = 0; c < C; c++) out[c] += op->positions[(int64_t)tokens[t].column * C + c];
    }
}

// Applies RMSNorm and rotation to one head of a query or key, if the model has them.
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

// Writes keys and values into the cache; prepares queries in place. in: n rows of H query, G key and G value heads.
static void remember(const Operation *op, const Token *tokens, int64_t begin, int64_t end, int64_t columns) {
    int H = op->heads, G = op->kv_heads, D = op->head_dim;
    int64_t width = (int64_t)(H + 2 * G) * D;
    for (int64_t task = begin; task < end; task++) {
        int head = (int)(task % (H + 2 * G));
        const Token *t = tokens + task / (H + 2 * G);
        float *x = (float *)op->in + (t - tokens) * width + (int64_t)head * D;
        if (head < H) prepare_head(op, op->q_norm, t->column, x, x);
        else if (head < H + G)
            prepare_head(op, op->k_norm, t->column, x, cached(op, op->cached_keys, columns, t, head - H, t->column));
        else memcpy(cached(op, op->cached_values, columns, t, head - H - G, t->column), x, D * sizeof(float));
    }
}

// For each of T queries: out (D,) += the sum of weights[s] * rows[s] over s = begin ... end; rows (S, D). The sums stay
// in registers from the first row to the last.
static inline __attribute__((always_inline)) void mix(int T, float *const *weights, const float *rows, int64_t begin,
                                                      int64_t end, int64_t D, float *const *out) {
    int64_t d = 0;
#if FAST
    for (; d + 32 <= D; d += 32) {
        __m256 sums[2][4];
        UNROLLED for (int t = 0; t < T; t++)
            UNROLLED for (int i = 0; i < 4; i++) sums[t][i] = _mm256_loadu_ps(out[t] + d + 8 * i);
        for (int64_t s = begin; s < end; s++) {
            __m256 values[4];
            UNROLLED for (int i = 0; i < 4; i++) {
                values[i] = _mm256_loadu_ps(rows + s * D + d + 8 * i);
                IN_REGISTER(values[i]);
            }
            UNROLLED for (int t = 0; t < T; t++) {
                __m256 weight = _mm256_set1_ps(weights[t][s]);
                UNROLLED for (int i = 0; i < 4; i++) sums[t][i] = _mm256_fmadd_ps(weight, values[i], sums[t][i]);
            }
        }
        UNROLLED for (int t = 0; t < T; t++)
            UNROLLED for (int i = 0; i < 4; i++) _mm256_storeu_ps(out[t] + d + 8 * i, sums[t][i]);
    }
#endif
    for (int t = 0; t < T; t++)
        for (int64_t s = begin; s < end; s++)
            for (int64_t c = d; c < D; c++) out[t][c] += weights[t][s] * rows[s * D + c];
}

// Returns the highest of n numbers, or -infinity for n = 0. NaN is skipped. (OpenMP's reduction starts at -infinity or
// at the lowest finite number, depending on the compiler. So it is not used.)
static float highest_of(const float *x, int64_t n) {
    float highest[2 * LANES];
    int64_t i = 0;
    for (int j = 0; j < 2 * LANES; j++) highest[j] = -INFINITY;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int j = 0; j < 2 * LANES; j++) highest[j] = x[i + j] > highest[j] ? x[i + j] : highest[j];
    for (; i < n; i++) highest[0] = x[i] > highest[0] ? x[i] : highest[0];
    for (int j = 1; j < 2 * LANES; j++) highest[0] = highest[j] > highest[0] ? highest[j] : highest[0];
    return highest[0];
}

// Turns the scores (S,) of a query into weights whose sum is 1.
static void softmax(float *scores, int64_t S, float factor) {
    for (int64_t s = 0; s < S; s++) scores[s] *= factor;
    float largest = highest_of(scores, S), sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t s = 0; s < S; s++) sum += scores[s] = exponential(scores[s] - largest);
    for (int64_t s = 0; s < S; s++) scores[s] /= sum;
}

typedef struct {                             // one head of one token
    const float *q, *k, *v;                  // (D,), (S, D), (S, D)
    float *out;                              // (D,)
    int64_t S;
} Query;

static Query query(const Operation *op, const Token *tokens, int n, int64_t task, int64_t columns) {
    int H = op->heads, G = op->kv_heads, D = op->head_dim, head = (int)(task / n), g = head / (H / G);
    const Token *t = tokens + task % n;      // tasks go head by head, so that a head's keys and values stay in cache
    return (Query){op->in + (t - tokens) * (int64_t)(H + 2 * G) * D + (int64_t)head * D,
                   cached(op, op->cached_keys, columns, t, g, 0),
                   cached(op, op->cached_values, columns, t, g, 0),
                   op->out + (t - tokens) * (int64_t)H * D + (int64_t)head * D, t->column + 1};
}

// Up to TOGETHER queries with the same keys are computed together, in pairs. The keys are read in pieces that fit the
// core's first-level cache, so that all pairs use what was loaded once.
static void attend(const Operation *op, const Token *tokens, int n, int64_t begin, int64_t end, int64_t columns,
                   float *scores) {
    int64_t D = op->head_dim;
    float factor = 1.0f / sqrtf((float)D), *weights[TOGETHER], *out[TOGETHER];
    Query of[TOGETHER];
    for (int64_t task = begin; task < end;) {
        int64_t shared = columns, count = 0;
        for (; count < TOGETHER && task < end; count++, task++) {
            of[count] = query(op, tokens, n, task, columns);
            if (of[count].k != of[0].k) break;
            weights[count] = scores + count * columns;
            out[count] = memset(of[count].out, 0, D * sizeof(float));
            if (of[count].S < shared) shared = of[count].S;
        }
        int64_t paired = count / 2 * 2, keys = 0;
#if FAST
        keys = 4096 / D / HIGH * HIGH;       // number of keys in 16 KiB
#endif
        shared = keys && paired && D % 8 == 0 ? shared / keys * keys : 0;
#if FAST
        for (int64_t s = 0; s < shared; s += keys)
            for (int i = 0; i < paired; i += 2)
                for (int64_t k = s; k < s + keys; k += HIGH)
                    tile_f32(of[i].k + k * D, D, of[i].q, of[i + 1].q - of[i].q, weights[i] + k, columns);
#endif
        for (int i = 0; i < count; i++) {
            int64_t done = i < paired ? shared : 0;
            dots_f32(of[i].k + done * D, D, of[i].q, weights[i] + done, of[i].S - done);
            softmax(weights[i], of[i].S, factor);
        }
        for (int64_t s = 0; s < shared; s += keys)
            for (int i = 0; i < paired; i += 2)
                mix(2, weights + i, of[i].v, s, s + keys, D, out + i);
        for (int i = 0; i < count; i++) {
            int64_t done = i < paired ? shared : 0;
            mix(1, weights + i, of[i].v, done, of[i].S, D, out + i);
        }
    }
}

// ---- the step ----------------------------------------------------------------------------------------------

// Returns the number of bytes of scratch memory, aligned at 64, that a step needs.
int64_t minigpt_scratch(int count, int n, int64_t columns, int64_t widest, int threads) {
    Workspace mine;
    return workspace(&mine, 0, count, n, columns, widest, threads, 0);
}

void minigpt_step(const Operation *operations, int count, const Token *tokens, int n, int64_t columns,
                  int64_t widest, int threads, void *scratch) {
    memset(scratch, 0, 2 * count * sizeof(Phase));
#pragma omp parallel num_threads(threads)
    {
        int64_t begin, end;
        Workspace mine;
        workspace(&mine, scratch, count, n, columns, widest, threads, omp_get_thread_num());
        Worker me = {.phases = mine.phases, .threads = threads};
        for (int i = 0; i < count; i++) {
            const Operation *op = operations + i;
            int64_t heads = (int64_t)n * (op->heads + 2 * op->kv_heads), queries = (int64_t)n * op->heads;
            if (op->kind == PRODUCT) product(op, tokens, n, &me, &mine);
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
                    attend(op, tokens, n, begin, end, columns, mine.scores);
                end_phase(&me, 1);
            }
        }
    }
}

// ---- after the step ----------------------------------------------------------------------------------------

enum { GLANCE = 512 };

// Finds the highest number of each row of scores (rows, V): its index, the first of several, and its value. The value
// is NaN if the row has a NaN.
void minigpt_argmax(const float *scores, int rows, int64_t V, int64_t *places, float *highest) {
    for (int r = 0; r < rows; r++) {
        const float *row = scores + r * V;
        int64_t place = 0;
        float largest = -INFINITY;
        int odd = 0;
        for (int64_t i = 0; i < V; i += GLANCE) {
            int64_t end = V - i < GLANCE ? V : i + GLANCE;
            float here = highest_of(row + i, end - i);
#pragma omp simd reduction(| : odd)
            for (int64_t v = i; v < end; v++) odd |= row[v] != row[v];
            if (here > largest) largest = here, place = i;
        }
        while (place < V - 1 && row[place] != largest) place++;
        places[r] = place;
        highest[r] = odd ? NAN : largest;
    }
}
