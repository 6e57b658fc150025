/* Generation's costly operations on a CPU. `cpu.py` compiles this file for the machine it runs on and says what each
 * function takes. A row's result depends on that row alone, never on how many rows stand beside it.
 *
 * Products take weights in panels [N / 32][K][32] of units, in fp32 or in int8. A unit is 4 bytes: one float, or 4 codes
 * of one row and column. int8 products are those of gemmlowp-style dynamic quantisation: weights int8 with a scale per
 * output, stored as w + 128 (the instruction multiplies unsigned by signed), activations int8 with a scale per row, sums
 * in int32.
 */
#include <malloc.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
static int omp_get_max_threads(void) { return 1; }
static void omp_set_num_threads(int count) { (void)count; }
#endif

#define LANES 16
#define PANEL 32
#define TILE 14
#define PAIR 2              /* units of a turn of the innermost loop: rows are padded to a multiple */
#define DEPTH 512           /* units of a row that lie together */
#define STRIDE (DEPTH + 16) /* from row to row: a power of two would put all rows of a tile into the same few cache lines */
#define PASS (2 * DEPTH)    /* units of a row that one pass over the panels takes */
#define HELD 140            /* rows whose units of one pass stay in the second cache while the panels pass */
#define GROUP 32            /* panels whose sums are kept from pass to pass */
#define SMALL 256           /* rows up to which the threads share the panels, above it the rows */
#define CHUNK 64            /* panels whose exponentials are summed together, whatever the number of threads */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define BOTH(c, a, b) ((vec)(((ivec)(a) & (c)) | ((ivec)(b) & ~(c)))) /* c ? a : b, lane by lane */
#define ALL(x) ((vec){0} + (x))

enum { NONE, RELU, GELU, GELU_TANH, SILU };

/* exp to about 2 units in the last place; below -87 it is 0 (Cephes' polynomial). */
static inline vec exp_(vec x) {
    ivec tiny = x < ALL(-87.0f);
    x = BOTH(x > ALL(88.0f), ALL(88.0f), BOTH(tiny, ALL(-87.0f), x));
    vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = ALL(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return BOTH(tiny, ALL(0.0f), p * (vec)power);
}

/* The error function within 1.5e-7 (Abramowitz and Stegun 7.1.26). */
static inline vec erf_(vec x) {
    ivec negative = x < ALL(0.0f);
    vec a = BOTH(negative, -x, x);
    vec t = 1.0f / (1.0f + 0.3275911f * a);
    vec p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    vec y = 1.0f - p * exp_(-a * a);
    return BOTH(negative, -y, y);
}

static inline vec activated(vec x, int activation) {
    switch (activation) {
    case RELU: return BOTH(x < ALL(0.0f), ALL(0.0f), x);
    case GELU: return 0.5f * x * (1.0f + erf_(x * 0.70710678f));
    case GELU_TANH: { /* 0.5 (1 + tanh u) is the logistic function of 2 u */
        vec u = 0.79788456f * (x + 0.044715f * x * x * x);
        return x / (1.0f + exp_(-2.0f * u));
    }
    case SILU: return x / (1.0f + exp_(-x));
    default: return x;
    }
}

static inline vec some(const float *x, int count) { /* the first `count` floats, then zeros */
    if (count >= LANES) return *(const vec *)x;
    vec y = ALL(0.0f);
    if (count > 0) memcpy(&y, x, 4 * count);
    return y;
}

static inline float sum(vec x) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
}

static inline float largest(vec x) {
    float best = x[0];
    for (int lane = 1; lane < LANES; lane++) best = x[lane] > best ? x[lane] : best;
    return best;
}

/* Memory of this thread that is used again by its next call. */
static void *scratch(int which, size_t size) {
    static __thread struct { void *at; size_t size; } held[4];
    if (held[which].size < size) {
        free(held[which].at);
        held[which].size = (size + 4095) / 4096 * 4096;
        held[which].at = aligned_alloc(64, held[which].size);
        if (!held[which].at) abort();
    }
    return held[which].at;
}

/* Freed memory stays with the process. By default the large buffers of each layer go back to the system and come anew,
 * one page fault per 4 KiB. */
int keep_memory(void) { return mallopt(M_MMAP_THRESHOLD, 1 << 30) && mallopt(M_TRIM_THRESHOLD, 1 << 30); }

/* Of the calling thread alone. */
void use_threads(int count) { omp_set_num_threads(count); }

int has_float(void) {
#ifdef __AVX512F__
    return 1;
#else
    return 0;
#endif
}

int has_int8(void) {
#ifdef __AVX512VNNI__
    return 1;
#else
    return 0;
#endif
}

#ifdef __AVX512F__
#include <immintrin.h>

typedef struct {
    const int32_t *panels;
    const float *scales; /* [outputs] of int8 weights; null: fp32 */
    const float *bias;   /* [outputs] or null */
    int width, outputs, activation;
} Linear;

/* Rows as the tiles read them: units [blocks of DEPTH][rows][STRIDE]; of int8 each row's scale and 128 times its sum,
 * which the weights' offset adds. */
typedef struct { int32_t *units; float *scales; int32_t *offsets; long rows; } Rows;

static int units_of(const Linear *l) {
    int each = PAIR * (l->scales ? 4 : 1);
    return (l->width + each - 1) / each * PAIR;
}

/* A row to codes = round(127 x / max |x|). */
static void quantise(const float *x, int width, int depth, const Rows *to, long row) {
    vec top = ALL(0.0f);
    ivec bad = {0};
    for (int i = 0; i < width; i += LANES) {
        vec v = some(x + i, width - i), a = BOTH(v < ALL(0.0f), -v, v);
        top = BOTH(a > top, a, top);
        bad |= v != v;
    }
    float most = largest(top);
    for (int lane = 0; lane < LANES; lane++) if (bad[lane]) most = NAN;
    float inverse = most > 0 && most < INFINITY ? 127.0f / most : 0.0f;
    __m512i added = _mm512_setzero_si512();
    for (int i = 0; i < depth; i += LANES) {
        __m512i q = _mm512_cvtps_epi32((__m512)(some(x + i, width - i) * inverse));
        added = _mm512_add_epi32(added, q);
        int8_t *codes = (int8_t *)(to->units + (i / (4 * DEPTH) * to->rows + row) * STRIDE) + i % (4 * DEPTH);
        _mm512_mask_cvtsepi32_storeu_epi8(codes, depth - i < LANES ? (1 << (depth - i)) - 1 : 0xffff, q);
    }
    to->scales[row] = most < INFINITY ? most / 127.0f : NAN; /* a NaN or an infinity stays visible */
    to->offsets[row] = 128 * _mm512_reduce_add_epi32(added);
}

static void take(const Linear *l, const float *x, const Rows *to, long row) {
    if (l->scales) {
        quantise(x, l->width, 4 * units_of(l), to, row);
        return;
    }
    for (int i = 0; i < l->width; i += DEPTH) {
        int count = l->width - i < DEPTH ? l->width - i : DEPTH;
        int32_t *units = to->units + (i / DEPTH * to->rows + row) * STRIDE;
        memcpy(units, x + i, 4 * count);
        units[count] = 0; /* the last of an odd width; there is room */
    }
}

static long row_units_of(const Linear *l) { return (units_of(l) + DEPTH - 1) / DEPTH * STRIDE; }

/* How many of `rows` go through the panels together: as many in each turn. */
static long rows_held(const Linear *l, long rows) {
    long most = units_of(l) > DEPTH ? HELD : SMALL, turns = (rows + most - 1) / most;
    return turns ? (rows + turns - 1) / turns : 1;
}

static Rows rows_at(char *memory, long row_units, long count) {
    float *scales = (float *)(memory + 4 * row_units * count);
    return (Rows){(int32_t *)memory, scales, (int32_t *)(scales + count), count};
}

static void take_share(const Linear *l, const float *x, long x_stride, const Rows *to, int thread, int threads) {
    for (long r = to->rows * thread / threads; r < to->rows * (thread + 1) / threads; r++) take(l, x + r * x_stride, to, r);
}

/* sums += weights x one unit of a row. One line of assembly: gcc 12 puts the sums of an intrinsic on the stack. */
#define FLOAT(sums, weights, unit) __asm__("vfmadd231ps %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(unit))
#define INT8(sums, weights, unit) __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(unit))

/* The sums of some rows over one block and one panel. On the way it fetches `ahead` into the second cache: what of the
 * weights comes after. */
#define TILE_OF(ADD)                                                                                                     \
    static inline __attribute__((always_inline)) void tile_##ADD(                                                        \
        const int rows, const int32_t *x, const int32_t *weights, int depth, int first, long ahead, long step, __m512i *sums) { \
        __m512i left[TILE], right[TILE];                                                                                 \
        _Pragma("GCC unroll 14") for (int r = 0; r < rows; r++) {                                                        \
            left[r] = first ? _mm512_setzero_si512() : sums[2 * r];                                                      \
            right[r] = first ? _mm512_setzero_si512() : sums[2 * r + 1];                                                 \
        }                                                                                                                \
        const char *next = (const char *)(weights + (long)depth * PANEL) + ahead;                                        \
        for (int k = 0; k < depth; k += PAIR)                                                                            \
            _Pragma("GCC unroll 2") for (int j = 0; j < PAIR; j++, x++, weights += PANEL, next += step) {                \
                __m512i a = _mm512_loadu_si512(weights), b = _mm512_loadu_si512(weights + LANES);                        \
                _mm_prefetch(next, _MM_HINT_T1);                                                                         \
                _Pragma("GCC unroll 14") for (int r = 0; r < rows; r++) {                                                \
                    __m512i unit = _mm512_set1_epi32(x[r * STRIDE]);                                                     \
                    ADD(left[r], a, unit);                                                                               \
                    ADD(right[r], b, unit);                                                                              \
                }                                                                                                        \
            }                                                                                                            \
        _Pragma("GCC unroll 14") for (int r = 0; r < rows; r++) sums[2 * r] = left[r], sums[2 * r + 1] = right[r];       \
    }

#define CASE(ADD, n) case n: tile_##ADD(n, x, weights, depth, first, ahead, step, sums); break;
#define CASES(ADD)                                                                                                       \
    switch (rows) {                                                                                                      \
        CASE(ADD, 1) CASE(ADD, 2) CASE(ADD, 3) CASE(ADD, 4) CASE(ADD, 5) CASE(ADD, 6) CASE(ADD, 7)                       \
        CASE(ADD, 8) CASE(ADD, 9) CASE(ADD, 10) CASE(ADD, 11) CASE(ADD, 12) CASE(ADD, 13) CASE(ADD, 14)                  \
    }

TILE_OF(FLOAT)
#ifdef __AVX512VNNI__
TILE_OF(INT8)
#endif

static void tile(
    int int8, int rows, const int32_t *x, const int32_t *weights, int depth, int first, long ahead, long step, __m512i *sums) {
#ifdef __AVX512VNNI__
    if (int8) {
        CASES(INT8)
        return;
    }
#endif
    CASES(FLOAT)
}

/* 16 columns of the product: their scales, biases and which of them there are. */
typedef struct { vec scales, bias; __mmask16 mask; } Columns;

static inline Columns columns(const Linear *l, int at) {
    int count = l->outputs - at;
    Columns c = {{0}, {0}, count >= LANES ? 0xffff : count > 0 ? (__mmask16)((1 << count) - 1) : 0};
    if (l->scales) c.scales = (vec)_mm512_maskz_loadu_ps(c.mask, l->scales + at);
    if (l->bias) c.bias = (vec)_mm512_maskz_loadu_ps(c.mask, l->bias + at);
    return c;
}

static inline vec finished(const Linear *l, const Rows *x, long r, __m512i sums, const Columns *c) {
    vec y = (vec)sums;
    if (l->scales)
        y = (vec)_mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_set1_epi32(x->offsets[r]))) * (x->scales[r] * c->scales);
    return activated(y + c->bias, l->activation);
}

static void finish(const Linear *l, const Rows *x, int from, const __m512i *sums, float *out) {
    for (int half = 0; half < 2; half++) {
        int at = from + half * LANES;
        Columns c = columns(l, at);
        if (!c.mask) return;
        for (long r = 0; r < x->rows; r++)
            _mm512_mask_storeu_ps(out + r * l->outputs + at, c.mask, (__m512)finished(l, x, r, sums[2 * r + half], &c));
    }
}

/* What is kept of a row in place of its outputs: the `count` greatest, greatest first, of equals the first, and where
 * `tops` is not null the greatest of each chunk and the sum of exp(output - that), [chunks][all rows]. */
typedef struct { float *values; int64_t *tokens; float *tops, *totals; int count; long rows; } Best;

static inline void insert(const Best *b, long row, float value, int64_t token) {
    float *values = b->values + row * b->count;
    int64_t *tokens = b->tokens + row * b->count;
    int at = b->count - 1;
    if (!(value > values[at])) return;
    for (; at > 0 && value > values[at - 1]; at--) values[at] = values[at - 1], tokens[at] = tokens[at - 1];
    values[at] = value, tokens[at] = token;
}

static void choose(const Linear *l, const Rows *x, int panel, const __m512i *sums, const Best *b, vec *totals) {
    Columns c[2] = {columns(l, panel * PANEL), columns(l, panel * PANEL + LANES)};
    float *tops = b->tops ? b->tops + panel / CHUNK * b->rows : 0;
    for (long r = 0; r < x->rows; r++) {
        __m512 y[2], least = _mm512_set1_ps(b->values[(r + 1) * b->count - 1]);
        for (int half = 0; half < 2; half++) {
            y[half] = (__m512)finished(l, x, r, sums[2 * r + half], c + half);
            __mmask16 bad = _mm512_cmp_ps_mask(y[half], y[half], _CMP_UNORD_Q); /* stays visible, as infinity */
            y[half] = _mm512_mask_blend_ps(bad, y[half], _mm512_set1_ps(INFINITY));
            y[half] = _mm512_mask_blend_ps(c[half].mask, _mm512_set1_ps(-INFINITY), y[half]);
            for (unsigned above = _mm512_cmp_ps_mask(y[half], least, _CMP_GT_OQ); above; above &= above - 1) {
                int lane = __builtin_ctz(above);
                insert(b, r, ((vec)y[half])[lane], panel * PANEL + half * LANES + lane);
            }
        }
        if (!tops) continue;
        float top = _mm512_reduce_max_ps(_mm512_max_ps(y[0], y[1]));
        if (panel % CHUNK == 0) tops[r] = -INFINITY, totals[r] = ALL(0.0f);
        if (top > tops[r]) {
            totals[r] *= exp_(ALL(tops[r] - top));
            tops[r] = top;
        }
        float base = tops[r] > -INFINITY ? tops[r] : 0.0f;
        totals[r] += exp_((vec)y[0] - base) + exp_((vec)y[1] - base);
    }
    if (tops && (panel % CHUNK == CHUNK - 1 || (panel + 1) * PANEL >= l->outputs))
        for (long r = 0; r < x->rows; r++) b->totals[panel / CHUNK * b->rows + r] = sum(totals[r]);
}

/* All rows of x through some panels, to `out` of these rows or to what is best of them. Rows wider than a pass go
 * through a group of panels pass by pass, so that no weight is read again for every few rows. */
static void panels(const Linear *l, const Rows *x, int first, int end, float *out, const Best *best) {
    int units = units_of(l), tiles = (x->rows + TILE - 1) / TILE, group = units > PASS ? GROUP : 1;
    __m512i *kept = scratch(1, 2 * sizeof(__m512i) * x->rows * group);
    vec *totals = scratch(2, sizeof(vec) * x->rows);
    long step = (4 * PANEL + tiles - 1) / tiles;
    for (; first < end; first += group) {
        int last = first + group < end ? first + group : end;
        for (int pass = 0; pass < units; pass += PASS) {
            int stop = pass + PASS < units ? pass + PASS : units;
            for (int p = first; p < last; p++) {
                __m512i *sums = kept + 2 * x->rows * (p - first);
                for (int k = pass; k < stop; k += DEPTH) {
                    int depth = stop - k < DEPTH ? stop - k : DEPTH;
                    const int32_t *weights = l->panels + ((long)p * units + k) * PANEL;
                    /* From the end of these weights to the next ones, which in between two passes are elsewhere. */
                    long ahead = k + depth < stop || p + 1 == last ? 0 : 4L * PANEL * (units - stop + pass);
                    for (int t = 0; t < tiles; t++) {
                        long from = x->rows * t / tiles, to = x->rows * (t + 1) / tiles;
                        const int32_t *rows = x->units + (k / DEPTH * x->rows + from) * STRIDE;
                        for (long r = from; r < to && !k && out; r++) { /* `finish` would wait for these lines */
                            float *place = out + r * l->outputs + p * PANEL;
                            for (int i = 0; i <= PANEL; i += LANES) __builtin_prefetch(place + i, 1);
                        }
                        tile(l->scales != 0, to - from, rows, weights, depth, k == 0, ahead + t * step * depth, step,
                             sums + 2 * from);
                    }
                }
                if (stop < units) continue;
                if (out) finish(l, x, p * PANEL, sums, out);
                else choose(l, x, p, sums, best, totals);
            }
        }
    }
}

/* out[rows, outputs] = activation(x[rows, width] W + bias); x has `x_stride` floats from row to row. */
void linear(const Linear *l, const float *x, long x_stride, long rows, float *out) {
    int panel_count = (l->outputs + PANEL - 1) / PANEL;
    long row_units = row_units_of(l), size = 4 * row_units + 8;
    char *shared = rows <= SMALL ? scratch(0, size * rows_held(l, rows) + 64) : 0;
#pragma omp parallel
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        long from = shared ? 0 : rows * thread / threads, to = shared ? rows : rows * (thread + 1) / threads;
        long most = rows_held(l, to - from);
        char *memory = shared ? shared : scratch(0, size * most + 64);
        for (; from < to; from += most) {
            Rows q = rows_at(memory, row_units, to - from < most ? to - from : most);
            take_share(l, x + from * x_stride, x_stride, &q, shared ? thread : 0, shared ? threads : 1);
            if (!shared) {
                panels(l, &q, 0, panel_count, out + from * l->outputs, 0);
                continue;
            }
#pragma omp barrier
            int first = (long)panel_count * thread / threads, last = (long)panel_count * (thread + 1) / threads;
            panels(l, &q, first, last, out + from * l->outputs, 0);
#pragma omp barrier
        }
    }
}

/* The `count` greatest outputs of each row, [rows, count], greatest first, of equals the first; a NaN counts as
 * infinity. `normaliser` [rows], or null: the logarithm of the sum of all exponentials. */
void linear_best(
    const Linear *l, const float *x, long x_stride, long rows, int count, float *values, int64_t *tokens, float *normaliser) {
    int panel_count = (l->outputs + PANEL - 1) / PANEL, chunks = (panel_count + CHUNK - 1) / CHUNK;
    long row_units = row_units_of(l), most = rows_held(l, rows);
    char *memory = scratch(0, most * (4 * row_units + 8) + 64);
    int lists = omp_get_max_threads();
    size_t list = (12L * count * most + 63) / 64 * 64;
    char *kept = scratch(3, lists * list + 8L * chunks * most);
    float *tops = (float *)(kept + lists * list);
#pragma omp parallel
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        for (long from = 0; from < rows; from += most) {
            Rows q = rows_at(memory, row_units, rows - from < most ? rows - from : most);
            take_share(l, x + from * x_stride, x_stride, &q, thread, threads);
            int64_t *own = (int64_t *)(kept + thread * list);
            Best b = {(float *)(own + count * q.rows), own, normaliser ? tops : 0, tops + chunks * q.rows, count, q.rows};
            for (long i = 0; i < count * q.rows; i++) b.values[i] = -INFINITY, b.tokens[i] = 0;
#pragma omp barrier
            int first = chunks * thread / threads * CHUNK, last = chunks * (thread + 1) / threads * CHUNK;
            panels(l, &q, first, last < panel_count ? last : panel_count, 0, &b);
#pragma omp barrier
            Best all = {values + from * count, tokens + from * count, 0, 0, count, q.rows};
            for (long r = q.rows * thread / threads; r < q.rows * (thread + 1) / threads; r++) {
                for (int i = 0; i < count; i++) all.values[r * count + i] = -INFINITY, all.tokens[r * count + i] = 0;
                for (int t = 0; t < threads; t++)
                    for (int i = 0; i < count; i++) {
                        int64_t *theirs = (int64_t *)(kept + t * list);
                        insert(&all, r, ((float *)(theirs + count * q.rows))[r * count + i], theirs[r * count + i]);
                    }
                if (!normaliser) continue;
                float top = -INFINITY, total = 0;
                for (int c = 0; c < chunks; c++) top = fmaxf(top, tops[c * q.rows + r]);
                for (int c = 0; c < chunks; c++) total += expf(tops[c * q.rows + r] - top) * b.totals[c * q.rows + r];
                normaliser[from + r] = top + logf(total);
            }
#pragma omp barrier
        }
    }
}
#endif

/* Rows of one age: queries of `width` sequences of each row over keys and values [rows x heads][capacity][size]. */
typedef struct {
    float *keys, *values;    /* of this layer */
    const int32_t *lengths;  /* [rows]: positions of each row; null: `age + 1` positions, `width` places each */
    const int32_t *places;   /* [rows][width][age + 1]: where among a position's `width` places its history lies */
    int64_t rows, width, capacity, age;
} Part;

/* The sums of 16 vectors, lane i that of x[i]: neighbours are added level by level. */
static inline vec sums_of(vec *x) {
    const ivec even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    for (int count = LANES / 2; count; count /= 2)
        for (int i = 0; i < count; i++) {
            vec a = x[2 * i], b = x[2 * i + 1];
            x[i] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
        }
    return x[0];
}

/* A row's keys or values at position t for sequence w: `places` says where its history lies. */
static inline long place(const int32_t *places, long position, long width) {
    return places ? position * width + places[position] : position;
}

/* Both passes over a head's history fetch, place by place, what the next one reads: the values, the next head's keys. */
static inline void fetch(const float *from, int size) {
    for (int k = 0; k < size; k += LANES) __builtin_prefetch(from + k);
}

static void scores_of(
    const float *query, const float *keys, const float *next, const int32_t *places, long width, int count, int size, float *scores) {
    for (int s = 0; s < count; s += LANES) {
        vec each[LANES];
        for (int i = 0; i < LANES; i++) {
            long at = s + i < count ? s + i : count - 1;
            const float *key = keys + place(places, at, width) * size;
            vec total = ALL(0.0f);
            for (int k = 0; k < size; k += LANES) total += some(query + k, size - k) * some(key + k, size - k);
            fetch(next + (key - keys), size);
            each[i] = total;
        }
        *(vec *)(scores + s) = sums_of(each);
    }
}

static void softmax(float *scores, int count) {
    int padded = (count + LANES - 1) / LANES * LANES;
    for (int s = count; s < padded; s++) scores[s] = -INFINITY;
    vec top = ALL(-INFINITY), total = ALL(0.0f);
    for (int s = 0; s < padded; s += LANES) {
        vec v = *(vec *)(scores + s);
        top = BOTH(v > top, v, top);
    }
    float most = largest(top);
    for (int s = 0; s < padded; s += LANES) {
        vec v = exp_(*(vec *)(scores + s) - most);
        *(vec *)(scores + s) = v;
        total += v;
    }
    float inverse = 1.0f / sum(total);
    for (int s = 0; s < padded; s += LANES) *(vec *)(scores + s) *= inverse;
}

static void weigh(
    const float *weights, const float *values, const float *next, const int32_t *places, long width, int count, int size, float *out) {
    for (int first = 0; first < size; first += 4 * LANES) {
        vec total[4] = {0};
        int left = size - first;
        for (int s = 0; s < count; s++) {
            const float *value = values + place(places, s, width) * size + first;
            fetch(next + (value - values), size - first < 4 * LANES ? size - first : 4 * LANES);
            if (left >= 4 * LANES)
                for (int j = 0; j < 4; j++) total[j] += weights[s] * *(const vec *)(value + j * LANES);
            else
                for (int j = 0; j * LANES < left; j++) total[j] += weights[s] * some(value + j * LANES, left - j * LANES);
        }
        memcpy(out + first, total, 4 * (left < 4 * LANES ? left : 4 * LANES));
    }
}

typedef struct {
    const Part *parts;
    int part_count, heads, size;
    float scale;
    const float *query, *key, *value; /* key null: the cache holds all there is */
    long stride;                      /* floats from one sequence to the next in query, key and value */
    const float *table;               /* [heads][table_length]: added to the score of the key so many positions back */
    int table_length;
    float *out; /* [sequences][heads x size] */
} Attention;

/* One head of one row of a part; `sequence`: where the row's sequences begin among all. */
static void attend_head(const Attention *a, const Part *part, long row, int head, long sequence) {
    long width = part->width, size = a->size, base = (row * a->heads + head) * part->capacity * size;
    long count = part->lengths ? part->lengths[row] : part->age + 1;
    float *keys = part->keys + base, *values = part->values + base;
    float *scores = scratch(1, 4 * (count + LANES + size + LANES)), *query = scores + (count + LANES) / LANES * LANES;
    for (long w = 0; a->key && w < width; w++) {
        long from = (sequence + w) * a->stride + head * size, to = (part->age * width + w) * size;
        memcpy(keys + to, a->key + from, 4 * size);
        memcpy(values + to, a->value + from, 4 * size);
    }
    for (long w = 0; w < width; w++) {
        const int32_t *places = part->places ? part->places + (row * width + w) * count : 0;
        for (long k = 0; k < size; k++) query[k] = a->scale * a->query[(sequence + w) * a->stride + head * size + k];
        scores_of(query, keys, values, places, width, count, size, scores);
        if (a->table)
            for (long s = 0; s < count; s++) {
                long back = count - 1 - s;
                scores[s] += a->table[head * a->table_length + (back < a->table_length ? back : a->table_length - 1)];
            }
        softmax(scores, count);
        weigh(scores, values, keys + part->capacity * size, places, width, count, size, a->out + ((sequence + w) * a->heads + head) * size);
    }
}

void attend(const Attention *a) {
    long items = 0;
    for (int p = 0; p < a->part_count; p++) items += a->parts[p].rows * a->heads;
#pragma omp parallel for schedule(dynamic, 8)
    for (long item = 0; item < items; item++) {
        long index = item, sequence = 0;
        const Part *part = a->parts;
        for (; index >= part->rows * a->heads; part++) {
            index -= part->rows * a->heads;
            sequence += part->rows * part->width;
        }
        long row = index / a->heads;
        attend_head(a, part, row, index % a->heads, sequence + row * part->width);
    }
}

/* out = layer norm of x + y, rows of `width`; bias may be null. */
void add_norm(
    const float *x, const float *y, const float *weight, const float *bias, float *out, long rows, long width, float epsilon) {
#pragma omp parallel for schedule(static) if (rows * width > 16384)
    for (long r = 0; r < rows; r++) {
        const float *a = x + r * width, *b = y + r * width;
        float *o = out + r * width;
        vec total = ALL(0.0f), squares = ALL(0.0f);
        for (long i = 0; i < width; i += LANES) total += some(a + i, width - i) + some(b + i, width - i);
        float mean = sum(total) / width;
        for (long i = 0; i < width; i += LANES) {
            vec v = some(a + i, width - i) + some(b + i, width - i) - mean;
            if (width - i < LANES)
                for (int lane = width - i; lane < LANES; lane++) v[lane] = 0.0f;
            squares += v * v;
        }
        float inverse = 1.0f / sqrtf(sum(squares) / width + epsilon);
        for (long i = 0; i < width; i++) o[i] = (a[i] + b[i] - mean) * inverse * weight[i] + (bias ? bias[i] : 0.0f);
    }
}
