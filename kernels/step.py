"""Triton kernels that apply a rule in place to all tensors of an optimizer.

A program steps ``BLOCK`` coordinates of one tensor. The mathematics is that of ``rules.py``, as in ``forward.py``.
"""

import triton
import triton.language as tl

from .rules import lstm_l2l, scale_free_lstm, schedule_free_lstm

# Columns of a row of the table, one row a tensor; addresses and counts as int64. State entries follow, in their order.
SIZE = tl.constexpr(0)
FIRST_PROGRAM = tl.constexpr(1)
PARAMETER = tl.constexpr(2)
GRAD = tl.constexpr(3)
STEP = tl.constexpr(4)
SCALE = tl.constexpr(5)
STATE = tl.constexpr(6)


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
def _count(row, step, STEP_IN_TABLE: tl.constexpr):
    """Count of this step: of this tensor, or of all."""
    if STEP_IN_TABLE:
        pointer = _pointer(row, STEP, tl.float32)
    else:
        pointer = step
    return tl.load(pointer)


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
def _move(
    row,
    pointer,
    mask,
    written,
    update,
    lr,
    weight_decay,
    SCALED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    DECAYS: tl.constexpr,
):
    """Add ``lr (scale update - weight_decay parameter)`` to the parameter.

    A ``weight_decay`` from the host includes lr.
    """
    parameter = tl.load(pointer, mask, other=0.0).to(tl.float32)
    if LR_ON_DEVICE:
        rate = tl.load(lr).to(tl.float32)
        decay = rate * weight_decay
    else:
        rate = lr
        decay = weight_decay
    if SCALED:
        rate *= tl.load(_pointer(row, SCALE, tl.float32))
    change = rate * update
    if DECAYS:
        change -= decay * parameter
    tl.store(pointer, (parameter + change).to(pointer.dtype.element_ty), written)


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
    SCALED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    DECAYS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Step of an optimizer by rule ``lstm-l2l``. ``step`` has no influence."""
    row, size, offsets = _row(table, tensor_of_program, STATE + 2, BLOCK)
    mask = offsets < size
    grad, written = _gradient(
        _pointer(row, GRAD, GRAD_DTYPE) + offsets, mask, grad_scale, found_inf, MAXIMIZE, SKIP_NONFINITE
    )
    hidden = _pointer(row, STATE, HIDDEN_DTYPE) + offsets
    cell = _pointer(row, STATE + 1, CELL_DTYPE) + offsets
    update = lstm_l2l(
        grad,
        weights,
        hidden,
        cell,
        hidden,
        cell,
        size,
        mask,
        written,
        THRESHOLD,
        P,
        OUTPUT_SCALE,
        HIDDEN,
        LAYERS,
        UNITS,
    )
    parameter = _pointer(row, PARAMETER, PARAMETER_DTYPE) + offsets
    _move(row, parameter, mask, written, update, lr, weight_decay, SCALED, LR_ON_DEVICE, DECAYS)


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
    SCALED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    DECAYS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Step of an optimizer by rule ``scale-free-lstm``."""
    row, size, offsets = _row(table, tensor_of_program, STATE + 4, BLOCK)
    mask = offsets < size
    grad, written = _gradient(
        _pointer(row, GRAD, GRAD_DTYPE) + offsets, mask, grad_scale, found_inf, MAXIMIZE, SKIP_NONFINITE
    )
    momentum = _pointer(row, STATE, tl.float32) + offsets
    second_moment = _pointer(row, STATE + 1, tl.float32) + offsets
    hidden = _pointer(row, STATE + 2, HIDDEN_DTYPE) + offsets
    cell = _pointer(row, STATE + 3, CELL_DTYPE) + offsets
    update = scale_free_lstm(
        grad,
        _count(row, step, STEP_IN_TABLE),
        weights,
        momentum,
        second_moment,
        hidden,
        cell,
        momentum,
        second_moment,
        hidden,
        cell,
        size,
        mask,
        written,
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
    parameter = _pointer(row, PARAMETER, PARAMETER_DTYPE) + offsets
    _move(row, parameter, mask, written, update, lr, weight_decay, SCALED, LR_ON_DEVICE, DECAYS)


@triton.jit
def schedule_free_lstm_step(
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
    STEP_IN_TABLE: tl.constexpr,
    PARAMETER_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    HIDDEN_DTYPE: tl.constexpr,
    CELL_DTYPE: tl.constexpr,
    SCALED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    DECAYS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Step of an optimizer by rule ``schedule-free-lstm``."""
    row, size, offsets = _row(table, tensor_of_program, STATE + 6, BLOCK)
    mask = offsets < size
    grad, written = _gradient(
        _pointer(row, GRAD, GRAD_DTYPE) + offsets, mask, grad_scale, found_inf, MAXIMIZE, SKIP_NONFINITE
    )
    state = (
        _pointer(row, STATE, tl.float32) + offsets,
        _pointer(row, STATE + 1, tl.float32) + offsets,
        _pointer(row, STATE + 2, tl.float32) + offsets,
        _pointer(row, STATE + 3, tl.float32) + offsets,
        _pointer(row, STATE + 4, HIDDEN_DTYPE) + offsets,
        _pointer(row, STATE + 5, CELL_DTYPE) + offsets,
    )
    update = schedule_free_lstm(
        grad,
        _count(row, step, STEP_IN_TABLE),
        weights,
        state,
        state,
        size,
        mask,
        written,
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
    parameter = _pointer(row, PARAMETER, PARAMETER_DTYPE) + offsets
    _move(row, parameter, mask, written, update, lr, weight_decay, SCALED, LR_ON_DEVICE, DECAYS)
