/* Sixteen numbers at a time: elementary functions, and memory in each dtype. Vectors are those of GCC and Clang, which
   any processor can run. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

#define EACH_LANE for (int lane = 0; lane < LANES; lane++)
#define LENGTH(array) ((int)(sizeof(array) / sizeof((array)[0])))

/* Elementary functions */

static inline vec all(float value) { return value - (vec){0}; }

static inline vec where(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

static inline vec magnitude(vec x) { return (vec)((uvec)x & 0x7fffffffu); }

/* Within -bound ... bound; NaN stays NaN. */
static inline vec clamped(vec x, float bound) {
#ifdef __AVX512F__ /* one instruction each, which compilers do not find: of NaN and a number the second is taken */
    return (vec)_mm512_max_ps((__m512)all(-bound), _mm512_min_ps((__m512)all(bound), (__m512)x));
#else
    x = where(x > bound, all(bound), x);
    return where(x < -bound, all(-bound), x);
#endif
}

static inline vec root(vec x) {
    vec result;
    EACH_LANE result[lane] = sqrtf(x[lane]);
    return result;
}

#define GATE_BOUND 28.0f /* (1 + exp(28))^3 is still a float, and exp(-28) is nothing beside 1 */

/* exp(x), |x| <= 87 (polynomial: Cephes, expf). */
static inline vec exponential(vec x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: its last bit counts ones */
    vec shifted = x * 1.44269504088896341f + magic, power = shifted - magic;
    vec r = x - power * 0.693359375f + power * 2.12194440e-4f;
    vec series = 8.3334519073e-3f + r * (1.3981999507e-3f + r * 1.9875691500e-4f);
    series = 5.0000001201e-1f + r * (1.6666665459e-1f + r * (4.1665795894e-2f + r * series));
    return (1.0f + (r + r * r * series)) * (vec)(((uvec)shifted << 23) + (127u << 23));
}

/* log(x) of a positive x that is not subnormal (polynomial: Cephes, logf). */
static inline vec logarithm(vec x) {
    uvec bits = (uvec)x;
    ivec exponent = (ivec)(bits >> 23) - 126;
    vec m = (vec)((bits & 0x007fffffu) | 0x3f000000u); /* 0.5 ... 1 */
    ivec low = m < 0.707106781186547524f;
    exponent += low; /* a mask is -1 */
    m = m + (vec)(low & (ivec)m) - 1.0f;
    vec e = __builtin_convertvector(exponent, vec);
    vec series = 1.1676998740e-1f + m * (-1.1514610310e-1f + m * 7.0376836292e-2f);
    series = -1.6668057665e-1f + m * (1.4249322787e-1f + m * (-1.2420140846e-1f + m * series));
    series = 3.3333331174e-1f + m * (-2.4999993993e-1f + m * (2.0000714765e-1f + m * series));
    vec square = m * m;
    vec result = (m * square * series - 2.12194440e-4f * e) - 0.5f * square + m + 0.693359375f * e;
    return where(x < INFINITY, result, x);
}

/* Accurate also near 0 (polynomial: Cephes, tanhf). */
static inline vec hyperbolic_tangent(vec x) {
    vec square = x * x;
    vec series = -5.37397155531e-2f + square * (2.06390887954e-2f + square * -5.70498872745e-3f);
    series = -3.33332819422e-1f + square * (1.33314422036e-1f + square * series);
    vec power = exponential(clamped(-2.0f * x, GATE_BOUND));
    vec far = (1.0f - power) / (1.0f + power);
    return where(magnitude(x) < 0.625f, x + x * square * series, far);
}

/* exp(bound tanh(slope x / bound)) */
static inline vec bounded_exponential(vec x, float bound, float slope) {
    return exponential(bound * hyperbolic_tangent(x * (slope / bound)));
}

/* Memory: FLOAT32, BFLOAT16 and FLOAT16 are values of the PARAMETER_DTYPE, GRAD_DTYPE, HIDDEN_DTYPE and CELL_DTYPE that
   cpu.py writes. Of the last coordinates of a tensor there may be fewer than a vector holds. */

enum { FLOAT32, BFLOAT16, FLOAT16 };

static inline vec load(const char *address, int64_t place, int dtype, int count) {
    if (dtype == FLOAT32) {
        vec values = {0};
        memcpy(&values, address + 4 * place, 4 * count);
        return values;
    }
    halves stored = {0};
    memcpy(&stored, address + 2 * place, 2 * count);
    uvec bits = __builtin_convertvector(stored, uvec);
    if (dtype == BFLOAT16) return (vec)(bits << 16);
    vec value = (vec)((bits & 0x7fffu) << 13) * 0x1p112f; /* subnormal ones too */
    uvec special = (uvec)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return (vec)((uvec)value | special | (bits & 0x8000u) << 16);
}

static inline halves as_bfloat16(vec values) {
    uvec bits = (uvec)values;
    uvec rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    uvec nan = (uvec)(values != values);
    return __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), halves);
}

static inline halves as_float16(vec values) {
    uvec bits = (uvec)values & 0x7fffffffu, sign = ((uvec)values & 0x80000000u) >> 16;
    vec size = (vec)bits;
    uvec normal = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
    uvec subnormal = (uvec)(size + 0.5f) - 0x3f000000u; /* the last bit of 0.5 is the smallest float16 */
    uvec large = (uvec)(size >= 65520.0f), small = (uvec)(size < 0x1p-14f), nan = (uvec)(values != values);
    uvec result = (small & subnormal) | (~small & normal);
    result = (large & 0x7c00u) | (~large & result);
    result = (nan & 0x7e00u) | (~nan & result);
    return __builtin_convertvector(result | sign, halves);
}

static inline void store(char *address, int64_t place, int dtype, int count, vec values) {
    if (dtype == FLOAT32) {
        memcpy(address + 4 * place, &values, 4 * count);
        return;
    }
    halves stored = dtype == BFLOAT16 ? as_bfloat16(values) : as_float16(values);
    memcpy(address + 2 * place, &stored, 2 * count);
}
