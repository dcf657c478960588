"""Parts of the backward kernels that the rules share: gates are computed again, nothing but the state was kept."""

import triton
import triton.language as tl

from .lstm import exp_minus, features, gates, pair, store, tanh
from .rules import correction


@triton.jit
def _sigmoid(x):
    """sigmoid(x), and its derivative without cancellation."""
    power = exp_minus(x, 1.0)
    root = tl.rsqrt(1.0 + power)
    value = root * root
    return value, power * value * value


@triton.jit
def _saturating(x):
    """tanh(x), and its derivative without cancellation."""
    power = exp_minus(tl.abs(x), 2.0)
    root = tl.rsqrt(1.0 + power)
    over = root * root
    return tanh(x), 4.0 * power * over * over


@triton.jit
def _lstm_unit_backward(input_gate, forget_gate, candidate, output_gate, cell, d_hidden, d_cell):
    """Gradients of the four gates before their activation, and of the old cell state."""
    i, slope_i = _sigmoid(input_gate)
    f, slope_f = _sigmoid(forget_gate)
    g, slope_g = _saturating(candidate)
    o, slope_o = _sigmoid(output_gate)
    c, slope_c = _saturating(f * cell + i * g)
    d_cell += d_hidden * o * slope_c
    return d_cell * g * slope_i, d_cell * cell * slope_f, d_cell * i * slope_g, d_hidden * c * slope_o, d_cell * f


@triton.jit
def _added(sums, weights, i, f, g, o, COUNT: tl.constexpr):
    """Gradients of ``COUNT`` signals, with the share of a unit by its four gates; a signal has four weights."""
    result = ()
    for k in tl.static_range(COUNT):
        weight_i, weight_f = pair(weights, 4 * k)
        weight_g, weight_o = pair(weights, 4 * k + 2)
        result = result + (sums[k] + weight_i * i + weight_f * f + weight_g * g + weight_o * o,)
    return result


@triton.jit
def _zeros(like, COUNT: tl.constexpr):
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (tl.full(like.shape, 0.0, tl.float32),)
    return result


@triton.jit
def lstm_layer_backward(
    weights,
    context,
    inputs,
    d_above,
    hidden,
    cell,
    d_new_hidden,
    d_new_cell,
    d_hidden,
    d_cell,
    deltas,
    size,
    mask,
    INPUTS: tl.constexpr,
    CONTEXT: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Backward of :func:`lstm_layer`: returns the gradients of its inputs; writes those of state and gates.

    ``d_above`` is a tuple of gradients: of the linear outputs or, if ``OUTPUTS`` is 0, of the new hidden state as the
    layer above sees it. ``deltas`` points to the rows of this layer's gates, four a unit.
    """
    old = features(hidden, size, mask, HIDDEN)
    output_weights = weights + HIDDEN * 4 * (1 + CONTEXT + INPUTS + HIDDEN) + OUTPUTS
    for unit in range(HIDDEN):
        d_value = tl.load(d_new_hidden + unit * size, mask, other=0.0)
        for k in tl.static_range(OUTPUTS):
            d_value += tl.load(output_weights + unit * OUTPUTS + k) * d_above[k]
        if OUTPUTS == 0:
            for k in tl.static_range(HIDDEN):
                d_value += tl.where(unit == k, d_above[k], 0.0)
        of_unit = weights + unit * (4 * (1 + CONTEXT + INPUTS + HIDDEN))
        i, f, g, o = gates(of_unit, context, inputs, old, CONTEXT, INPUTS, HIDDEN)
        old_cell = tl.load(cell + unit * size, mask, other=0.0)
        d_cell_value = tl.load(d_new_cell + unit * size, mask, other=0.0)
        i, f, g, o, d_cell_value = _lstm_unit_backward(i, f, g, o, old_cell, d_value, d_cell_value)
        tl.store(d_cell + unit * size, d_cell_value, mask)
        store(deltas + unit * 4 * size, (i, f, g, o), size, mask, 4)
    # A loop of its own: signals and their gradients together would not fit the registers.
    tl.debug_barrier()  # deltas are read back
    d_inputs, d_old = _zeros(inputs[0], INPUTS), _zeros(inputs[0], HIDDEN)
    for unit in range(HIDDEN):
        of_unit = weights + (unit * (4 * (1 + CONTEXT + INPUTS + HIDDEN)) + 4 * (1 + CONTEXT))
        i, f, g, o = features(deltas + unit * 4 * size, size, mask, 4)
        d_inputs = _added(d_inputs, of_unit, i, f, g, o, INPUTS)
        d_old = _added(d_old, of_unit + 4 * INPUTS, i, f, g, o, HIDDEN)
    store(d_hidden, d_old, size, mask, HIDDEN)
    return d_inputs


@triton.jit
def outputs_again(weights, new_hidden, size, mask, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr):
    """The linear outputs of :func:`lstm_layer` from the new hidden state, which was kept; ``weights`` are theirs."""
    outputs = ()
    for k in tl.static_range(OUTPUTS):
        outputs = outputs + (tl.full(mask.shape, 0.0, tl.float32) + tl.load(weights + k),)
    for unit in range(HIDDEN):
        activation = tl.load(new_hidden + unit * size, mask, other=0.0)
        following = ()
        for k in tl.static_range(OUTPUTS):
            following = following + (outputs[k] + tl.load(weights + (1 + unit) * OUTPUTS + k) * activation,)
        outputs = following
    return outputs


@triton.jit
def averages_backward(
    d_corrected, d_first, d_new, d_old, count, size, mask, DECAYS: tl.constexpr, LOG_DECAYS: tl.constexpr
):
    """Gradient of the values that were averaged; writes those of the old averages.

    ``d_corrected`` are the gradients of the averages without bias, ``d_new`` points to those of the new ones as they
    are; ``d_first``, if not None, is what the first of the old averages receives besides.
    """
    d_values = tl.full(d_corrected[0].shape, 0.0, tl.float32)
    for k in tl.static_range(len(DECAYS)):
        d_average = tl.load(d_new + k * size, mask, other=0.0) + d_corrected[k] * correction(count, LOG_DECAYS[k])
        d_before = DECAYS[k] * d_average
        if k == 0 and d_first is not None:
            d_before += d_first
        tl.store(d_old + k * size, d_before, mask)
        d_values += (1.0 - DECAYS[k]) * d_average
    return d_values
