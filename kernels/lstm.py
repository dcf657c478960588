"""Parts of the kernels: elementary functions and the LSTM, on one-dimensional values of a program.

Features are tuples of such values, and a gate is a sum of (weight, feature) products: weights are loaded as scalars,
so that no hidden size is padded to a power of two. The arithmetic is float32. ``README.md`` has reasons and counts.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
GATE_BOUND = tl.constexpr(40.0)  # (1 + 2 ** 40) ** 3 is still a float32, and 2 ** -40 is nothing beside 1


@triton.jit
def pair(weights, place):
    """Two float32 weights from one 64-bit load: half the load instructions. ``weights + place`` is 8-byte aligned."""
    both = tl.load((weights + place).to(tl.pointer_type(tl.int64)))
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def minimum(x, y):
    """The smaller; NaN if one is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(x, y):
    """The larger; NaN if one is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0 without cancellation (Taylor's series near 0: its remainder is below 1e-8)."""
    series = 1.0 / 5040 + x * (1.0 / 40320)
    series = 1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * series))
    series = 1.0 + x * (1.0 / 2 + x * (1.0 / 6 + x * series))
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def tanh(x):
    """Accurate also near 0, where 2 sigmoid(2 x) - 1 loses its digits (polynomial: Cephes, tanhf)."""
    square = x * x
    series = -5.37397155531e-2 + square * (2.06390887954e-2 + square * -5.70498872745e-3)
    series = -3.33332819422e-1 + square * (1.33314422036e-1 + square * series)
    power = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - power) / (1.0 + power)
    return tl.where(tl.abs(x) < 0.625, x + x * square * series, tl.where(x < 0.0, -far, far))


@triton.jit
def exp_minus(x, FACTOR: tl.constexpr):
    """exp(-FACTOR x), at most 2 ** 40."""
    return tl.exp2(minimum(x * (-LOG2_E * FACTOR), GATE_BOUND))


@triton.jit
def _lstm_unit(input_gate, forget_gate, candidate, output_gate, cell):
    """New hidden and cell state of one unit, from gates before their activation.

    ``sigmoid(f) c + sigmoid(i) tanh(g)`` and ``sigmoid(o) tanh(c)`` are brought to one denominator each: seven special
    functions instead of ten, and these are the scarcest instructions. Division by a positive number is two products
    with its reciprocal root, which compiles to one instruction where a quotient takes nine.
    """
    i = 1.0 + exp_minus(input_gate, 1.0)
    f = 1.0 + exp_minus(forget_gate, 1.0)
    g = exp_minus(candidate, 2.0)
    input_product = i * (1.0 + g)
    root = tl.rsqrt(input_product * f)
    cell = (cell * input_product + (1.0 - g) * f) * root * root
    o = 1.0 + exp_minus(output_gate, 1.0)
    c = exp_minus(cell, 2.0)
    root = tl.rsqrt(o * (1.0 + c))
    return (1.0 - c) * root * root, cell


@triton.jit
def _weighted(weights, place, i, f, g, o, signal):
    """The four gates of a unit with one more feature."""
    weight_i, weight_f = pair(weights, place)
    weight_g, weight_o = pair(weights, place + 2)
    return i + weight_i * signal, f + weight_f * signal, g + weight_g * signal, o + weight_o * signal


@triton.jit
def gates(weights, context, inputs, old, CONTEXT: tl.constexpr, INPUTS: tl.constexpr, HIDDEN: tl.constexpr):
    """The gates of the unit whose weights begin there, before their activation: input, forget, candidate, output."""
    i, f = pair(weights, 0)
    g, o = pair(weights, 2)
    for k in tl.static_range(CONTEXT):
        i, f, g, o = _weighted(weights, 4 * (1 + k), i, f, g, o, context[k])
    for k in tl.static_range(INPUTS):
        i, f, g, o = _weighted(weights, 4 * (1 + CONTEXT + k), i, f, g, o, inputs[k])
    for k in tl.static_range(HIDDEN):
        i, f, g, o = _weighted(weights, 4 * (1 + CONTEXT + INPUTS + k), i, f, g, o, old[k])
    return i, f, g, o


@triton.jit
def features(pointers, size, mask, COUNT: tl.constexpr):
    """A tuple of ``COUNT`` features, which lie ``size`` apart."""
    values = ()
    for k in tl.static_range(COUNT):
        values = values + (tl.load(pointers + k * size, mask, other=0.0).to(tl.float32),)
    return values


@triton.jit
def store(pointers, values, size, mask, COUNT: tl.constexpr):
    """Write such a tuple."""
    for k in tl.static_range(COUNT):
        tl.store(pointers + k * size, values[k], mask)


@triton.jit
def lstm_layer(
    weights,
    context,
    inputs,
    hidden,
    cell,
    new_hidden,
    new_cell,
    size,
    mask,
    written,
    INPUTS: tl.constexpr,
    CONTEXT: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """One LSTM layer; returns a tuple: its ``OUTPUTS`` linear outputs or, if that is 0, its new hidden state.

    ``hidden`` and ``cell`` are pointers to the state, ``new_hidden`` and ``new_cell`` to where the new one is written;
    they may be the same. ``weights`` holds, unit by unit, the four gates' biases and then their weights on context,
    inputs and hidden state; after all units the outputs' biases, and then, unit by unit, their weights.
    The loop runs over groups of ``UNITS`` units, which keeps the code within the instruction cache; as a register has
    no index, a hidden value finds its place in the tuple by a selection among ``HIDDEN / UNITS``.
    """
    old = features(hidden, size, mask, HIDDEN)
    output_weights = weights + HIDDEN * 4 * (1 + CONTEXT + INPUTS + HIDDEN)
    result = ()
    if OUTPUTS == 0:
        result = old
    for k in tl.static_range(OUTPUTS):
        result = result + (tl.full(old[0].shape, 0.0, tl.float32) + tl.load(output_weights + k),)
    output_weights += OUTPUTS
    for first in range(0, HIDDEN, UNITS):
        for place in tl.static_range(UNITS):
            unit = first + place
            cell_value = tl.load(cell + unit * size, mask, other=0.0).to(tl.float32)
            of_unit = weights + unit * (4 * (1 + CONTEXT + INPUTS + HIDDEN))
            i, f, g, o = gates(of_unit, context, inputs, old, CONTEXT, INPUTS, HIDDEN)
            value, cell_value = _lstm_unit(i, f, g, o, cell_value)
            tl.store(new_cell + unit * size, cell_value.to(new_cell.dtype.element_ty), written)
            tl.store(new_hidden + unit * size, value.to(new_hidden.dtype.element_ty), written)
            following = ()
            for k in tl.static_range(OUTPUTS):
                following = following + (result[k] + tl.load(output_weights + unit * OUTPUTS + k) * value,)
            if OUTPUTS == 0:
                for k in tl.static_range(HIDDEN):
                    if k % UNITS == place:
                        following = following + (tl.where(unit == k, value, result[k]),)
                    else:
                        following = following + (result[k],)
            result = following
    return result
