"""Triton kernels that step all coordinates of all tensors of a launch: features, LSTM, update, weight decay.

A program steps ``BLOCK`` coordinates of one tensor. Its state and inputs are tuples of one-dimensional tensors, one a
feature, and a gate is a sum of (weight, feature) products: weights are loaded as scalars, so no hidden size is padded
to a power of two, and the arithmetic is float32 throughout. ``kernels/README.md`` has the reasons and the counts.
"""

import triton
import triton.language as tl

# Columns of a row of the table, one row a tensor; addresses and counts as int64. State entries follow, in their order.
SIZE = tl.constexpr(0)
FIRST_PROGRAM = tl.constexpr(1)
PARAMETER = tl.constexpr(2)
GRAD = tl.constexpr(3)
STEP = tl.constexpr(4)
STATE = tl.constexpr(5)

LOG2_E = tl.constexpr(1.4426950408889634)
GATE_BOUND = tl.constexpr(40.0)  # (1 + 2 ** 40) ** 3 is still a float32, and 2 ** -40 is nothing beside 1
LARGEST_SQUARED = tl.constexpr(9.223371487098962e18)  # the square of twice this is the largest float32
EPSILON_SQUARED = tl.constexpr(1e-24)


@triton.jit
def _pair(weights, place):
    """Two float32 weights from one 64-bit load: half the load instructions. ``weights + place`` is 8-byte aligned."""
    both = tl.load((weights + place).to(tl.pointer_type(tl.int64)))
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _minimum(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0 without cancellation (Taylor's series near 0: its remainder is below 1e-8)."""
    series = 1.0 / 5040 + x * (1.0 / 40320)
    series = 1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * series))
    series = 1.0 + x * (1.0 / 2 + x * (1.0 / 6 + x * series))
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _tanh(x):
    """Accurate also near 0, where 2 sigmoid(2 x) - 1 loses its digits (polynomial: Cephes, tanhf)."""
    square = x * x
    series = -5.37397155531e-2 + square * (2.06390887954e-2 + square * -5.70498872745e-3)
    series = -3.33332819422e-1 + square * (1.33314422036e-1 + square * series)
    power = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - power) / (1.0 + power)
    return tl.where(tl.abs(x) < 0.625, x + x * square * series, tl.where(x < 0.0, -far, far))


@triton.jit
def _row(table, tensor_of_program, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Row of this program's tensor, its size, and the offsets of this program's coordinates."""
    program = tl.program_id(0)
    row = table + tl.load(tensor_of_program + program).to(tl.int64) * COLUMNS
    size = tl.load(row + SIZE)
    offsets = (program - tl.load(row + FIRST_PROGRAM)) * BLOCK + tl.arange(0, BLOCK)  # int64: so is the column
    return row, size, offsets


@triton.jit
def _pointer(row, column, DTYPE: tl.constexpr):
    return tl.load(row + column).to(tl.pointer_type(DTYPE))


@triton.jit
def _gradient(pointer, mask, grad_scale, found_inf, MAXIMIZE: tl.constexpr, SKIP_NONFINITE: tl.constexpr):
    """The gradient as the rule sees it, and where parameter and state are to be written."""
    grad = tl.load(pointer, mask, other=0.0).to(tl.float32)
    if grad_scale is not None:
        grad = grad / tl.load(grad_scale).to(tl.float32)
    if MAXIMIZE:
        grad = -grad
    written = mask
    if found_inf is not None:
        found = tl.full(mask.shape, 0.0, tl.float32) + tl.load(found_inf).to(tl.float32)
        written = written & (found == 0.0)
    if SKIP_NONFINITE:
        finite = tl.abs(grad) < float("inf")
        grad = tl.where(finite, grad, 0.0)
        written = written & finite
    return grad, written


@triton.jit
def _move(pointer, mask, written, update, lr, weight_decay, LR_ON_DEVICE: tl.constexpr, DECAYS: tl.constexpr):
    """Add ``lr (update - weight_decay parameter)`` to the parameter. A ``weight_decay`` from the host includes lr."""
    parameter = tl.load(pointer, mask, other=0.0).to(tl.float32)
    if LR_ON_DEVICE:
        rate = tl.load(lr).to(tl.float32)
        decay = rate * weight_decay
    else:
        rate = lr
        decay = weight_decay
    change = rate * update
    if DECAYS:
        change -= decay * parameter
    tl.store(pointer, (parameter + change).to(pointer.dtype.element_ty), written)


@triton.jit
def _exp_minus(x, FACTOR: tl.constexpr):
    """exp(-FACTOR x), at most 2 ** 40."""
    return tl.exp2(_minimum(x * (-LOG2_E * FACTOR), GATE_BOUND))


@triton.jit
def _lstm_unit(input_gate, forget_gate, candidate, output_gate, cell):
    """New hidden and cell state of one unit, from gates before their activation.

    ``sigmoid(f) c + sigmoid(i) tanh(g)`` and ``sigmoid(o) tanh(c)`` are brought to one denominator each: seven special
    functions instead of ten, and these are the scarcest instructions. Division by a positive number is two products
    with its reciprocal root, which compiles to one instruction where a quotient takes nine.
    """
    i = 1.0 + _exp_minus(input_gate, 1.0)
    f = 1.0 + _exp_minus(forget_gate, 1.0)
    g = _exp_minus(candidate, 2.0)
    input_product = i * (1.0 + g)
    root = tl.rsqrt(input_product * f)
    cell = (cell * input_product + (1.0 - g) * f) * root * root
    o = 1.0 + _exp_minus(output_gate, 1.0)
    c = _exp_minus(cell, 2.0)
    root = tl.rsqrt(o * (1.0 + c))
    return (1.0 - c) * root * root, cell


@triton.jit
def _weighted(weights, place, i, f, g, o, signal):
    """The four gates of a unit with one more feature."""
    weight_i, weight_f = _pair(weights, place)
    weight_g, weight_o = _pair(weights, place + 2)
    return i + weight_i * signal, f + weight_f * signal, g + weight_g * signal, o + weight_o * signal


@triton.jit
def _one_unit(
    weights,
    unit,
    context,
    inputs,
    old,
    hidden_pointers,
    cell_pointers,
    size,
    mask,
    written,
    INPUTS: tl.constexpr,
    CONTEXT: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Step a unit, write its state, return its hidden value."""
    cell_pointers += unit * size
    cell = tl.load(cell_pointers, mask, other=0.0).to(tl.float32)
    weights += unit * (4 * (1 + CONTEXT + INPUTS + HIDDEN))
    i, f = _pair(weights, 0)
    g, o = _pair(weights, 2)
    for k in tl.static_range(CONTEXT):
        i, f, g, o = _weighted(weights, 4 * (1 + k), i, f, g, o, context[k])
    for k in tl.static_range(INPUTS):
        i, f, g, o = _weighted(weights, 4 * (1 + CONTEXT + k), i, f, g, o, inputs[k])
    for k in tl.static_range(HIDDEN):
        i, f, g, o = _weighted(weights, 4 * (1 + CONTEXT + INPUTS + k), i, f, g, o, old[k])
    hidden, cell = _lstm_unit(i, f, g, o, cell)
    tl.store(cell_pointers, cell.to(cell_pointers.dtype.element_ty), written)
    tl.store(hidden_pointers + unit * size, hidden.to(hidden_pointers.dtype.element_ty), written)
    return hidden


@triton.jit
def _lstm_layer(
    weights,
    context,
    inputs,
    hidden_pointers,
    cell_pointers,
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

    ``weights`` holds, unit by unit, the four gates' biases and then their weights on context, inputs and hidden state;
    after all units the outputs' biases, and then, unit by unit, their weights.
    The loop runs over groups of ``UNITS`` units, which keeps the code within the instruction cache; as a register has
    no index, a hidden value finds its place in the tuple by a selection among ``HIDDEN / UNITS``.
    """
    old = ()
    for k in tl.static_range(HIDDEN):
        old = old + (tl.load(hidden_pointers + k * size, mask, other=0.0).to(tl.float32),)
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
            hidden = _one_unit(
                weights,
                unit,
                context,
                inputs,
                old,
                hidden_pointers,
                cell_pointers,
                size,
                mask,
                written,
                INPUTS,
                CONTEXT,
                HIDDEN,
            )
            following = ()
            for k in tl.static_range(OUTPUTS):
                following = following + (result[k] + tl.load(output_weights + unit * OUTPUTS + k) * hidden,)
            if OUTPUTS == 0:
                for k in tl.static_range(HIDDEN):
                    if k % UNITS == place:
                        following = following + (tl.where(unit == k, hidden, result[k]),)
                    else:
                        following = following + (result[k],)
            result = following
    return result


@triton.jit
def _averaged(pointers, values, mask, written, DECAY: tl.constexpr):
    """Update an exponential average in place; written so that no digits cancel (as ``torch.lerp``)."""
    average = tl.load(pointers, mask, other=0.0)
    if DECAY > 0.5:
        average += (1.0 - DECAY) * (values - average)
    else:
        average = values - DECAY * (values - average)
    tl.store(pointers, average, written)
    return average


@triton.jit
def lstm_l2l_step(
    table,
    tensor_of_program,
    weights,
    step,
    lr,
    weight_decay,
    grad_scale,
    found_inf,
    THRESHOLD: tl.constexpr,
    P: tl.constexpr,
    OUTPUT_SCALE: tl.constexpr,
    HIDDEN: tl.constexpr,
    LAYERS: tl.constexpr,
    PARAMETER_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    HIDDEN_DTYPE: tl.constexpr,
    CELL_DTYPE: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    DECAYS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Rule ``lstm-l2l``: log-and-sign gradient, ``LAYERS`` LSTM layers, linear output. ``step`` has no influence.

    ``weights``: the layers as in :func:`_lstm_layer`, the last one with its output.
    """
    row, size, offsets = _row(table, tensor_of_program, STATE + 2, BLOCK)
    mask = offsets < size
    grad, written = _gradient(
        _pointer(row, GRAD, GRAD_DTYPE) + offsets, mask, grad_scale, found_inf, MAXIMIZE, SKIP_NONFINITE
    )
    magnitude = tl.log(_maximum(tl.abs(grad), THRESHOLD)) * (1.0 / P)
    direction = _minimum(_maximum(grad * (1.0 / THRESHOLD), -1.0), 1.0)
    hidden_pointers = _pointer(row, STATE, HIDDEN_DTYPE) + offsets
    cell_pointers = _pointer(row, STATE + 1, CELL_DTYPE) + offsets
    signal = (magnitude, direction)
    for layer in tl.static_range(LAYERS):
        signal = _lstm_layer(
            weights,
            (),
            signal,
            hidden_pointers,
            cell_pointers,
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
        hidden_pointers += HIDDEN * size
        cell_pointers += HIDDEN * size
    update = OUTPUT_SCALE * signal[0]
    parameter = _pointer(row, PARAMETER, PARAMETER_DTYPE) + offsets
    _move(parameter, mask, written, update, lr, weight_decay, LR_ON_DEVICE, DECAYS)


@triton.jit
def scale_free_lstm_step(
    table,
    tensor_of_program,
    weights,
    step,
    lr,
    weight_decay,
    grad_scale,
    found_inf,
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
    STEP_IN_TABLE: tl.constexpr,
    PARAMETER_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    HIDDEN_DTYPE: tl.constexpr,
    CELL_DTYPE: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    DECAYS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Rule ``scale-free-lstm``: normalised momenta, one LSTM layer, a mixture of the momenta. Moments are float32.

    ``weights``: the layer as in :func:`_lstm_layer`; its context are the time features, its inputs the directions and
    the ratio of the roots of the second moments, its outputs a coefficient for each direction and the scale.
    """
    row, size, offsets = _row(table, tensor_of_program, STATE + 4, BLOCK)
    mask = offsets < size
    grad, written = _gradient(
        _pointer(row, GRAD, GRAD_DTYPE) + offsets, mask, grad_scale, found_inf, MAXIMIZE, SKIP_NONFINITE
    )
    grad = _minimum(_maximum(grad, -LARGEST_SQUARED), LARGEST_SQUARED)
    if STEP_IN_TABLE:
        count = tl.load(_pointer(row, STEP, tl.float32))
    else:
        count = tl.load(step)

    pointers = _pointer(row, STATE + 1, tl.float32) + offsets
    square = grad * grad
    fast = _averaged(pointers, square, mask, written, SECOND_MOMENT_DECAYS[0])
    fast = fast / _one_minus_exp(count * LOG_SECOND_MOMENT_DECAYS[0]) + EPSILON_SQUARED
    slow = _averaged(pointers + size, square, mask, written, SECOND_MOMENT_DECAYS[1])
    slow = slow / _one_minus_exp(count * LOG_SECOND_MOMENT_DECAYS[1]) + EPSILON_SQUARED
    over_fast, over_slow = tl.rsqrt(fast), tl.rsqrt(slow)

    pointers = _pointer(row, STATE, tl.float32) + offsets
    inputs = ()
    for k in tl.static_range(MOMENTA):
        momentum = _averaged(pointers + k * size, grad, mask, written, MOMENTUM_DECAYS[k])
        if MOMENTUM_DECAYS[k] > 0:
            momentum = momentum * (1.0 / _one_minus_exp(count * LOG_MOMENTUM_DECAYS[k]))
        inputs = inputs + (momentum * over_slow,)
    inputs = inputs + (grad * over_fast, tl.log(fast * over_fast * over_slow))

    context = ()
    for k in tl.static_range(len(TIME_SCALES)):
        context = context + (_tanh(count * (1.0 / TIME_SCALES[k])),)
    output = _lstm_layer(
        weights,
        context,
        inputs,
        _pointer(row, STATE + 2, HIDDEN_DTYPE) + offsets,
        _pointer(row, STATE + 3, CELL_DTYPE) + offsets,
        size,
        mask,
        written,
        MOMENTA + 2,
        len(TIME_SCALES),
        HIDDEN,
        MOMENTA + 2,
        UNITS,
    )
    direction = inputs[ADAM]
    for k in tl.static_range(MOMENTA + 1):
        direction += output[k] * inputs[k]
    log_scale = BOUND * _tanh(output[MOMENTA + 1] * (SLOPE / BOUND))
    update = -RATE * tl.exp(log_scale) * direction
    parameter = _pointer(row, PARAMETER, PARAMETER_DTYPE) + offsets
    _move(parameter, mask, written, update, lr, weight_decay, LR_ON_DEVICE, DECAYS)
