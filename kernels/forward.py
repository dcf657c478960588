"""Triton kernels that apply a rule out of place, for meta-training.

A program takes ``BLOCK`` coordinates of one particle. The mathematics is that of ``rules.py``, as in ``step.py``.
"""

import triton
import triton.language as tl

from .rules import lstm_l2l, of_particle, scale_free_lstm, schedule_free_lstm


@triton.jit(do_not_specialize=["coordinates", "weights_stride"])
def lstm_l2l_forward(
    weights,
    step,
    grad,
    hidden,
    cell,
    update,
    new_hidden,
    new_cell,
    coordinates,
    weights_stride,
    THRESHOLD: tl.constexpr,
    P: tl.constexpr,
    OUTPUT_SCALE: tl.constexpr,
    HIDDEN: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Rule ``lstm-l2l`` for P particles; the weights of one begin ``weights_stride`` values after the last one's."""
    particle, size, offsets, mask = of_particle(coordinates, BLOCK)
    first = particle * (LAYERS * HIDDEN) * size + offsets
    result = lstm_l2l(
        tl.load(grad + particle * size + offsets, mask, other=0.0),
        weights + particle * weights_stride,
        hidden + first,
        cell + first,
        new_hidden + first,
        new_cell + first,
        size,
        mask,
        mask,
        THRESHOLD,
        P,
        OUTPUT_SCALE,
        HIDDEN,
        LAYERS,
        UNITS,
    )
    tl.store(update + particle * size + offsets, result, mask)


@triton.jit(do_not_specialize=["coordinates", "weights_stride"])
def scale_free_lstm_forward(
    weights,
    step,
    grad,
    momentum,
    second_moment,
    hidden,
    cell,
    update,
    new_momentum,
    new_second_moment,
    new_hidden,
    new_cell,
    coordinates,
    weights_stride,
    MOMENTUM_DECAYS: tl.constexpr,
    LOG_MOMENTUM_DECAYS: tl.constexpr,
    SECOND_MOMENT_DECAYS: tl.constexpr,
    LOG_SECOND_MOMENT_DECAYS: tl.constexpr,
    TIME_SCALES: tl.constexpr,
    MOMENTA: tl.constexpr,
    ADAM: tl.constexpr,
    BOUND: tl.constexpr,
    SLOPE: tl.constexpr,
    RATE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Rule ``scale-free-lstm`` for P particles; arguments as above."""
    particle, size, offsets, mask = of_particle(coordinates, BLOCK)
    first_momentum = particle * MOMENTA * size + offsets
    first_second_moment = particle * 2 * size + offsets
    first = particle * HIDDEN * size + offsets
    result = scale_free_lstm(
        tl.load(grad + particle * size + offsets, mask, other=0.0),
        tl.load(step),
        weights + particle * weights_stride,
        momentum + first_momentum,
        second_moment + first_second_moment,
        hidden + first,
        cell + first,
        new_momentum + first_momentum,
        new_second_moment + first_second_moment,
        new_hidden + first,
        new_cell + first,
        size,
        mask,
        mask,
        MOMENTUM_DECAYS,
        LOG_MOMENTUM_DECAYS,
        SECOND_MOMENT_DECAYS,
        LOG_SECOND_MOMENT_DECAYS,
        TIME_SCALES,
        MOMENTA,
        ADAM,
        BOUND,
        SLOPE,
        RATE,
        HIDDEN,
        UNITS,
    )
    tl.store(update + particle * size + offsets, result, mask)


@triton.jit(do_not_specialize=["coordinates", "weights_stride"])
def schedule_free_lstm_forward(
    weights,
    step,
    grad,
    momentum,
    second_moment,
    displacement,
    log_rate,
    hidden,
    cell,
    update,
    new_momentum,
    new_second_moment,
    new_displacement,
    new_log_rate,
    new_hidden,
    new_cell,
    coordinates,
    weights_stride,
    MOMENTUM_DECAYS: tl.constexpr,
    LOG_MOMENTUM_DECAYS: tl.constexpr,
    SECOND_MOMENT_DECAYS: tl.constexpr,
    LOG_SECOND_MOMENT_DECAYS: tl.constexpr,
    TIME_SCALES: tl.constexpr,
    LARGEST_DIRECTION: tl.constexpr,
    BOUND: tl.constexpr,
    RATE: tl.constexpr,
    RATE_SLOPE: tl.constexpr,
    GAIN: tl.constexpr,
    FORGETTING: tl.constexpr,
    CHANCE: tl.constexpr,
    SURGE: tl.constexpr,
    LARGEST_RATIO: tl.constexpr,
    WARMUP: tl.constexpr,
    GAIN_SLOPE: tl.constexpr,
    INTERPOLATION: tl.constexpr,
    RECENCY: tl.constexpr,
    RECENCY_SLOPE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Rule ``schedule-free-lstm`` for P particles; arguments as above."""
    particle, size, offsets, mask = of_particle(coordinates, BLOCK)
    first = particle * size + offsets
    moments = particle * len(MOMENTUM_DECAYS) * size + offsets, particle * 2 * size + offsets
    units = particle * HIDDEN * size + offsets
    result = schedule_free_lstm(
        tl.load(grad + first, mask, other=0.0),
        tl.load(step),
        weights + particle * weights_stride,
        (
            momentum + moments[0],
            second_moment + moments[1],
            displacement + first,
            log_rate + first,
            hidden + units,
            cell + units,
        ),
        (
            new_momentum + moments[0],
            new_second_moment + moments[1],
            new_displacement + first,
            new_log_rate + first,
            new_hidden + units,
            new_cell + units,
        ),
        size,
        mask,
        mask,
        MOMENTUM_DECAYS,
        LOG_MOMENTUM_DECAYS,
        SECOND_MOMENT_DECAYS,
        LOG_SECOND_MOMENT_DECAYS,
        TIME_SCALES,
        LARGEST_DIRECTION,
        BOUND,
        RATE,
        RATE_SLOPE,
        GAIN,
        FORGETTING,
        CHANCE,
        SURGE,
        LARGEST_RATIO,
        WARMUP,
        GAIN_SLOPE,
        INTERPOLATION,
        RECENCY,
        RECENCY_SLOPE,
        HIDDEN,
        UNITS,
    )
    tl.store(update + first, result, mask)
