"""The frames of kernels in Triton, which ``triton.py`` fills with the operations of a program."""

HEAD = '''"""{title}, made from its forward. Not to be edited: what is written here is not kept."""

import triton
import triton.language as tl

from .triton_parts import (
    GRAD,
    PARAMETER,
    STATE,
    add_4_products,
    add_apart,
    add_products,
    count_of,
    exponential_minus_1,
    feature,
    gated_tanh,
    gradient,
    hyperbolic_tangent,
    larger,
    lstm_cell,
    lstm_layer,
    move,
    number,
    reciprocal_of_positive,
    remainder,
    scaled_parameter,
    pointer_in,
    power,
    row_of,
    sigmoid,
    sign,
    smaller,
    store_feature,
)


'''
STEP_KERNEL = '''@triton.jit
def step(
    table,
    tensor_of_program,
    weights,
    step,
    lr,
    weight_decay,
    progress,
    averaging,
    grad_scale,
    found_inf,
    PARAMETER_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
{dtypes}
    SCALED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    UPDATE_HAS_LR: tl.constexpr,
    PROGRESS_ON_DEVICE: tl.constexpr,
    DECAYS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    STEP_IN_TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step the coordinates of this program in place."""
    row, size, offsets = row_of(table, tensor_of_program, STATE + {entries}, BLOCK)
    mask = offsets < size
    pointer = pointer_in(row, GRAD, GRAD_DTYPE) + offsets
    grad, written = gradient(pointer, mask, grad_scale, found_inf, MAXIMIZE, SKIP_NONFINITE)
{pointers}

    # What all coordinates share
    count = count_of(row, step, STEP_IN_TABLE)
    lr = number(lr, LR_ON_DEVICE)
    progress = number(progress, PROGRESS_ON_DEVICE)
{body}'''
STEP_BODY = """{shared}

    # The coordinates
    place = pointer_in(row, PARAMETER, PARAMETER_DTYPE) + offsets
{parameter}{update}
    move(row, place, mask, written, {change}, lr, weight_decay, SCALED, UPDATE_HAS_LR, DECAYS)
"""
BRANCH = '''@triton.jit
def branch_of(weights, count, lr, progress, averaging):
    """The number of the branch that this step takes."""
{lines}


'''
LOAD_PARAMETER = "    parameter = scaled_parameter(row, place, mask, SCALED)\n"
SEGMENT_KERNEL = '''@triton.jit
def {kernel}(
{arguments}
    weights,
    size,
    weights_stride,
    BLOCK: tl.constexpr,
):
    """Compute what is written from what is read, for coordinates of one particle."""
    particle = tl.program_id(1).to(tl.int64)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    written = mask
    weights += particle * weights_stride
{pointers}
{update}
'''
