"""Parts of the kernels: the rules, on the coordinates of a program."""

import triton
import triton.language as tl

from .lstm import lstm_layer, maximum, minimum, one_minus_exp, tanh

LARGEST_SQUARED = tl.constexpr(9.223371487098962e18)  # the square of twice this is the largest float32
EPSILON_SQUARED = tl.constexpr(1e-24)


@triton.jit
def of_particle(coordinates, BLOCK: tl.constexpr):
    """Particle of this program, and number of coordinates, both int64; offsets of its coordinates, and which exist."""
    size = coordinates.to(tl.int64)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(1).to(tl.int64), size, offsets, offsets < size


@triton.jit
def averaged(average, values, DECAY: tl.constexpr):
    """An exponential average with one more value; written so that no digits cancel (as ``torch.lerp``)."""
    if DECAY > 0.5:
        average += (1.0 - DECAY) * (values - average)
    else:
        average = values - DECAY * (values - average)
    return average


@triton.jit
def correction(count, LOG_DECAY: tl.constexpr):
    """Factor that takes the bias of the zero start out of an average of ``count`` values; 1 for a decay of 0."""
    factor = 1.0
    if LOG_DECAY < 0:
        factor = 1.0 / one_minus_exp(count * LOG_DECAY)
    return factor


@triton.jit
def log_sign(grad, THRESHOLD: tl.constexpr, P: tl.constexpr):
    """Inputs of ``lstm-l2l``: magnitude and direction of the gradient."""
    magnitude = tl.log(maximum(tl.abs(grad), THRESHOLD)) * (1.0 / P)
    return magnitude, minimum(maximum(grad * (1.0 / THRESHOLD), -1.0), 1.0)


@triton.jit
def clamped(grad):
    """The gradient with a finite square."""
    return minimum(maximum(grad, -LARGEST_SQUARED), LARGEST_SQUARED)


@triton.jit
def time_features(count, TIME_SCALES: tl.constexpr):
    """tanh(step / scale) for each time scale: scalars."""
    values = ()
    for k in tl.static_range(len(TIME_SCALES)):
        values = values + (tanh(count * (1.0 / TIME_SCALES[k])),)
    return values


@triton.jit
def scale_free_inputs(
    grad,
    momenta,
    fast,
    slow,
    count,
    LOG_MOMENTUM_DECAYS: tl.constexpr,
    LOG_SECOND_MOMENT_DECAYS: tl.constexpr,
):
    """Inputs of ``scale-free-lstm`` from the new averages, and ``1 / rms`` of both second moments."""
    fast = fast / one_minus_exp(count * LOG_SECOND_MOMENT_DECAYS[0]) + EPSILON_SQUARED
    slow = slow / one_minus_exp(count * LOG_SECOND_MOMENT_DECAYS[1]) + EPSILON_SQUARED
    over_fast, over_slow = tl.rsqrt(fast), tl.rsqrt(slow)
    inputs = ()
    for k in tl.static_range(len(LOG_MOMENTUM_DECAYS)):
        inputs = inputs + (momenta[k] * correction(count, LOG_MOMENTUM_DECAYS[k]) * over_slow,)
    return inputs + (grad * over_fast, tl.log(fast * over_fast * over_slow)), over_fast, over_slow


@triton.jit
def scale_free_update(
    inputs,
    outputs,
    DIRECTIONS: tl.constexpr,
    ADAM: tl.constexpr,
    BOUND: tl.constexpr,
    SLOPE: tl.constexpr,
    RATE: tl.constexpr,
):
    """Two factors of the update of ``scale-free-lstm``, rate and direction, and the tanh that bounds the first."""
    direction = inputs[ADAM]
    for k in tl.static_range(DIRECTIONS):
        direction += outputs[k] * inputs[k]
    bounded = tanh(outputs[DIRECTIONS] * (SLOPE / BOUND))
    return -RATE * tl.exp(BOUND * bounded), direction, bounded


@triton.jit
def lstm_l2l(
    grad,
    weights,
    hidden,
    cell,
    new_hidden,
    new_cell,
    size,
    mask,
    written,
    THRESHOLD: tl.constexpr,
    P: tl.constexpr,
    OUTPUT_SCALE: tl.constexpr,
    HIDDEN: tl.constexpr,
    LAYERS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Update of rule ``lstm-l2l``: log-and-sign gradient, ``LAYERS`` LSTM layers, linear output.

    ``weights``: the layers as in :func:`lstm_layer`, the last one with its output. The others are pointers to the first
    feature of this program's coordinates; features lie ``size`` apart. The new state is written where ``written``.
    """
    signal = log_sign(grad, THRESHOLD, P)
    for layer in tl.static_range(LAYERS):
        signal = lstm_layer(
            weights,
            (),
            signal,
            hidden,
            cell,
            new_hidden,
            new_cell,
            size,
            mask,
            written,
            2 if layer == 0 else HIDDEN,
            0,
            HIDDEN,
            1 if layer == LAYERS - 1 else 0,
            UNITS,
        )
        weights += HIDDEN * 4 * (1 + (2 if layer == 0 else HIDDEN) + HIDDEN)
        hidden += HIDDEN * size
        cell += HIDDEN * size
        new_hidden += HIDDEN * size
        new_cell += HIDDEN * size
    return OUTPUT_SCALE * signal[0]


@triton.jit
def scale_free_lstm(
    grad,
    count,
    weights,
    momentum,
    second_moment,
    hidden,
    cell,
    new_momentum,
    new_second_moment,
    new_hidden,
    new_cell,
    size,
    mask,
    written,
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
    UNITS: tl.constexpr,
):
    """Update of rule ``scale-free-lstm``: averages, one LSTM layer, a mixture of directions. Arguments as above."""
    grad = clamped(grad)
    square = grad * grad
    fast = averaged(tl.load(second_moment, mask, other=0.0), square, SECOND_MOMENT_DECAYS[0])
    tl.store(new_second_moment, fast, written)
    slow = averaged(tl.load(second_moment + size, mask, other=0.0), square, SECOND_MOMENT_DECAYS[1])
    tl.store(new_second_moment + size, slow, written)
    momenta = ()
    for k in tl.static_range(MOMENTA):
        average = averaged(tl.load(momentum + k * size, mask, other=0.0), grad, MOMENTUM_DECAYS[k])
        tl.store(new_momentum + k * size, average, written)
        momenta = momenta + (average,)
    inputs, _, _ = scale_free_inputs(grad, momenta, fast, slow, count, LOG_MOMENTUM_DECAYS, LOG_SECOND_MOMENT_DECAYS)
    outputs = lstm_layer(
        weights,
        time_features(count, TIME_SCALES),
        inputs,
        hidden,
        cell,
        new_hidden,
        new_cell,
        size,
        mask,
        written,
        MOMENTA + 2,
        len(TIME_SCALES),
        HIDDEN,
        MOMENTA + 2,
        UNITS,
    )
    factor, direction, _ = scale_free_update(inputs, outputs, MOMENTA + 1, ADAM, BOUND, SLOPE, RATE)
    return factor * direction
