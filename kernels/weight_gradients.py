"""Triton kernel that sums deltas times signals over the coordinates: the gradients of a rule's weights."""

import triton
import triton.language as tl

from .rules import time_features

# Where the signals of a product come from
INPUTS_OF_RULE = tl.constexpr(0)
OLD_HIDDEN = tl.constexpr(1)
NEW_HIDDEN = tl.constexpr(2)


@triton.jit
def _add(x, y):
    return x + y


# The interpreter adds arrays only for Triton's own function, whose kind was decided when triton was imported; the
# compiler needs one of its own kind.
_addition = _add if isinstance(_add, triton.JITFunction) else tl.standard._sum_combine


@triton.jit
def _summed_products(
    deltas,
    signals,
    count,
    out,
    first,
    size,
    rows,
    TIME_SCALES: tl.constexpr,
    SPAN: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over ``SPAN`` coordinates of ``rows`` deltas, times 1, the time features and each of ``COUNT`` signals.

    Every lane keeps ``COUNT + 1`` sums of its own, so that lanes are added up but once, in a fixed order.
    """
    row = tl.arange(0, ROWS)
    sums = ()
    for _ in tl.static_range(COUNT + 1):
        sums = sums + (tl.full([ROWS, BLOCK], 0.0, tl.float32),)
    for start in range(0, SPAN, BLOCK):
        offsets = first + start + tl.arange(0, BLOCK)
        mask = offsets < size
        delta = tl.load(
            deltas + (row[:, None] * size + offsets[None, :]), (row[:, None] < rows) & mask[None, :], other=0.0
        )
        following = (sums[0] + delta,)
        for k in tl.static_range(COUNT):
            signal = tl.load(signals + k * size + offsets, mask, other=0.0)
            following = following + (sums[k + 1] + delta * signal[None, :],)
        sums = following
    bias = tl.reduce(sums[0], 1, _addition)
    context = time_features(count, TIME_SCALES)
    out += row
    tl.store(out, bias)
    for k in tl.static_range(len(TIME_SCALES)):
        tl.store(out + (1 + k) * ROWS, bias * context[k])
    for k in tl.static_range(COUNT):
        tl.store(out + (1 + len(TIME_SCALES) + k) * ROWS, tl.reduce(sums[k + 1], 1, _addition))


@triton.jit(do_not_specialize=["coordinates"])
def weight_gradients(
    products,
    step,
    deltas,
    inputs,
    hidden,
    new_hidden,
    partial_sums,
    coordinates,
    TIME_SCALES: tl.constexpr,
    ROWS_OF_DELTAS: tl.constexpr,
    INPUTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    LAYERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the weights, as one partial sum for every ``SPAN`` coordinates.

    A program takes one row of ``products`` ``(number, 4)``: where the signals come from, their layer, and first row and
    number of rows of the deltas. ``partial_sums`` is ``(spans, P, number, COLUMNS, ROWS)``; of the columns, the
    first belongs to the bias, the next to the time features, the others to the signals.
    """
    size = coordinates.to(tl.int64)
    particle = tl.program_id(1).to(tl.int64)
    number = tl.program_id(2)
    place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + particle) * tl.num_programs(2) + number
    out = partial_sums + place * (COLUMNS * ROWS)
    first = tl.program_id(0).to(tl.int64) * SPAN
    source = tl.load(products + 4 * number)
    layer = tl.load(products + 4 * number + 1)
    row = tl.load(products + 4 * number + 2)
    rows = tl.load(products + 4 * number + 3)
    count = tl.load(step)
    deltas += (particle * ROWS_OF_DELTAS + row) * size
    if source == INPUTS_OF_RULE:
        signals = inputs + particle * INPUTS * size
        _summed_products(deltas, signals, count, out, first, size, rows, TIME_SCALES, SPAN, INPUTS, ROWS, BLOCK)
    else:
        of_layer = (particle * LAYERS + layer) * HIDDEN * size
        if source == OLD_HIDDEN:
            signals = hidden + of_layer
        else:
            signals = new_hidden + of_layer
        _summed_products(deltas, signals, count, out, first, size, rows, TIME_SCALES, SPAN, HIDDEN, ROWS, BLOCK)
