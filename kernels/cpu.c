/* Rules on a CPU: a step takes every coordinate through memory once, sixteen at a time.

   cpu.py puts TILE and the constants of a rule in front and has a C compiler make it. The mathematics is that of rules.py and
   lstm.py; README.md says what differs. */

#include "vector.h"
#ifdef _OPENMP
#include <omp.h>
#endif

/* The LSTM */

/* Of one signal what it adds to the four gates of a unit. */
static inline void add(vec *gates, const float *weights, vec signal) {
    for (int gate = 0; gate < 4; gate++) gates[gate] += weights[gate] * signal;
}

/* New hidden and cell state of n_hidden units from n_signals signals, which are the inputs and then the old hidden state.
   Of each unit the weights are four biases, then four for each signal: input, forget, candidate and output gate, times
   -1, the candidate's times -2. Returns the weights that follow. */
static inline const float *lstm_layer(
    const float *weights, const vec *signals, int n_signals, int n_hidden, vec *hidden, vec *cell
) {
    for (int unit = 0; unit < n_hidden; unit++) {
        vec even[4], odd[4] = {{0}}; /* two short chains of sums */
        for (int gate = 0; gate < 4; gate++) even[gate] = all(weights[gate]);
        weights += 4;
        for (int k = 0; k + 1 < n_signals; k += 2, weights += 8) {
            add(even, weights, signals[k]);
            add(odd, weights + 4, signals[k + 1]);
        }
        if (n_signals % 2) {
            add(even, weights, signals[n_signals - 1]);
            weights += 4;
        }
        vec i = even[0] + odd[0], f = even[1] + odd[1], g = even[2] + odd[2], o = even[3] + odd[3];
        i = 1.0f + exponential(clamped(i, GATE_BOUND));
        f = 1.0f + exponential(clamped(f, GATE_BOUND));
        g = exponential(clamped(g, GATE_BOUND));
        o = 1.0f + exponential(clamped(o, GATE_BOUND));
        vec product = i * (1.0f + g);
        vec c = cell[unit] = (cell[unit] * product + (1.0f - g) * f) / (product * f);
        c = exponential(clamped(-2.0f * c, GATE_BOUND));
        hidden[unit] = (1.0f - c) / (o * (1.0f + c));
    }
    return weights;
}

/* outputs[k] = biases[k] + weights of unit 0, 1, ... on output k; returns the weights that follow. */
static inline const float *linear(const float *weights, const vec *hidden, int n_hidden, vec *outputs, int n_outputs) {
    for (int k = 0; k < n_outputs; k++) outputs[k] = all(weights[k]);
    weights += n_outputs;
    for (int unit = 0; unit < n_hidden; unit++, weights += n_outputs)
        for (int k = 0; k < n_outputs; k++) outputs[k] += weights[k] * hidden[unit];
    return weights;
}

/* Sizes of the rules: what goes into the first layer of the LSTM and comes out of the linear one, and features of each
   entry of the state, of which the last two are the LSTM's hidden state and cell. */

#if defined(SCHEDULE_FREE_LSTM)
#define COUNTS /* the rule heeds the step count */
enum { INPUTS = LENGTH(MOMENTUM_DECAYS) + 5, OUTPUTS = 3, LAYERS = 1 };
static const int FEATURES_OF[] = {LENGTH(MOMENTUM_DECAYS), 2, 1, 1, HIDDEN, HIDDEN};
enum { MOMENTS = LENGTH(MOMENTUM_DECAYS) + 4 };
#elif defined(SCALE_FREE_LSTM)
#define COUNTS
enum { INPUTS = MOMENTA + 2, OUTPUTS = MOMENTA + 2, LAYERS = 1 };
static const int FEATURES_OF[] = {MOMENTA, 2, HIDDEN, HIDDEN};
enum { MOMENTS = MOMENTA + 2 };
#elif defined(LSTM_L2L)
enum { INPUTS = 2, OUTPUTS = 1 };
static const int FEATURES_OF[] = {LAYERS * HIDDEN, LAYERS * HIDDEN};
enum { MOMENTS = 0 };
#endif

enum {
    ENTRIES = LENGTH(FEATURES_OF),
    FEATURES = MOMENTS + 2 * LAYERS * HIDDEN,
    WIDEST = INPUTS > HIDDEN ? INPUTS : HIDDEN,
    WEIGHTS = HIDDEN * 4 * (1 + INPUTS + HIDDEN) + (LAYERS - 1) * HIDDEN * 4 * (1 + 2 * HIDDEN) + OUTPUTS * (1 + HIDDEN)
};

/* What all coordinates of a tensor share */

#define LARGEST_SQUARED 9.223371487098962e18f /* the square of twice this is the largest float */
#define EPSILON_SQUARED 1e-24f

typedef struct {
    float weights[WEIGHTS]; /* of lstm_layer, layer by layer, and linear */
    float count;            /* of the step */
#ifdef COUNTS
    float momentum_corrections[LENGTH(MOMENTUM_DECAYS)], second_moment_corrections[LENGTH(SECOND_MOMENT_DECAYS)];
#endif
#ifdef WARMUP
    float warmth, caution; /* share of the rate; how much more often a negative agreement counts */
#endif
} Shared;

/* Takes the weights as the kernels have them, with those on the context, which is folded into the biases. */
static void share(Shared *shared, const float *weights, const float *context, int n_context, float count) {
    float *next = shared->weights;
    const float factors[4] = {-1, -1, -2, -1};
    for (int layer = 0; layer < LAYERS; layer++) {
        int signals = (layer == 0 ? INPUTS : HIDDEN) + HIDDEN;
        for (int unit = 0; unit < HIDDEN; unit++) {
            for (int gate = 0; gate < 4; gate++) {
                double bias = weights[gate];
                for (int k = 0; k < n_context; k++) bias += (double)weights[4 + 4 * k + gate] * context[k];
                next[gate] = (float)(bias * factors[gate]);
            }
            next += 4;
            weights += 4 + 4 * n_context;
            for (int k = 0; k < 4 * signals; k++) *next++ = *weights++ * factors[k % 4];
        }
    }
    memcpy(next, weights, sizeof(float) * OUTPUTS * (1 + HIDDEN));
    shared->count = count;
}

/* The rules. Each is a function from the gradient to the update, which overwrites the state of its coordinates: features
   in the order of the rule's entries, of which the last two are the LSTM's hidden state and cell. */

#ifdef COUNTS
/* Factors that take the bias of the zero start out of averages. */
static void corrections(float *factors, const double *decays, int n_decays, float count) {
    for (int k = 0; k < n_decays; k++) factors[k] = (float)(decays[k] > 0 ? -1 / expm1(count * log(decays[k])) : 1);
}

/* Exponential averages with one more value; written so that no digits cancel. */
static inline void average(vec *averages, vec values, const double *decays, int count) {
    for (int k = 0; k < count; k++) {
        vec apart = values - averages[k];
        averages[k] = decays[k] > 0.5 ? averages[k] + (float)(1 - decays[k]) * apart : values - (float)decays[k] * apart;
    }
}
#endif

#if defined(SCHEDULE_FREE_LSTM)

static __attribute__((noinline)) vec update(vec *state, vec grad, const Shared *shared) {
    enum { MOMENTA = LENGTH(MOMENTUM_DECAYS) };
    vec *momentum = state, *second_moment = momentum + MOMENTA, *displacement = second_moment + 2;
    vec *log_rate = displacement + 1, *hidden = log_rate + 1, *cell = hidden + HIDDEN;
    const float count = shared->count;
    grad = clamped(grad, LARGEST_SQUARED);
    vec before = momentum[0];
    average(second_moment, grad * grad, SECOND_MOMENT_DECAYS, 2);
    average(momentum, grad, MOMENTUM_DECAYS, MOMENTA);
    vec rms = root(second_moment[0] * shared->second_moment_corrections[0] + EPSILON_SQUARED);
    vec slow_rms = root(second_moment[1] * shared->second_moment_corrections[1] + EPSILON_SQUARED);
    vec over = 1.0f / rms, ratio = rms / slow_rms;
    vec direction = clamped(grad * over, LARGEST_DIRECTION);
    vec agreement = direction * (before * shared->momentum_corrections[0] * over);
    vec averaging = *displacement * exponential(-*log_rate) * (1.0f / (RATE * count));

    vec signals[INPUTS + HIDDEN], outputs[OUTPUTS], new_hidden[HIDDEN], *next = signals;
    *next++ = direction;
    for (int k = 0; k < MOMENTA; k++) *next++ = momentum[k] * shared->momentum_corrections[k] * over;
    *next++ = agreement;
    *next++ = logarithm(ratio);
    *next++ = *log_rate * (1.0f / BOUND);
    *next++ = averaging / (1.0f + magnitude(averaging));
    memcpy(next, hidden, sizeof(vec) * HIDDEN);
    const float *weights = lstm_layer(shared->weights, signals, INPUTS + HIDDEN, HIDDEN, new_hidden, cell);
    memcpy(hidden, new_hidden, sizeof(vec) * HIDDEN);
    linear(weights, hidden, HIDDEN, outputs, OUTPUTS);

    vec gain = GAIN * bounded_exponential(outputs[1], BOUND, GAIN_SLOPE);
    vec cautious = agreement + shared->caution * where(agreement < 0.0f, agreement, all(0.0f));
    *log_rate = clamped((1.0f - FORGETTING) * *log_rate + gain * cautious, BOUND);
    vec square = *log_rate * *log_rate;
    vec credible = *log_rate * square / (square + CHANCE * CHANCE);
    vec squares = ratio * ratio; /* at most 10 */
    vec surge = (1.0f - 2.0f / (1.0f + squares)) * (1.0f - squares * squares * (1.0f / (LARGEST_RATIO * LARGEST_RATIO)));
    vec factor = bounded_exponential(credible + SURGE * surge + RATE_SLOPE * outputs[0], BOUND, 1.0f);
    vec move = -RATE * shared->warmth * factor * direction;
    vec ahead = *displacement + move;
    vec bounded_recency = BOUND * hyperbolic_tangent(outputs[2] * (RECENCY_SLOPE / BOUND));
    vec last = 1.0f / (1.0f + (count - 1.0f) * exponential(-RECENCY - bounded_recency));
    *displacement = (1.0f - last) * ahead;
    return (1.0f - INTERPOLATION) * move + INTERPOLATION * last * ahead;
}

#elif defined(SCALE_FREE_LSTM)

static __attribute__((noinline)) vec update(vec *state, vec grad, const Shared *shared) {
    vec *momentum = state, *second_moment = momentum + MOMENTA, *hidden = second_moment + 2, *cell = hidden + HIDDEN;
    grad = clamped(grad, LARGEST_SQUARED);
    average(second_moment, grad * grad, SECOND_MOMENT_DECAYS, 2);
    average(momentum, grad, MOMENTUM_DECAYS, MOMENTA);
    vec fast_rms = root(second_moment[0] * shared->second_moment_corrections[0] + EPSILON_SQUARED);
    vec slow_rms = root(second_moment[1] * shared->second_moment_corrections[1] + EPSILON_SQUARED);

    vec signals[INPUTS + HIDDEN], outputs[OUTPUTS], new_hidden[HIDDEN], over = 1.0f / slow_rms;
    for (int k = 0; k < MOMENTA; k++) signals[k] = momentum[k] * shared->momentum_corrections[k] * over;
    signals[MOMENTA] = grad / fast_rms;
    signals[MOMENTA + 1] = logarithm(fast_rms / slow_rms);
    memcpy(signals + INPUTS, hidden, sizeof(vec) * HIDDEN);
    const float *weights = lstm_layer(shared->weights, signals, INPUTS + HIDDEN, HIDDEN, new_hidden, cell);
    memcpy(hidden, new_hidden, sizeof(vec) * HIDDEN);
    linear(weights, hidden, HIDDEN, outputs, OUTPUTS);

    vec direction = signals[ADAM];
    for (int k = 0; k <= MOMENTA; k++) direction += outputs[k] * signals[k];
    return -RATE * bounded_exponential(outputs[MOMENTA + 1], BOUND, SLOPE) * direction;
}

#elif defined(LSTM_L2L)

static __attribute__((noinline)) vec update(vec *state, vec grad, const Shared *shared) {
    vec *hidden = state, *cell = hidden + LAYERS * HIDDEN;
    vec signals[WIDEST + HIDDEN], output;
    vec size = magnitude(grad);
    signals[0] = logarithm(where(size < THRESHOLD, all(THRESHOLD), size)) * (1.0f / P);
    signals[1] = clamped(grad * (1.0f / THRESHOLD), 1.0f);
    const float *weights = shared->weights;
    for (int layer = 0; layer < LAYERS; layer++, hidden += HIDDEN, cell += HIDDEN) {
        vec new_hidden[HIDDEN];
        int inputs = layer == 0 ? INPUTS : HIDDEN;
        memcpy(signals + inputs, hidden, sizeof(vec) * HIDDEN);
        weights = lstm_layer(weights, signals, inputs + HIDDEN, HIDDEN, new_hidden, cell);
        memcpy(hidden, new_hidden, sizeof(vec) * HIDDEN);
        memcpy(signals, new_hidden, sizeof(vec) * HIDDEN);
    }
    linear(weights, signals, HIDDEN, &output, 1);
    return OUTPUT_SCALE * output;
}

#endif

/* Steps */

typedef struct {
    int64_t size;         /* coordinates */
    int64_t stride;       /* from one feature of the state to the next */
    const float *scale;   /* factor on the update */
    const float *weights; /* of the rule, in the order of the kernels */
    const float *step;    /* count of this step */
    char *parameter;
    const char *grad;
    char *state[ENTRIES];
} Tensor;

typedef struct {
    float lr, decay, grad_scale;
    int32_t maximize, skip_nonfinite;
} Settings;

static inline vec *load_features(
    vec *next, const Tensor *tensor, int entry, int64_t place, int dtype, int count
) {
    const char *address = tensor->state[entry];
    for (int k = 0; k < FEATURES_OF[entry]; k++) *next++ = load(address, place + k * tensor->stride, dtype, count);
    return next;
}

static inline vec *store_features(
    vec *next, const Tensor *tensor, int entry, int64_t place, int dtype, int count
) {
    char *address = tensor->state[entry];
    for (int k = 0; k < FEATURES_OF[entry]; k++) store(address, place + k * tensor->stride, dtype, count, *next++);
    return next;
}

/* The coordinates place ... place + count - 1, at most a vector of them. */
static inline __attribute__((always_inline)) void step_lanes(
    const Tensor *tensor, int64_t place, int count, const Shared *shared, const Settings *settings
) {
    vec grad = load(tensor->grad, place, GRAD_DTYPE, count) / settings->grad_scale;
    if (settings->maximize) grad = -grad;
    ivec written = (ivec){0} == 0;
    int32_t all_written = -1;
    if (settings->skip_nonfinite) {
        written = magnitude(grad) < INFINITY;
        EACH_LANE all_written &= written[lane];
        grad = (vec)(written & (ivec)grad);
    }
    vec state[FEATURES], *next = state;
    for (int entry = 0; entry < ENTRIES - 2; entry++)
        next = load_features(next, tensor, entry, place, FLOAT32, count);
    next = load_features(next, tensor, ENTRIES - 2, place, HIDDEN_DTYPE, count);
    load_features(next, tensor, ENTRIES - 1, place, CELL_DTYPE, count);
    vec kept[FEATURES];
    if (!all_written) memcpy(kept, state, sizeof(state));
    vec change = settings->lr * *tensor->scale * update(state, grad, shared);
    if (!all_written)
        for (int k = 0; k < FEATURES; k++) state[k] = where(written, state[k], kept[k]);
    next = state;
    for (int entry = 0; entry < ENTRIES - 2; entry++)
        next = store_features(next, tensor, entry, place, FLOAT32, count);
    next = store_features(next, tensor, ENTRIES - 2, place, HIDDEN_DTYPE, count);
    store_features(next, tensor, ENTRIES - 1, place, CELL_DTYPE, count);
    vec parameter = load(tensor->parameter, place, PARAMETER_DTYPE, count);
    if (settings->decay != 0) change -= settings->decay * parameter;
    vec moved = parameter + change;
    store(tensor->parameter, place, PARAMETER_DTYPE, count, all_written ? moved : where(written, moved, parameter));
}

static void share_of(Shared *shared, const Tensor *tensor) {
    const float count = *tensor->step;
#ifdef COUNTS
    float context[LENGTH(TIME_SCALES)];
    for (int k = 0; k < LENGTH(TIME_SCALES); k++) context[k] = (float)tanh(count / TIME_SCALES[k]);
    share(shared, tensor->weights, context, LENGTH(TIME_SCALES), count);
    corrections(shared->momentum_corrections, MOMENTUM_DECAYS, LENGTH(MOMENTUM_DECAYS), count);
    corrections(shared->second_moment_corrections, SECOND_MOMENT_DECAYS, LENGTH(SECOND_MOMENT_DECAYS), count);
#else
    share(shared, tensor->weights, 0, 0, count);
#endif
#ifdef WARMUP
    shared->warmth = count < WARMUP ? count / WARMUP : 1.0f;
    shared->caution = expf(-count / WARMUP);
#endif
}

/* Step those tiles of all tensors whose number lies in first ... last - 1. */
static void step_tiles(const Tensor *tensors, int64_t n_tensors, int64_t first, int64_t last, const Settings *settings) {
    Shared shared;
    const Tensor *shares = 0; /* the tensor that they are of */
    for (const Tensor *tensor = tensors; tensor < tensors + n_tensors && last > 0; tensor++) {
        int64_t tiles = (tensor->size + TILE - 1) / TILE;
        if (first < tiles) {
            if (!shares || shares->weights != tensor->weights || *shares->step != *tensor->step)
                share_of(&shared, shares = tensor);
            int64_t place = (first > 0 ? first : 0) * TILE, end = last < tiles ? last * TILE : tensor->size;
            for (; place + LANES <= end; place += LANES) step_lanes(tensor, place, LANES, &shared, settings);
            if (place < end) step_lanes(tensor, place, (int)(end - place), &shared, settings);
        }
        first -= tiles;
        last -= tiles;
    }
}

/* Step all tensors, which have so many tiles together. */
void step(const Tensor *tensors, int64_t n_tensors, int64_t tiles, int64_t threads, const Settings *settings) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads((int)threads)
        {
            int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
            step_tiles(tensors, n_tensors, tiles * thread / count, tiles * (thread + 1) / count, settings);
        }
        return;
    }
#endif
    (void)threads;
    step_tiles(tensors, n_tensors, 0, tiles, settings);
}
