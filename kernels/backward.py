"""Triton kernels that differentiate a step of a rule: gates are computed again, nothing but the state was kept.

They go from the gradients of update and new state to those of gradient and old state, and write the *deltas*: gradients
of all gates and outputs before their activation, ``(rows, coordinates)``, of which ``weight_gradients.py`` makes those
of the weights. ``README.md`` has the formulas.
"""

import triton
import triton.language as tl

from .lstm import features, store
from .lstm_backward import averages_backward, lstm_layer_backward, outputs_again
from .rules import (
    LARGEST_SQUARED,
    adapted_rate,
    averages,
    beyond_chance,
    clamped,
    correction,
    log_sign,
    of_particle,
    scale_free_inputs,
    scale_free_update,
    schedule_free_inputs,
    share_of_the_last,
    surge,
    time_features,
)


@triton.jit(do_not_specialize=["coordinates", "weights_stride"])
def lstm_l2l_backward(
    weights,
    step,
    grad,
    hidden,
    cell,
    new_hidden,
    d_update,
    d_new_hidden,
    d_new_cell,
    d_grad,
    d_hidden,
    d_cell,
    inputs,
    deltas,
    coordinates,
    weights_stride,
    THRESHOLD: tl.constexpr,
    P: tl.constexpr,
    OUTPUT_SCALE: tl.constexpr,
    HIDDEN: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Backward of :func:`lstm_l2l_forward`.

    ``d_x`` is the gradient of ``x``; that of the gradient may be None. The inputs of the first layer are written for
    the second launch: ``inputs`` ``(P, 2, coordinates)``, ``deltas`` ``(P, 4 * LAYERS * HIDDEN + 1, coordinates)``.
    """
    particle, size, offsets, mask = of_particle(coordinates, BLOCK)
    value = tl.load(grad + particle * size + offsets, mask, other=0.0)
    preprocessed = log_sign(value, THRESHOLD, P)
    store(inputs + particle * 2 * size + offsets, preprocessed, size, mask, 2)
    deltas += particle * (4 * LAYERS * HIDDEN + 1) * size + offsets
    d_output = OUTPUT_SCALE * tl.load(d_update + particle * size + offsets, mask, other=0.0)
    tl.store(deltas + 4 * LAYERS * HIDDEN * size, d_output, mask)
    d_above = (d_output,)
    first = particle * (LAYERS * HIDDEN) * size + offsets
    weights += particle * weights_stride
    for layer in tl.static_range(LAYERS - 1, -1, -1):
        of_layer = first + layer * HIDDEN * size
        if layer == 0:
            signal = preprocessed
            weights_of_layer = weights
        else:
            signal = features(new_hidden + (of_layer - HIDDEN * size), size, mask, HIDDEN)
            weights_of_layer = weights + 4 * HIDDEN * (3 + HIDDEN) + (layer - 1) * 4 * HIDDEN * (1 + 2 * HIDDEN)
        d_above = lstm_layer_backward(
            weights_of_layer,
            (),
            signal,
            d_above,
            hidden + of_layer,
            cell + of_layer,
            d_new_hidden + of_layer,
            d_new_cell + of_layer,
            d_hidden + of_layer,
            d_cell + of_layer,
            deltas + layer * 4 * HIDDEN * size,
            size,
            mask,
            2 if layer == 0 else HIDDEN,
            0,
            HIDDEN,
            1 if layer == LAYERS - 1 else 0,
        )
    if d_grad is not None:
        small = tl.abs(value) < THRESHOLD  # NaN is not, and goes on as NaN
        result = tl.where(small, d_above[1], d_above[0] / (P * tl.where(small, 1.0, value)))
        tl.store(d_grad + particle * size + offsets, tl.where(small, result * (1.0 / THRESHOLD), result), mask)


@triton.jit(do_not_specialize=["coordinates", "weights_stride"])
def scale_free_lstm_backward(
    weights,
    step,
    grad,
    momentum,
    second_moment,
    hidden,
    cell,
    new_hidden,
    d_update,
    d_new_momentum,
    d_new_second_moment,
    d_new_hidden,
    d_new_cell,
    d_grad,
    d_momentum,
    d_second_moment,
    d_hidden,
    d_cell,
    inputs,
    deltas,
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
):
    """Backward of :func:`scale_free_lstm_forward`; see :func:`lstm_l2l_backward`.

    ``inputs`` is ``(P, MOMENTA + 2, coordinates)``, ``deltas`` ``(P, 4 * HIDDEN + MOMENTA + 2, coordinates)``.
    """
    particle, size, offsets, mask = of_particle(coordinates, BLOCK)
    first = particle * size + offsets
    first_momentum = particle * MOMENTA * size + offsets
    first_second_moment = particle * 2 * size + offsets
    first_unit = particle * HIDDEN * size + offsets
    inputs += particle * (MOMENTA + 2) * size + offsets
    deltas += particle * (4 * HIDDEN + MOMENTA + 2) * size + offsets
    weights += particle * weights_stride
    count = tl.load(step)

    # The inputs, as in the forward pass
    seen = tl.load(grad + first, mask, other=0.0)
    value = clamped(seen, LARGEST_SQUARED)
    old = features(second_moment + first_second_moment, size, mask, 2)
    second_moments = averages(old, value * value, SECOND_MOMENT_DECAYS)
    momenta = averages(features(momentum + first_momentum, size, mask, MOMENTA), value, MOMENTUM_DECAYS)
    signals, over_fast, over_slow = scale_free_inputs(
        value, momenta, second_moments, count, LOG_MOMENTUM_DECAYS, LOG_SECOND_MOMENT_DECAYS
    )
    store(inputs, signals, size, mask, MOMENTA + 2)

    output_weights = weights + HIDDEN * 4 * (1 + len(TIME_SCALES) + MOMENTA + 2 + HIDDEN)
    outputs = outputs_again(output_weights, new_hidden + first_unit, size, mask, HIDDEN, MOMENTA + 2)
    factor, direction, bounded = scale_free_update(signals, outputs, MOMENTA + 1, ADAM, BOUND, SLOPE, RATE)
    d_result = tl.load(d_update + first, mask, other=0.0)
    d_direction = d_result * factor
    d_outputs = ()
    for k in tl.static_range(MOMENTA + 1):
        d_outputs = d_outputs + (d_direction * signals[k],)
    d_outputs = d_outputs + (d_direction * direction * SLOPE * (1.0 - bounded * bounded),)
    store(deltas + 4 * HIDDEN * size, d_outputs, size, mask, MOMENTA + 2)
    d_inputs = lstm_layer_backward(
        weights,
        time_features(count, TIME_SCALES),
        signals,
        d_outputs,
        hidden + first_unit,
        cell + first_unit,
        d_new_hidden + first_unit,
        d_new_cell + first_unit,
        d_hidden + first_unit,
        d_cell + first_unit,
        deltas,
        size,
        mask,
        MOMENTA + 2,
        len(TIME_SCALES),
        HIDDEN,
        MOMENTA + 2,
    )

    # Through the inputs to averages and gradient; times 2 F for the fast second moment F, and times -2 S for the slow S
    d_ratio = d_inputs[MOMENTA + 1]
    d_slow = d_ratio
    d_momenta = ()
    for k in tl.static_range(MOMENTA):
        d_signal = d_inputs[k] + d_direction * outputs[k]
        if k == ADAM:
            d_signal += d_direction
        d_slow += d_signal * signals[k]
        d_momenta = d_momenta + (d_signal * over_slow,)
    d_signal = d_inputs[MOMENTA] + d_direction * outputs[MOMENTA]
    d_value = d_signal * over_fast + averages_backward(
        d_momenta,
        None,
        d_new_momentum + first_momentum,
        d_momentum + first_momentum,
        count,
        size,
        mask,
        MOMENTUM_DECAYS,
        LOG_MOMENTUM_DECAYS,
    )
    d_fast = 0.5 * (d_ratio - d_signal * signals[MOMENTA]) * over_fast * over_fast
    d_slow = -0.5 * d_slow * over_slow * over_slow
    d_square = averages_backward(
        (d_fast, d_slow),
        None,
        d_new_second_moment + first_second_moment,
        d_second_moment + first_second_moment,
        count,
        size,
        mask,
        SECOND_MOMENT_DECAYS,
        LOG_SECOND_MOMENT_DECAYS,
    )
    if d_grad is not None:
        d_value += 2.0 * value * d_square
        tl.store(d_grad + first, tl.where(tl.abs(seen) > LARGEST_SQUARED, 0.0, d_value), mask)


@triton.jit(do_not_specialize=["coordinates", "weights_stride"])
def schedule_free_lstm_backward(
    weights,
    step,
    grad,
    momentum,
    second_moment,
    displacement,
    log_rate,
    hidden,
    cell,
    new_hidden,
    d_update,
    d_new_momentum,
    d_new_second_moment,
    d_new_displacement,
    d_new_log_rate,
    d_new_hidden,
    d_new_cell,
    d_grad,
    d_momentum,
    d_second_moment,
    d_displacement,
    d_log_rate,
    d_hidden,
    d_cell,
    inputs,
    deltas,
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
):
    """Backward of :func:`schedule_free_lstm_forward`; see :func:`lstm_l2l_backward`.

    With M momenta ``inputs`` is ``(P, M + 5, coordinates)``, ``deltas`` ``(P, 4 * HIDDEN + 3, coordinates)``.
    """
    INPUTS: tl.constexpr = len(MOMENTUM_DECAYS) + 5
    AGREEMENT: tl.constexpr = len(MOMENTUM_DECAYS) + 1  # its place among the inputs, which the others follow
    particle, size, offsets, mask = of_particle(coordinates, BLOCK)
    first = particle * size + offsets
    first_momentum = particle * len(MOMENTUM_DECAYS) * size + offsets
    first_second_moment = particle * 2 * size + offsets
    first_unit = particle * HIDDEN * size + offsets
    inputs += particle * INPUTS * size + offsets
    deltas += particle * (4 * HIDDEN + 3) * size + offsets
    weights += particle * weights_stride
    count = tl.load(step)

    # The inputs, as in the forward pass
    seen = tl.load(grad + first, mask, other=0.0)
    value = clamped(seen, LARGEST_SQUARED)
    old = features(second_moment + first_second_moment, size, mask, 2)
    second_moments = averages(old, value * value, SECOND_MOMENT_DECAYS)
    old_momenta = features(momentum + first_momentum, size, mask, len(MOMENTUM_DECAYS))
    old_displacement = tl.load(displacement + first, mask, other=0.0)
    old_log_rate = tl.load(log_rate + first, mask, other=0.0)
    signals, over_fast, over_slow, scale, damping = schedule_free_inputs(
        value,
        old_momenta[0],
        averages(old_momenta, value, MOMENTUM_DECAYS),
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
    store(inputs, signals, size, mask, INPUTS)

    # From update and new displacement to the outputs
    output_weights = weights + HIDDEN * 4 * (1 + len(TIME_SCALES) + INPUTS + HIDDEN)
    outputs = outputs_again(output_weights, new_hidden + first_unit, size, mask, HIDDEN, 3)
    agreement = signals[AGREEMENT]
    factor, new_rate, gain, bounded_rate, bounded_gain = adapted_rate(
        agreement,
        signals[AGREEMENT + 1],
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
    move = factor * signals[0]
    share, others, bounded_recency = share_of_the_last(outputs[2], count, BOUND, RECENCY, RECENCY_SLOPE)
    d_result = tl.load(d_update + first, mask, other=0.0)
    d_kept = tl.load(d_new_displacement + first, mask, other=0.0)
    d_ahead = (1.0 - share) * d_kept + INTERPOLATION * share * d_result
    d_move = (1.0 - INTERPOLATION) * d_result + d_ahead
    d_log_factor = d_move * move * (1.0 - bounded_rate * bounded_rate)
    _, credit = beyond_chance(clamped(new_rate, BOUND), CHANCE)
    d_rate = tl.load(d_new_log_rate + first, mask, other=0.0) + d_log_factor * credit
    d_rate = tl.where(tl.abs(new_rate) <= BOUND, d_rate, 0.0)  # as torch.clamp: at the bound it still follows
    d_gain = d_rate * agreement * gain * (1.0 - bounded_gain * bounded_gain)
    d_share = (INTERPOLATION * d_result - d_kept) * (old_displacement + move)
    d_recency = d_share * share * share * others * (1.0 - bounded_recency * bounded_recency)
    d_outputs = (RATE_SLOPE * d_log_factor, GAIN_SLOPE * d_gain, RECENCY_SLOPE * d_recency)
    store(deltas + 4 * HIDDEN * size, d_outputs, size, mask, 3)
    d_inputs = lstm_layer_backward(
        weights,
        time_features(count, TIME_SCALES),
        signals,
        d_outputs,
        hidden + first_unit,
        cell + first_unit,
        d_new_hidden + first_unit,
        d_new_cell + first_unit,
        d_hidden + first_unit,
        d_cell + first_unit,
        deltas,
        size,
        mask,
        INPUTS,
        len(TIME_SCALES),
        HIDDEN,
        3,
    )

    # Through the inputs to state and gradient; times 2 F for the fast second moment F
    d_averaging = d_inputs[AGREEMENT + 3] * damping * damping
    d_scaled = d_averaging * scale
    tl.store(d_displacement + first, d_ahead + d_scaled, mask)
    d_before = (1.0 - FORGETTING) * d_rate + d_inputs[AGREEMENT + 2] * (1.0 / BOUND) - d_scaled * old_displacement
    tl.store(d_log_rate + first, d_before, mask)
    d_agreement = d_inputs[AGREEMENT] + gain * d_rate
    _, slope = surge(signals[AGREEMENT + 1], LARGEST_RATIO)
    d_ratio = d_inputs[AGREEMENT + 1] + SURGE * d_log_factor * slope
    d_fast = d_ratio - d_agreement * agreement
    d_momenta = ()
    for k in tl.static_range(1, AGREEMENT):
        d_fast -= d_inputs[k] * signals[k]
        d_momenta = d_momenta + (d_inputs[k] * over_fast,)
    over_before = correction(count, LOG_MOMENTUM_DECAYS[0]) * over_fast
    d_signal = d_inputs[0] + d_move * factor + d_agreement * old_momenta[0] * over_before
    d_signal = tl.where(tl.abs(value * over_fast) <= LARGEST_DIRECTION, d_signal, 0.0)
    d_fast -= d_signal * signals[0]
    d_value = d_signal * over_fast + averages_backward(
        d_momenta,
        d_agreement * signals[0] * over_before,
        d_new_momentum + first_momentum,
        d_momentum + first_momentum,
        count,
        size,
        mask,
        MOMENTUM_DECAYS,
        LOG_MOMENTUM_DECAYS,
    )
    d_square = averages_backward(
        (0.5 * d_fast * over_fast * over_fast, -0.5 * d_ratio * over_slow * over_slow),
        None,
        d_new_second_moment + first_second_moment,
        d_second_moment + first_second_moment,
        count,
        size,
        mask,
        SECOND_MOMENT_DECAYS,
        LOG_SECOND_MOMENT_DECAYS,
    )
    if d_grad is not None:
        d_value += 2.0 * value * d_square
        tl.store(d_grad + first, tl.where(tl.abs(seen) > LARGEST_SQUARED, 0.0, d_value), mask)
