/* The steps of a rule on a CPU: every coordinate goes through memory once, a vector of them at a time.

   In front of this stand vector.h, the functions that sources/c.py makes of the rule, share and its updates, and macros
   that list these and the entries of the state. */

#ifdef _OPENMP
#include <omp.h>
#endif

typedef struct {
    int64_t size;                /* coordinates */
    int64_t stride;              /* from one feature of the state to the next */
    const float *scale;          /* factor on the update */
    const float *sees_parameter; /* 1: the rule gets the parameter, 0: it gets zero; for all coordinates, or for each */
    int64_t sees_stride;         /* from the entry of one coordinate to that of the next: 0 or 1 */
    const real *weights;         /* the rule's weights, in the order in which it reads them */
    const float *step;           /* count of this step */
    char *parameter;
    const char *grad;
    char *state[ENTRIES];
} Tensor;

typedef struct {
    SharedInputs inputs;
    double factor, decay, grad_scale; /* on the update, on the parameter, on the gradient */
    int32_t maximize, skip_nonfinite;
} Arguments;

typedef vec Update(vec *state, vec grad, vec parameter, const Shared *shared, const real *weights);

#define LOAD(entry, first, dtype, features)                                                                              \
    if (used[entry] == '1')                                                                                              \
        for (int k = 0; k < features; k++)                                                                               \
            state[first + k] = load(tensor->state[entry], place + k * tensor->stride, dtype, count);
#define STORE(entry, first, dtype, features)                                                                             \
    if (changed[entry] == '1')                                                                                           \
        for (int k = 0; k < features; k++)                                                                               \
            store(tensor->state[entry], place + k * tensor->stride, dtype, count, state[first + k]);

/* The coordinates place ... place + count - 1, at most a vector of them. The update, and which entries of the state it
   uses and changes, are constants where this is inlined. */
INLINE void step_lanes(
    const Tensor *tensor, int64_t place, int count, const Shared *shared, const Arguments *settings, Update *update,
    const char *used, const char *changed
) {
    vec grad = load(tensor->grad, place, GRAD_DTYPE, count) / (real)settings->grad_scale;
    if (settings->maximize) grad = -grad;
    ivec written = (ivec){0} == 0;
    int all_written = 1;
    if (settings->skip_nonfinite) {
        written = magnitude(grad) < INFINITY;
        all_written = every(written);
        grad = (vec)(written & (ivec)grad);
    }
    vec state[FEATURES];
    EACH_ENTRY(LOAD)
    vec kept[FEATURES];
    if (!all_written) memcpy(kept, state, sizeof(state));
    vec parameter = load(tensor->parameter, place, PARAMETER_DTYPE, count), seen = parameter;
    if (READS_PARAMETER) {
        const float *sees = tensor->sees_parameter;
        vec shown = tensor->sees_stride ? load((const char *)sees, place, FLOAT32, count) : all(*sees);
        seen = where(shown != 0, parameter / *tensor->scale, all(0));
    }
    vec change = (real)settings->factor * *tensor->scale * update(state, grad, seen, shared, tensor->weights);
    if (!all_written)
        for (int k = 0; k < FEATURES; k++) state[k] = where(written, state[k], kept[k]);
    EACH_ENTRY(STORE)
    if (settings->decay != 0) change -= (real)settings->decay * parameter;
    vec moved = parameter + change;
    store(tensor->parameter, place, PARAMETER_DTYPE, count, all_written ? moved : where(written, moved, parameter));
}

/* The coordinates place ... end - 1 of a tensor, by one of the updates. */
#define STEP(number, update, used, changed)                                                                              \
    case number:                                                                                                         \
        for (; place + LANES <= end; place += LANES)                                                                     \
            step_lanes(tensor, place, LANES, &shared, settings, update, used, changed);                                  \
        if (place < end) step_lanes(tensor, place, (int)(end - place), &shared, settings, update, used, changed);        \
        break;

/* Step those tiles of all tensors whose number lies in first ... last - 1. */
static void step_tiles(
    const Tensor *tensors, int64_t n_tensors, int64_t first, int64_t last, const Arguments *settings
) {
    Shared shared;
    int branch = 0;
    SharedInputs inputs = settings->inputs;
    const Tensor *shares = 0; /* the tensor that they are of */
    for (const Tensor *tensor = tensors; tensor < tensors + n_tensors && last > 0; tensor++) {
        int64_t tiles = (tensor->size + TILE - 1) / TILE;
        if (first < tiles) {
            if (!shares || shares->weights != tensor->weights || *shares->step != *tensor->step) {
                inputs.step = *tensor->step;
                branch = share(&shared, tensor->weights, &inputs);
                shares = tensor;
            }
            int64_t place = (first > 0 ? first : 0) * TILE, end = last < tiles ? last * TILE : tensor->size;
            switch (branch) { EACH_UPDATE(STEP) }
        }
        first -= tiles;
        last -= tiles;
    }
}

/* Step all tensors, which have so many tiles together. */
void step(const Tensor *tensors, int64_t n_tensors, int64_t tiles, int64_t threads, const Arguments *settings) {
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
