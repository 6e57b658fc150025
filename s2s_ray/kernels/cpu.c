/* Generation's two costly operations on a CPU. `cpu.py` compiles this file for the machine it runs on and says what each
 * function takes. A row's result depends on that row alone, never on how many rows stand beside it.
 *
 * int8 products are those of gemmlowp-style dynamic quantisation: weights int8 with a scale per output, activations int8
 * with a scale per row, sums in int32. Weights are stored as w + 128 (the instruction multiplies unsigned by signed) in
 * panels [N / 32][K / 4][32][4], so that one panel stays in the first cache while the rows pass by.
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
#endif

#define LANES 16
#define PANEL 32
#define TILE 12
#define ROW_BLOCK 192 /* rows whose int8 form stays in the second cache while all panels pass */
#define SMALL 256     /* rows up to which the threads share the panels, above it the rows */

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
    static __thread struct { void *at; size_t size; } held[2];
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

int has_int8(void) {
#ifdef __AVX512VNNI__
    return 1;
#else
    return 0;
#endif
}

#ifdef __AVX512VNNI__
#include <immintrin.h>

typedef struct { int8_t *codes; float *scales; int32_t *offsets; } Rows;

/* A row to codes = round(127 x / max |x|), their scale, and 128 times their sum, which the weights' offset adds. */
static void quantise(const float *x, int width, int depth, int8_t *codes, float *scale, int32_t *offset) {
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
        _mm512_mask_cvtsepi32_storeu_epi8(codes + i, depth - i < LANES ? (1 << (depth - i)) - 1 : 0xffff, q);
    }
    *scale = most < INFINITY ? most / 127.0f : NAN; /* a NaN or an infinity stays visible */
    *offset = 128 * _mm512_reduce_add_epi32(added);
}

/* sums += 4 unsigned x 4 signed bytes in each lane. The intrinsic does not broadcast from memory in gcc 12. */
#define FOUR(sums, weights, four) \
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(weights), "m"(*(const int32_t(*)[1])(four)))

typedef struct { const float *scales, *bias; int columns, activation; } Columns;

static inline __attribute__((always_inline)) void finish(__m512i sums, int32_t offset, float scale, Columns c, int from, float *out) {
    int count = c.columns - from;
    if (count <= 0) return;
    __mmask16 mask = count >= LANES ? 0xffff : (__mmask16)((1 << count) - 1);
    vec y = (vec)_mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_set1_epi32(offset)));
    y *= scale * (vec)_mm512_maskz_loadu_ps(mask, c.scales + from);
    if (c.bias) y += (vec)_mm512_maskz_loadu_ps(mask, c.bias + from);
    _mm512_mask_storeu_ps(out + from, mask, (__m512)activated(y, c.activation));
}

static inline __attribute__((always_inline)) void tile(
    const int rows, const Rows *x, int first, int depth, const uint8_t *panel, Columns columns, float *out, long stride) {
    const int8_t *codes = x->codes + (long)first * depth;
    __m512i left[TILE], right[TILE];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) left[r] = right[r] = _mm512_setzero_si512();
    for (int k = 0; k < depth; k += 4, panel += 4 * PANEL) {
        __m512i a = _mm512_loadu_si512(panel), b = _mm512_loadu_si512(panel + 64);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const int8_t *four = codes + (long)r * depth + k;
            FOUR(left[r], a, four);
            FOUR(right[r], b, four);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        finish(left[r], x->offsets[first + r], x->scales[first + r], columns, 0, out + (first + r) * stride);
        finish(right[r], x->offsets[first + r], x->scales[first + r], columns, LANES, out + (first + r) * stride);
    }
}

static void tiles(int rows, const Rows *x, int first, int depth, const uint8_t *panel, Columns columns, float *out, long stride) {
    for (int end = first + rows; first < end; first += TILE) {
#define CASE(n) case n: tile(n, x, first, depth, panel, columns, out, stride); break;
        switch (end - first < TILE ? end - first : TILE) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
        }
#undef CASE
    }
}

/* out[rows, outputs] = activation(x[rows, width] W + bias); x has `x_stride` floats from row to row. */
void linear_int8(
    const float *x, long x_stride, int rows, int width, const uint8_t *panels, const float *scales,
    const float *bias, int outputs, float *out, int activation) {
    int depth = (width + 3) / 4 * 4, panel_count = (outputs + PANEL - 1) / PANEL;
    char *memory = scratch(0, (size_t)rows * (depth + 8) + 64);
    Rows q = {(int8_t *)(memory + 8L * rows), (float *)memory, (int32_t *)(memory + 4L * rows)};
#pragma omp parallel
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        int from = (long)rows * thread / threads, to = (long)rows * (thread + 1) / threads;
        for (int r = from; r < to; r++)
            quantise(x + r * x_stride, width, depth, q.codes + (long)r * depth, q.scales + r, q.offsets + r);
        int first_panel = 0, end_panel = panel_count;
        if (rows <= SMALL) {
#pragma omp barrier
            first_panel = (long)panel_count * thread / threads, end_panel = (long)panel_count * (thread + 1) / threads;
            from = 0, to = rows;
        }
        for (int block = from; block < to; block += ROW_BLOCK)
            for (int p = first_panel; p < end_panel; p++) {
                int at = p * PANEL;
                Columns columns = {scales + at, bias ? bias + at : 0, outputs - at < PANEL ? outputs - at : PANEL, activation};
                int count = to - block < ROW_BLOCK ? to - block : ROW_BLOCK;
                tiles(count, &q, block, depth, panels + (long)at * depth, columns, out + at, outputs);
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

static void scores_of(const float *query, const float *keys, const int32_t *places, long width, int count, int size, float *scores) {
    for (int s = 0; s < count; s += LANES) {
        vec each[LANES];
        for (int i = 0; i < LANES; i++) {
            long at = s + i < count ? s + i : count - 1;
            const float *key = keys + place(places, at, width) * size;
            vec total = ALL(0.0f);
            for (int k = 0; k < size; k += LANES) total += some(query + k, size - k) * some(key + k, size - k);
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

static void weigh(const float *weights, const float *values, const int32_t *places, long width, int count, int size, float *out) {
    for (int first = 0; first < size; first += 4 * LANES) {
        vec total[4] = {0};
        int left = size - first;
        for (int s = 0; s < count; s++) {
            const float *value = values + place(places, s, width) * size + first;
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
        scores_of(query, keys, places, width, count, size, scores);
        if (a->table)
            for (long s = 0; s < count; s++) {
                long back = count - 1 - s;
                scores[s] += a->table[head * a->table_length + (back < a->table_length ? back : a->table_length - 1)];
            }
        softmax(scores, count);
        weigh(scores, values, places, width, count, size, a->out + ((sequence + w) * a->heads + head) * size);
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
