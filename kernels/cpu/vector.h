/* A vector of numbers at a time: elementary functions, and memory in each dtype. Vectors are those of GCC and Clang,
   which any processor can run. Numbers are float, or double if DOUBLE is defined. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

/* A vector fills one register. GCC 12 takes comparisons of longer vectors apart, number by number. */
#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX2__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#ifdef DOUBLE
#define LANES (WIDTH / 8)
typedef double real;
typedef int64_t integer;
#else
#define LANES (WIDTH / 4)
typedef float real;
typedef int32_t integer;
#endif

/* The inputs of a step that all coordinates share. */
typedef struct {
    double step, lr, progress, averaging;
} SharedInputs;

typedef real vec __attribute__((vector_size(WIDTH)));
typedef integer ivec __attribute__((vector_size(WIDTH)));
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t uints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

#define EACH_LANE for (int lane = 0; lane < LANES; lane++)
#define INLINE static inline __attribute__((always_inline, unused))

/* Choices */

INLINE vec all(real value) { return value - (vec){0}; }

INLINE vec where(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

INLINE vec magnitude(vec x) {
    const ivec sign = (ivec)all(-(real)0);
    return (vec)((ivec)x & ~sign);
}

/* Whether a mask is set for every number. */
#if !defined(__SSE2__) || defined(DOUBLE)
INLINE int every(ivec mask) {
    integer set = -1;
    EACH_LANE set &= mask[lane];
    return set != 0;
}
#elif defined(__AVX512F__)
INLINE int every(ivec mask) { return _mm512_cmpeq_epi32_mask((__m512i)mask, _mm512_setzero_si512()) == 0; }
#elif defined(__AVX2__)
INLINE int every(ivec mask) { return _mm256_movemask_ps((__m256)mask) == 0xff; }
#else
INLINE int every(ivec mask) { return _mm_movemask_ps((__m128)mask) == 0xf; }
#endif

/* The larger and the smaller; NaN if the first is, as everywhere below. Compilers do not find the one instruction that
   x86 has for it, which gives the second of NaN and a number. */
#if !defined(__SSE2__) || defined(DOUBLE)
INLINE vec larger(vec x, vec y) { return where(x < y, y, x); }
INLINE vec smaller(vec x, vec y) { return where(x > y, y, x); }
#elif defined(__AVX512F__)
INLINE vec larger(vec x, vec y) { return (vec)_mm512_max_ps((__m512)y, (__m512)x); }
INLINE vec smaller(vec x, vec y) { return (vec)_mm512_min_ps((__m512)y, (__m512)x); }
#elif defined(__AVX2__)
INLINE vec larger(vec x, vec y) { return (vec)_mm256_max_ps((__m256)y, (__m256)x); }
INLINE vec smaller(vec x, vec y) { return (vec)_mm256_min_ps((__m256)y, (__m256)x); }
#else
INLINE vec larger(vec x, vec y) { return (vec)_mm_max_ps((__m128)y, (__m128)x); }
INLINE vec smaller(vec x, vec y) { return (vec)_mm_min_ps((__m128)y, (__m128)x); }
#endif

INLINE vec clamped(vec x, real bound) { return larger(smaller(x, all(bound)), all(-bound)); }

INLINE vec rectified(vec x) { return larger(x, all(0)); }

INLINE vec sign(vec x) { return where(x > 0, all(1), where(x < 0, all(-1), x)); }

/* Elementary functions */

INLINE vec root(vec x) {
    vec result;
    EACH_LANE result[lane] = (real)(sizeof(real) == 4 ? sqrtf((float)x[lane]) : sqrt((double)x[lane]));
    return result;
}

INLINE vec reciprocal_root(vec x) { return 1 / root(x); }

static inline __attribute__((unused)) vec power(vec x, vec exponent) {
    vec result;
    EACH_LANE result[lane] = (real)pow((double)x[lane], (double)exponent[lane]);
    return result;
}

/* The remainder of a division, with the sign of the divisor. */
static inline __attribute__((unused)) double shared_modulo(double x, double divisor) {
    double rest = fmod(x, divisor);
    return rest != 0 && (rest < 0) != (divisor < 0) ? rest + divisor : rest;
}

static inline __attribute__((unused)) vec modulo(vec x, vec divisor) {
    vec result;
    EACH_LANE result[lane] = (real)shared_modulo((double)x[lane], (double)divisor[lane]);
    return result;
}

/* A function of the C library, number by number. */
#define OF_MATH(name, function)                                                                                          \
    static inline __attribute__((unused)) vec name(vec x) {                                                              \
        vec result;                                                                                                      \
        EACH_LANE result[lane] = (real)function((double)x[lane]);                                                        \
        return result;                                                                                                   \
    }
OF_MATH(cosine, cos)
OF_MATH(sine, sin)
OF_MATH(error_function, erf)

#ifdef DOUBLE

#define GATE_BOUND 200.0 /* (1 + exp(200))^3 is still a double, and exp(-200) is nothing beside 1 */
OF_MATH(exponential, exp)
OF_MATH(exponential_within_range, exp)
OF_MATH(exponential_minus_1, expm1)
OF_MATH(logarithm, log)
OF_MATH(hyperbolic_tangent, tanh)
INLINE vec bounded_exponential(vec x) { return exponential(clamped(x, GATE_BOUND)); }

#else

#define GATE_BOUND 28.0f /* (1 + exp(28))^3 is still a float, and exp(-28) is nothing beside 1 */

/* exp(x) 2^(exponent - 127), where that is a number (polynomial: Cephes, expf). */
INLINE vec scaled_exponential(vec x, uint32_t exponent) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: its last bit counts ones */
    vec shifted = x * 1.44269504088896341f + magic, power = shifted - magic;
    vec r = x - power * 0.693359375f + power * 2.12194440e-4f;
    vec series = 8.3334519073e-3f + r * (1.3981999507e-3f + r * 1.9875691500e-4f);
    series = 5.0000001201e-1f + r * (1.6666665459e-1f + r * (4.1665795894e-2f + r * series));
    return (1.0f + (r + r * r * series)) * (vec)(((uints)shifted << 23) + (exponent << 23));
}

/* exp(x), |x| <= 87. */
INLINE vec exponential_within_range(vec x) { return scaled_exponential(x, 127); }

/* exp(x): 0 below the smallest normal number, infinity above the largest. */
INLINE vec exponential(vec x) {
    vec result = 2.0f * scaled_exponential(smaller(larger(x, all(-87.5f)), all(88.75f)), 126);
    return where(x < -87.3365f, all(0.0f), where(x > 88.7228f, all(INFINITY), result));
}

INLINE vec bounded_exponential(vec x) { return exponential_within_range(clamped(x, GATE_BOUND)); }

/* exp(x) - 1, accurate also near 0 (Taylor's series there: its remainder is below 1e-8). */
INLINE vec exponential_minus_1(vec x) {
    vec series = 1.0f / 5040 + x * (1.0f / 40320);
    series = 1.0f / 24 + x * (1.0f / 120 + x * (1.0f / 720 + x * series));
    series = 1.0f + x * (1.0f / 2 + x * (1.0f / 6 + x * series));
    return where(magnitude(x) < 0.5f, x * series, exponential(x) - 1.0f);
}

/* log(x) of a normal number (polynomial: Cephes, logf). */
INLINE vec logarithm_of_normal(vec x) {
    uints bits = (uints)x;
    vec m = (vec)((bits & 0x007fffffu) | 0x3f000000u); /* 0.5 ... 1 */
    ivec low = m < 0.707106781186547524f;
    ivec exponent = (ivec)(bits >> 23) - 126 + low; /* a mask is -1 */
    m = m + (vec)(low & (ivec)m) - 1.0f;
    vec e = __builtin_convertvector(exponent, vec);
    vec series = 1.1676998740e-1f + m * (-1.1514610310e-1f + m * 7.0376836292e-2f);
    series = -1.6668057665e-1f + m * (1.4249322787e-1f + m * (-1.2420140846e-1f + m * series));
    series = 3.3333331174e-1f + m * (-2.4999993993e-1f + m * (2.0000714765e-1f + m * series));
    vec square = m * m;
    return (m * square * series - 2.12194440e-4f * e) - 0.5f * square + m + 0.693359375f * e;
}

/* log(x) of any number. */
static __attribute__((noinline, unused)) vec logarithm_of_any(vec number) {
    ivec subnormal = number < 0x1p-126f;
    vec result = logarithm_of_normal(where(subnormal, number * 0x1p64f, number));
    result -= where(subnormal, all(64 * 0.693147180559945309f), all(0));
    result = where(number < INFINITY, result, number); /* NaN too */
    return where(number > 0, result, where(number == 0, all(-INFINITY), number + (vec)(number < 0)));
}

/* log(x): most vectors have normal numbers alone. */
INLINE vec logarithm(vec x) {
    return every((x >= 0x1p-126f) & (x < INFINITY)) ? logarithm_of_normal(x) : logarithm_of_any(x);
}

/* tanh(x), accurate also near 0 (polynomial: Cephes, tanhf). */
INLINE vec hyperbolic_tangent(vec x) {
    vec square = x * x;
    vec series = -5.37397155531e-2f + square * (2.06390887954e-2f + square * -5.70498872745e-3f);
    series = -3.33332819422e-1f + square * (1.33314422036e-1f + square * series);
    vec power = bounded_exponential(-2.0f * x);
    vec far = (1.0f - power) / (1.0f + power);
    return where(magnitude(x) < 0.625f, x + x * square * series, far);
}

#endif

INLINE vec sigmoid(vec x) { return 1 / (1 + bounded_exponential(-x)); }

/* sigmoid(forget) cell + sigmoid(input) tanh(candidate), with one division. */
INLINE vec lstm_cell(vec forget, vec cell, vec input, vec candidate) {
    vec i = 1 + bounded_exponential(-input), f = 1 + bounded_exponential(-forget);
    vec g = bounded_exponential(-2 * candidate);
    vec product = i * (1 + g);
    return (cell * product + (1 - g) * f) / (product * f);
}

/* sigmoid(gate) tanh(value), with one division. */
INLINE vec gated_tanh(vec gate, vec value) {
    vec g = 1 + bounded_exponential(-gate), v = bounded_exponential(-2 * value);
    return (1 - v) / (g * (1 + v));
}

/* sums += matrix x, where the matrix lies column by column; in two chains, so that a sum need not wait for the one
   before. */
INLINE void add_products(vec *sums, int rows, const real *matrix, const vec *x, int columns) {
    vec odd[4] = {{0}};
    for (int k = 0; k + 1 < columns; k += 2, matrix += 2 * rows)
        for (int row = 0; row < rows; row++) {
            sums[row] += matrix[row] * x[k];
            odd[row] += matrix[rows + row] * x[k + 1];
        }
    if (columns % 2)
        for (int row = 0; row < rows; row++) sums[row] += matrix[row] * x[columns - 1];
    for (int row = 0; row < rows; row++) sums[row] += odd[row];
}

/* The same functions on what all coordinates share, once a step */

#define ONE static inline __attribute__((unused)) double
ONE shared_magnitude(double x) { return fabs(x); }
ONE shared_exponential(double x) { return exp(x); }
ONE shared_exponential_minus_1(double x) { return expm1(x); }
ONE shared_logarithm(double x) { return log(x); }
ONE shared_larger(double x, double y) { return x < y ? y : x; }
ONE shared_smaller(double x, double y) { return x > y ? y : x; }
ONE shared_power(double x, double y) { return pow(x, y); }
ONE shared_rectified(double x) { return x < 0 ? 0 : x; }
ONE shared_reciprocal_root(double x) { return 1 / sqrt(x); }
ONE shared_sigmoid(double x) { return 1 / (1 + exp(-x)); }
ONE shared_sign(double x) { return x > 0 ? 1 : x < 0 ? -1 : x; }
ONE shared_root(double x) { return sqrt(x); }
ONE shared_hyperbolic_tangent(double x) { return tanh(x); }
ONE shared_cosine(double x) { return cos(x); }
ONE shared_sine(double x) { return sin(x); }
ONE shared_error_function(double x) { return erf(x); }
ONE shared_gated_tanh(double gate, double value) { return shared_sigmoid(gate) * tanh(value); }
ONE shared_lstm_cell(double forget, double cell, double input, double candidate) {
    return shared_sigmoid(forget) * cell + shared_sigmoid(input) * tanh(candidate);
}

static inline __attribute__((unused)) void shared_product(
    double *results, int rows, const real *matrix, const double *x, int columns
) {
    for (int row = 0; row < rows; row++) {
        results[row] = 0;
        for (int k = 0; k < columns; k++) results[row] += matrix[row * columns + k] * x[k];
    }
}

/* Memory in each dtype. Of the last coordinates of a tensor there may be fewer than a vector holds. */

enum { FLOAT32, BFLOAT16, FLOAT16, FLOAT64 };

INLINE floats from_halves(halves stored, int dtype) {
    uints bits = __builtin_convertvector(stored, uints);
    if (dtype == BFLOAT16) return (floats)(bits << 16);
    floats value = (floats)((bits & 0x7fffu) << 13) * 0x1p112f; /* subnormal ones too */
    uints special = (uints)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return (floats)((uints)value | special | (bits & 0x8000u) << 16);
}

INLINE halves as_bfloat16(floats values) {
    uints bits = (uints)values;
    uints rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    uints nan = (uints)(values != values);
    return __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), halves);
}

INLINE halves as_float16(floats values) {
    uints bits = (uints)values & 0x7fffffffu, sign = ((uints)values & 0x80000000u) >> 16;
    floats size = (floats)bits;
    uints normal = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
    uints subnormal = (uints)(size + 0.5f) - 0x3f000000u; /* the last bit of 0.5 is the smallest float16 */
    uints large = (uints)(size >= 65520.0f), small = (uints)(size < 0x1p-14f), nan = (uints)(values != values);
    uints result = (small & subnormal) | (~small & normal);
    result = (large & 0x7c00u) | (~large & result);
    result = (nan & 0x7e00u) | (~nan & result);
    return __builtin_convertvector(result | sign, halves);
}

INLINE vec load(const char *address, int64_t place, int dtype, int count) {
    if (dtype == FLOAT64) {
        double values[LANES] = {0};
        memcpy(values, address + 8 * place, 8 * count);
        vec result;
        EACH_LANE result[lane] = (real)values[lane];
        return result;
    }
    floats values = {0};
    if (dtype == FLOAT32) {
        memcpy(&values, address + 4 * place, 4 * count);
    } else {
        halves stored = {0};
        memcpy(&stored, address + 2 * place, 2 * count);
        values = from_halves(stored, dtype);
    }
    return __builtin_convertvector(values, vec);
}

INLINE void store(char *address, int64_t place, int dtype, int count, vec numbers) {
    if (dtype == FLOAT64) {
        double values[LANES];
        EACH_LANE values[lane] = numbers[lane];
        memcpy(address + 8 * place, values, 8 * count);
        return;
    }
    floats values = __builtin_convertvector(numbers, floats);
    if (dtype == FLOAT32) {
        memcpy(address + 4 * place, &values, 4 * count);
        return;
    }
    halves stored = dtype == BFLOAT16 ? as_bfloat16(values) : as_float16(values);
    memcpy(address + 2 * place, &stored, 2 * count);
}
