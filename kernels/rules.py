"""Parts of the kernels: the rules, on the coordinates of a program."""

import triton
import triton.language as tl

from .lstm import features, lstm_layer, maximum, minimum, one_minus_exp, store, tanh

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
def averages(old, values, DECAYS: tl.constexpr):
    """:func:`averaged` for each of the decays: a tuple."""
    new = ()
    for k in tl.static_range(len(DECAYS)):
        new = new + (averaged(old[k], values, DECAYS[k]),)
    return new


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
    return magnitude, clamped(grad * (1.0 / THRESHOLD), 1.0)


@triton.jit
def clamped(values, BOUND: tl.constexpr):
    """Values within -bound ... bound; NaN stays NaN. Gradients within ``LARGEST_SQUARED`` have a finite square."""
    return minimum(maximum(values, -BOUND), BOUND)


@triton.jit
def time_features(count, TIME_SCALES: tl.constexpr):
    """tanh(step / scale) for each time scale: scalars."""
    values = ()
    for k in tl.static_range(len(TIME_SCALES)):
        values = values + (tanh(count * (1.0 / TIME_SCALES[k])),)
    return values


@triton.jit
def over_rms(second_moments, count, LOG_DECAYS: tl.constexpr):
    """``1 / rms`` of the fast and the slow second moment, and the logarithm of the ratio of these roots."""
    fast = second_moments[0] / one_minus_exp(count * LOG_DECAYS[0]) + EPSILON_SQUARED
    slow = second_moments[1] / one_minus_exp(count * LOG_DECAYS[1]) + EPSILON_SQUARED
    over_fast, over_slow = tl.rsqrt(fast), tl.rsqrt(slow)
    return over_fast, over_slow, tl.log(fast * over_fast * over_slow)


@triton.jit
def momentum_directions(momenta, over, count, LOG_DECAYS: tl.constexpr):
    """Momenta without bias, times ``over``."""
    directions = ()
    for k in tl.static_range(len(LOG_DECAYS)):
        directions = directions + (momenta[k] * correction(count, LOG_DECAYS[k]) * over,)
    return directions


@triton.jit
def scale_free_inputs(
    grad,
    momenta,
    second_moments,
    count,
    LOG_MOMENTUM_DECAYS: tl.constexpr,
    LOG_SECOND_MOMENT_DECAYS: tl.constexpr,
):
    """Inputs of ``scale-free-lstm`` from the new averages, and ``1 / rms`` of both second moments."""
    over_fast, over_slow, log_ratio = over_rms(second_moments, count, LOG_SECOND_MOMENT_DECAYS)
    directions = momentum_directions(momenta, over_slow, count, LOG_MOMENTUM_DECAYS)
    return directions + (grad * over_fast, log_ratio), over_fast, over_slow


@triton.jit
def bounded_exp(values, BOUND: tl.constexpr, SLOPE: tl.constexpr):
    """``exp(BOUND tanh(SLOPE values / BOUND))``, and that tanh."""
    bounded = tanh(values * (SLOPE / BOUND))
    return tl.exp(BOUND * bounded), bounded


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
    scale, bounded = bounded_exp(outputs[DIRECTIONS], BOUND, SLOPE)
    return -RATE * scale, direction, bounded


@triton.jit
def schedule_free_inputs(
    grad,
    before,
    momenta,
    second_moments,
    displacement,
    log_rate,
    count,
    LOG_MOMENTUM_DECAYS: tl.constexpr,
    LOG_SECOND_MOMENT_DECAYS: tl.constexpr,
    LARGEST_DIRECTION: tl.constexpr,
    BOUND: tl.constexpr,
    RATE: tl.constexpr,
):
    """Inputs of ``schedule-free-lstm``, and what its backward pass needs besides.

    ``before`` is the first momentum of before the step, the moments are the new ones. With ``e = displacement * scale``
    the last input is ``e / (1 + abs(e))``. Returned are the inputs, ``1 / rms`` of both second moments, ``scale`` and
    ``1 / (1 + abs(e))``.
    """
    over_fast, over_slow, log_ratio = over_rms(second_moments, count, LOG_SECOND_MOMENT_DECAYS)
    direction = clamped(grad * over_fast, LARGEST_DIRECTION)
    directions = momentum_directions(momenta, over_fast, count, LOG_MOMENTUM_DECAYS)
    agreement = direction * (before * correction(count, LOG_MOMENTUM_DECAYS[0]) * over_fast)
    scale = tl.exp(-log_rate) * (1.0 / (RATE * count))
    averaging = displacement * scale
    root = tl.rsqrt(1.0 + tl.abs(averaging))
    damping = root * root
    inputs = (direction,) + directions + (agreement, log_ratio, log_rate * (1.0 / BOUND), averaging * damping)
    return inputs, over_fast, over_slow, scale, damping


@triton.jit
def adapted_rate(
    agreement,
    log_ratio,
    log_rate,
    outputs,
    count,
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
):
    """What ``schedule-free-lstm`` multiplies the direction with, and the new log rate before it is cut.

    Also how much that changes for an agreement of 1, and the tanh that bounds the first and the last of these.
    """
    gain, bounded_gain = bounded_exp(outputs[1], BOUND, GAIN_SLOPE)
    gain *= GAIN * tl.where(agreement <= 0.0, 1.0 + tl.exp(count * (-1.0 / WARMUP)), 1.0)
    log_rate = (1.0 - FORGETTING) * log_rate + gain * agreement
    credible, _ = beyond_chance(clamped(log_rate, BOUND), CHANCE)
    larger, _ = surge(log_ratio, LARGEST_RATIO)
    factor, bounded_rate = bounded_exp(credible + SURGE * larger + RATE_SLOPE * outputs[0], BOUND, 1.0)
    warmth = tl.minimum(count * (1.0 / WARMUP), 1.0)
    return -RATE * warmth * factor, log_rate, gain, bounded_rate, bounded_gain


@triton.jit
def surge(log_ratio, LARGEST_RATIO: tl.constexpr):
    """How far gradients are above those of late, 0 again where a single one is all there is; the derivative of that."""
    larger = tanh(log_ratio)
    lone = tl.exp(4.0 * log_ratio) * (1.0 / (LARGEST_RATIO * LARGEST_RATIO))
    return larger * (1.0 - lone), (1.0 - larger * larger) * (1.0 - lone) - 4.0 * lone * larger


@triton.jit
def beyond_chance(log_rate, CHANCE: tl.constexpr):
    """What is left of a log rate once chance is allowed for, ``l^3 / (l^2 + CHANCE^2)``; the derivative of that."""
    square = log_rate * log_rate
    kept = square / (square + CHANCE * CHANCE)
    return log_rate * kept, kept * (3.0 - 2.0 * kept)


@triton.jit
def share_of_the_last(recency, count, BOUND: tl.constexpr, RECENCY: tl.constexpr, RECENCY_SLOPE: tl.constexpr):
    """Share of the last of ``count`` points in their mean, ``1 / (1 + others)``; the others; the tanh that bounds."""
    bounded = tanh(recency * (RECENCY_SLOPE / BOUND))
    others = (count - 1.0) * tl.exp(-RECENCY - BOUND * bounded)
    root = tl.rsqrt(1.0 + others)
    return root * root, others, bounded


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
    grad = clamped(grad, LARGEST_SQUARED)
    second_moments = averages(features(second_moment, size, mask, 2), grad * grad, SECOND_MOMENT_DECAYS)
    store(new_second_moment, second_moments, size, written, 2)
    momenta = averages(features(momentum, size, mask, MOMENTA), grad, MOMENTUM_DECAYS)
    store(new_momentum, momenta, size, written, MOMENTA)
    inputs, _, _ = scale_free_inputs(
        grad, momenta, second_moments, count, LOG_MOMENTUM_DECAYS, LOG_SECOND_MOMENT_DECAYS
    )
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


@triton.jit
def schedule_free_lstm(
    grad,
    count,
    weights,
    state,
    new_state,
    size,
    mask,
    written,
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
    UNITS: tl.constexpr,
):
    """Update of rule ``schedule-free-lstm``: averages, one LSTM layer, a move at the coordinate's own rate, its mean.

    ``state`` and ``new_state`` are tuples of pointers to the entries, in their order; the others are as above.
    """
    momentum, second_moment, displacement, log_rate, hidden, cell = state
    new_momentum, new_second_moment, new_displacement, new_log_rate, new_hidden, new_cell = new_state
    grad = clamped(grad, LARGEST_SQUARED)
    second_moments = averages(features(second_moment, size, mask, 2), grad * grad, SECOND_MOMENT_DECAYS)
    store(new_second_moment, second_moments, size, written, 2)
    old_momenta = features(momentum, size, mask, len(MOMENTUM_DECAYS))
    momenta = averages(old_momenta, grad, MOMENTUM_DECAYS)
    store(new_momentum, momenta, size, written, len(MOMENTUM_DECAYS))
    old_displacement = tl.load(displacement, mask, other=0.0)
    old_log_rate = tl.load(log_rate, mask, other=0.0)
    inputs, _, _, _, _ = schedule_free_inputs(
        grad,
        old_momenta[0],
        momenta,
        second_moments,
        old_displacement,
        old_log_rate,
        count,
        LOG_MOMENTUM_DECAYS,
        LOG_SECOND_MOMENT_DECAYS,
        LARGEST_DIRECTION,
        BOUND,
        RATE,
    )
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
        len(MOMENTUM_DECAYS) + 5,
        len(TIME_SCALES),
        HIDDEN,
        3,
        UNITS,
    )
    agreement, log_ratio = inputs[1 + len(MOMENTUM_DECAYS)], inputs[2 + len(MOMENTUM_DECAYS)]
    factor, new_rate, _, _, _ = adapted_rate(
        agreement,
        log_ratio,
        old_log_rate,
        outputs,
        count,
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
    )
    tl.store(new_log_rate, clamped(new_rate, BOUND), written)
    move = factor * inputs[0]
    ahead = old_displacement + move
    share, _, _ = share_of_the_last(outputs[2], count, BOUND, RECENCY, RECENCY_SLOPE)
    tl.store(new_displacement, (1.0 - share) * ahead, written)
    return (1.0 - INTERPOLATION) * move + INTERPOLATION * share * ahead
