"""The functions that all kernels in Triton are made of: access to tensors, elementary functions, products.

A program steps ``BLOCK`` coordinates of one tensor. The arithmetic is float32.
"""

import triton
import triton.language as tl

# Columns of a row of the table, one row a tensor; addresses and counts as int64. State entries follow, in their order.
SIZE = tl.constexpr(0)
FIRST_PROGRAM = tl.constexpr(1)
PARAMETER = tl.constexpr(2)
GRAD = tl.constexpr(3)
STEP = tl.constexpr(4)
SCALE = tl.constexpr(5)
SEES_PARAMETER = tl.constexpr(6)
STATE = tl.constexpr(7)

LOG2_E = tl.constexpr(1.4426950408889634)
GATE_BOUND = tl.constexpr(40.0)  # (1 + 2 ** 40) ** 3 is still a float32, and 2 ** -40 is nothing beside 1


# Tensors


@triton.jit
def row_of(table, tensor_of_program, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Row of this program's tensor, its size, and the offsets of this program's coordinates."""
    program = tl.program_id(0)
    row = table + tl.load(tensor_of_program + program).to(tl.int64) * COLUMNS
    size = tl.load(row + SIZE)
    offsets = (program - tl.load(row + FIRST_PROGRAM)) * BLOCK + tl.arange(0, BLOCK)  # int64: so is the column
    return row, size, offsets


@triton.jit
def pointer_in(row, column, DTYPE: tl.constexpr):
    """The address in a column of a row."""
    return tl.load(row + column).to(tl.pointer_type(DTYPE))


@triton.jit
def feature(pointers, size, mask, NUMBER: tl.constexpr):
    """One feature of a tensor; features lie ``size`` apart. Beyond the tensor it is 1, which can be divided by."""
    return tl.load(pointers + NUMBER * size, mask, other=1.0).to(tl.float32)


@triton.jit
def store_feature(pointers, value, size, written, NUMBER: tl.constexpr):
    """Write one feature."""
    tl.store(pointers + NUMBER * size, value.to(pointers.dtype.element_ty), written)


@triton.jit
def count_of(row, step, STEP_IN_TABLE: tl.constexpr):
    """The count of this step, for this tensor or for all."""
    if STEP_IN_TABLE:
        pointer = pointer_in(row, STEP, tl.float32)
    else:
        pointer = step
    return tl.load(pointer)


@triton.jit
def gradient(pointer, mask, grad_scale, found_inf, MAXIMIZE: tl.constexpr, SKIP_NONFINITE: tl.constexpr):
    """The gradient as the rule gets it, and a mask of where parameter and state are written."""
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
def number(given, ON_DEVICE: tl.constexpr):
    """The value of a number that is an argument, or lies on the device."""
    if ON_DEVICE:
        value = tl.load(given).to(tl.float32)
    else:
        value = given
    return value


@triton.jit
def scaled_parameter(row, pointer, mask, SCALED: tl.constexpr):
    """The parameter over its tensor's scale; zero where the rule does not see it."""
    value = tl.load(pointer, mask, other=0.0).to(tl.float32)
    if SCALED:
        value /= tl.load(pointer_in(row, SCALE, tl.float32))
    return tl.where(tl.load(row + SEES_PARAMETER) != 0, value, 0.0)


@triton.jit
def move(
    row,
    pointer,
    mask,
    written,
    update,
    lr,
    weight_decay,
    SCALED: tl.constexpr,
    UPDATE_HAS_LR: tl.constexpr,
    DECAYS: tl.constexpr,
):
    """Add ``lr (scale update - weight_decay parameter)``; with ``UPDATE_HAS_LR`` the update is multiplied already."""
    parameter = tl.load(pointer, mask, other=0.0).to(tl.float32)
    change = update
    if not UPDATE_HAS_LR:
        change *= lr
    if SCALED:
        change *= tl.load(pointer_in(row, SCALE, tl.float32))
    if DECAYS:
        change -= lr * weight_decay * parameter
    tl.store(pointer, (parameter + change).to(pointer.dtype.element_ty), written)


# Elementary functions, of blocks and of single numbers


@triton.jit
def smaller(x, y):
    """The smaller; NaN if one is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(x, y):
    """The larger; NaN if one is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exponential_minus_1(x):
    """exp(x) - 1 without cancellation (Taylor's series near 0: its remainder is below 1e-8)."""
    series = 1.0 / 5040 + x * (1.0 / 40320)
    series = 1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * series))
    series = 1.0 + x * (1.0 / 2 + x * (1.0 / 6 + x * series))
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def hyperbolic_tangent(x):
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
    return tl.exp2(smaller(x * (-LOG2_E * FACTOR), GATE_BOUND))


@triton.jit
def reciprocal_of_positive(x):
    """1 / x of a positive x: one instruction and a product, where a quotient takes nine."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return reciprocal_of_positive(1.0 + exp_minus(x, 1.0))


@triton.jit
def sign(x):
    """-1, 0 or 1; NaN if x is."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))


@triton.jit
def power(x, exponent):
    """A power of a positive number."""
    return tl.exp2(exponent * tl.log2(x))


@triton.jit
def remainder(x, divisor):
    """The remainder of a division, with the sign of the divisor. An approximate quotient could be below 2 for 6 / 3."""
    return x - tl.floor(tl.div_rn(x, divisor)) * divisor


@triton.jit
def lstm_cell(forget, cell, input_gate, candidate):
    """sigmoid(forget) cell + sigmoid(input) tanh(candidate), with one denominator: special functions are scarce."""
    i = 1.0 + exp_minus(input_gate, 1.0)
    f = 1.0 + exp_minus(forget, 1.0)
    g = exp_minus(candidate, 2.0)
    product = i * (1.0 + g)
    return (cell * product + (1.0 - g) * f) * reciprocal_of_positive(product * f)


@triton.jit
def gated_tanh(gate, value):
    """sigmoid(gate) tanh(value), with one denominator."""
    v = exp_minus(value, 2.0)
    return (1.0 - v) * reciprocal_of_positive((1.0 + exp_minus(gate, 1.0)) * (1.0 + v))


# Products


@triton.jit
def pair(weights, PLACE: tl.constexpr):
    """Two float32 weights from one 64-bit load: half the load instructions. ``weights + PLACE`` is 8-byte aligned."""
    both = tl.load((weights + PLACE).to(tl.pointer_type(tl.int64)))
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def add_4_products(weights, a, b, c, d, inputs, COUNT: tl.constexpr):
    """Four sums, each with products of its weights and the inputs. Weights lie input by input, 8-byte aligned."""
    for k in tl.static_range(COUNT):
        weight_a, weight_b = pair(weights, 4 * k)
        weight_c, weight_d = pair(weights, 4 * k + 2)
        signal = inputs[k]
        a, b, c, d = a + weight_a * signal, b + weight_b * signal, c + weight_c * signal, d + weight_d * signal
    return a, b, c, d


@triton.jit
def add_products(weights, sums, inputs, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """Any number of sums, each with products of its weights and the inputs. Weights lie input by input."""
    for k in tl.static_range(COUNT):
        following = ()
        for row in tl.static_range(ROWS):
            following = following + (sums[row] + tl.load(weights + ROWS * k + row) * inputs[k],)
        sums = following
    return sums


@triton.jit
def add_apart(weights, start, inputs, APART: tl.constexpr, COUNT: tl.constexpr):
    """One sum, whose weights lie ``APART`` from one another."""
    for k in tl.static_range(COUNT):
        start = start + tl.load(weights + k * APART) * inputs[k]
    return start


@triton.jit
def lstm_layer(
    weights,
    context,
    inputs,
    starts,
    hidden,
    cell,
    size,
    mask,
    written,
    CONTEXT: tl.constexpr,
    INPUTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """A layer of an LSTM, unit by unit in a loop, which keeps the code within the instruction cache.

    Returns a tuple: the new hidden state or, if ``OUTPUTS`` is not 0, so many sums that begin with ``starts``, to which
    each unit adds its products. ``weights`` holds of each unit four biases, then four weights on each signal of the
    context and each input: of the input, forget, candidate and output gate; then those on the outputs, filled up to an
    even number. ``hidden`` and ``cell`` point to the state of the first unit; the new one is written there. As a
    register has no index, a hidden value finds its place in the tuple by a selection.
    """
    result = starts
    for unit in range(HIDDEN):
        of_unit = weights + unit * (4 * (1 + CONTEXT + INPUTS) + OUTPUTS + OUTPUTS % 2)
        i, f = pair(of_unit, 0)
        g, o = pair(of_unit, 2)
        i, f, g, o = add_4_products(of_unit + 4, i, f, g, o, context, CONTEXT)
        i, f, g, o = add_4_products(of_unit + 4 * (1 + CONTEXT), i, f, g, o, inputs, INPUTS)
        before = tl.load(cell + unit * size, mask, other=0.0).to(tl.float32)
        after = lstm_cell(f, before, i, g)
        tl.store(cell + unit * size, after.to(cell.dtype.element_ty), written)
        value = gated_tanh(o, after)
        tl.store(hidden + unit * size, value.to(hidden.dtype.element_ty), written)
        following = ()
        for k in tl.static_range(OUTPUTS):
            weight = tl.load(of_unit + 4 * (1 + CONTEXT + INPUTS) + k)
            following = following + (result[k] + weight * value,)
        if OUTPUTS == 0:
            for k in tl.static_range(HIDDEN):
                following = following + (tl.where(unit == k, value, result[k]),)
        result = following
    return result
