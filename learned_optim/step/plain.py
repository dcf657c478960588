"""The plain step, in torch operations: the rule is called once for each tensor, or once for each cache-sized block."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from learned_optim.kernels.layout import blocks, in_memory_order, pieces
from learned_optim.kernels.slots import Slot, StepSettings
from learned_optim.rules import Conditions, RuleState, UpdateRule

CPU_BLOCK_BYTES = 16 << 20
"""Activations of one block on a CPU: larger blocks leave the caches, smaller ones spend their time between operations
(chosen with benchmarks/speed/step_time.py)."""
GPU_BLOCK_BYTES = 1 << 30
"""Activations of one block on a GPU: bounds the memory that a step borrows."""
LANES = 64
"""A block is filled up with zeros to a multiple of this. Vector registers then have no remainder, for which torch takes
other instructions, and matrix products no odd column: the bits of a coordinate do not depend on its neighbours.
(Found by trial: 32 is enough for float32 with AVX2; registers of AVX-512 are twice as wide.)"""
DOUBLE_LANES = 192
"""The multiple that blocks of float64 are filled up to. (Found by trial: on an AMD EPYC products agree in every bit at
multiples of 192 only.)"""


def apply_per_tensor(rule: UpdateRule, slots: Sequence[Slot], settings: StepSettings) -> None:
    """Step every slot in place, one call of the rule each: the ground truth for every faster path.

    The only path that autograd can follow.

    Args:
        rule: the rule, on the slots' device and in the dtype of the arithmetic.
        slots: parameters with gradients and states; parameters and states are changed, gradients are not.
        settings: the settings of the parameter group for this step.
    """
    for slot in slots:
        state = {entry: tensor.clone() for entry, tensor in slot.state.items()}  # autograd may keep what it reads
        parameter = slot.parameter.clone()
        shown = parameter if slot.sees_parameter else None
        change, state = _step(rule, parameter, shown, slot.grad, state, slot.step, slot.scale, settings)
        slot.parameter.add_(change)
        for entry, tensor in state.items():
            slot.state[entry].copy_(tensor)


def apply_in_blocks(
    rule: UpdateRule, slots: Sequence[Slot], settings: StepSettings, block_size: int | None = None
) -> None:
    """Step every slot in place, with small tensors packed together and large ones cut into blocks.

    The result of a coordinate does not depend, to the bit, on which others share its block. Nothing larger than a block
    is copied, whatever the layout of memory.

    Args:
        rule: the rule, on the slots' device and in the dtype of the arithmetic.
        slots: parameters of one dtype, with gradients and states of the same dtypes; parameters and states are changed,
            gradients are not.
        settings: the settings of the parameter group for this step.
        block_size: coordinates of a block; None chooses by rule and device.

    Raises:
        RuntimeError: the entries of a state are not dense and in one memory order.
    """
    if not slots:
        return
    size = block_size or default_block_size(rule, slots[0].parameter.device)
    slots = [_in_memory_order(slot) for slot in slots]
    for block in blocks([slot.grad.numel() for slot in slots], size):
        _apply_to_block(rule, [slots[place] for place in block], size, settings)


def default_block_size(rule: UpdateRule, device: torch.device) -> int:
    """Coordinates whose activations fit the block of this kind of device, a multiple of :data:`LANES`."""
    units = max(1, sum(rule.state_features.values()))
    bytes_per_coordinate = 4 * 8 * units  # gates, activations and copies: about eight float32 values for each feature
    available = CPU_BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
    return max(1024, available // bytes_per_coordinate // LANES * LANES)


def _apply_to_block(rule: UpdateRule, slots: Sequence[Slot], block_size: int, settings: StepSettings) -> None:
    if len(slots) > 1 or slots[0].grad.numel() <= block_size:
        _apply_to_whole(rule, slots, settings)
        return
    (slot,) = slots
    parameter, grad = slot.parameter, slot.grad
    if parameter.is_contiguous() and grad.is_contiguous():
        parameter, grad = parameter.view(-1), grad.view(-1)
    state = {entry: _per_feature(tensor) for entry, tensor in slot.state.items()}
    for index, flat in pieces(parameter.shape, block_size):
        part = {entry: tensor[:, flat] for entry, tensor in state.items()}
        _apply_to_whole(rule, [slot._replace(parameter=parameter[index], grad=grad[index], state=part)], settings)


def _in_memory_order(slot: Slot) -> Slot:
    parameter, grad, entries = in_memory_order(slot.parameter, slot.grad, list(slot.state.values()))
    return slot._replace(parameter=parameter, grad=grad, state=dict(zip(slot.state, entries, strict=True)))


def _apply_to_whole(rule: UpdateRule, slots: Sequence[Slot], settings: StepSettings) -> None:
    """One call of the rule for all the slots, with few Python operations a slot: models have thousands of tensors."""
    parameters, grads, states, steps, scales, sees_parameter = zip(*slots, strict=True)
    sizes = [grad.numel() for grad in grads]
    total = sum(sizes)
    padding = -total % (DOUBLE_LANES if _dtype(rule) == torch.float64 else LANES)
    # view, not reshape: a copy of a state would be updated in its place, and lost
    views = {entry: [_per_feature(state[entry]) for state in states] for entry in states[0]}
    state = {entry: _side_by_side(tensors, padding, 0.0) for entry, tensors in views.items()}
    if all(step is steps[0] for step in steps):
        step = steps[0]
    else:
        step = _side_by_side([step.expand(size) for step, size in zip(steps, sizes, strict=True)], padding, 1.0)
    if scales[0] is None or len(slots) == 1:
        scale = scales[0]
    else:
        scale = _side_by_side([scale.expand(size) for scale, size in zip(scales, sizes, strict=True)], padding, 1.0)
    parameter = None if settings.weight_decay == 0 else _flattened(parameters, padding)
    shown = None
    if rule.uses_conditions and any(sees_parameter):
        pairs = zip(parameters, sees_parameter, strict=True)
        shown = _flattened([values if sees else torch.zeros_like(values) for values, sees in pairs], padding)
    grad = _flattened(grads, padding)
    reads_back = grad.device.type == "cpu" and not torch.compiler.is_compiling()
    change, state = _step(rule, parameter, shown, grad, state, step, scale, settings, reads_back=reads_back)
    changes = _unflatten_dense_tensors(change, parameters)
    if torch.compiler.is_compiling() or not any(map(Tensor.is_neg, parameters)):
        torch._foreach_add_(parameters, changes)
    else:  # which it refuses
        for parameter, moved in zip(parameters, changes, strict=True):
            parameter.add_(moved)
    for entry, tensor in state.items():
        torch._foreach_copy_(views[entry], tensor[:, :total].split(sizes, dim=1))


def _step(
    rule: UpdateRule,
    parameter: Tensor | None,
    shown: Tensor | None,
    grad: Tensor,
    state: RuleState,
    step: Tensor,
    scale: Tensor | None,
    settings: StepSettings,
    *,
    reads_back: bool = False,
) -> tuple[Tensor, RuleState]:
    """The change of the parameter, to be added to it, and the new state; nothing is overwritten.

    ``parameter`` is needed for the user's weight decay only; ``shown`` is what a rule that uses conditions sees of it.
    ``reads_back`` allows the host to read values, which costs nothing on a CPU.
    """
    grad = _rule_gradient(grad, _dtype(rule), settings)
    if reads_back and math.isfinite(grad.sum()):  # then all gradients are
        settings = settings._replace(skip_nonfinite=False)
    grad, unchanged = _without_nonfinite(grad, settings)
    conditions = _conditions(shown, scale, settings, _dtype(rule))
    update, new_state = rule.forward_under(conditions, grad, state, step)
    if new_state.keys() != state.keys():
        raise ValueError(
            f"forward of the rule {rule.name!r} must return a new state with the entries of state_features, "
            f"{', '.join(state) or 'none'}; it returned {', '.join(new_state) or 'none'}"
        )
    change = _change(update, scale, parameter, settings, follows_lr=rule.uses_conditions)
    if unchanged is None:
        return change, new_state
    return change.masked_fill(unchanged, 0.0), {
        entry: torch.where(unchanged, state[entry], tensor) for entry, tensor in new_state.items()
    }


def _rule_gradient(grad: Tensor, dtype: torch.dtype, settings: StepSettings) -> Tensor:
    """The gradient that the rule gets: unscaled, negated to ascend, in the dtype of the arithmetic."""
    grad = grad.to(dtype)
    if settings.grad_scale is not None:
        grad = grad / settings.grad_scale
    return -grad if settings.maximize else grad


def _without_nonfinite(grad: Tensor, settings: StepSettings) -> tuple[Tensor, Tensor | None]:
    """The gradient without nonfinite values, and a mask of where parameter and state stay unchanged."""
    unchanged = None if settings.found_inf is None else settings.found_inf != 0
    if settings.skip_nonfinite:
        nonfinite = ~grad.isfinite()
        grad = grad.masked_fill(nonfinite, 0.0)
        unchanged = nonfinite if unchanged is None else unchanged | nonfinite
    return grad, unchanged


def _conditions(shown: Tensor | None, scale: Tensor | None, settings: StepSettings, dtype: torch.dtype) -> Conditions:
    """The conditions of the step, in the dtype of the arithmetic."""
    values = 0.0 if shown is None else shown.to(dtype) if scale is None else shown.to(dtype) / scale.to(dtype)
    lr, progress = (
        number.to(dtype) if isinstance(number, Tensor) else number for number in (settings.lr, settings.progress)
    )
    return Conditions(values, lr, progress, float(settings.averaging))


def _change(
    update: Tensor, scale: Tensor | None, parameter: Tensor | None, settings: StepSettings, *, follows_lr: bool
) -> Tensor:
    """``lr (scale update - weight_decay parameter)``, to be added to the parameter.

    The update of a rule that follows lr itself is not multiplied by it.
    """
    change = update if scale is None else scale.to(update.dtype) * update
    if not follows_lr:
        change = settings.lr * change
    if parameter is not None and settings.weight_decay != 0:
        change = change - settings.lr * settings.weight_decay * parameter.to(update.dtype)
    return change


def _per_feature(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.view(len(tensor), -1)


def _flattened(tensors: Sequence[Tensor], padding: int) -> Tensor:
    """All coordinates in one row, followed by ``padding`` zeros."""
    flat: Tensor = _flatten_dense_tensors([*tensors, tensors[0].new_zeros(padding)] if padding else tensors)
    return flat


def _side_by_side(tensors: Sequence[Tensor], padding: int, fill: float) -> Tensor:
    """Tensors joined along the last dimension, followed by ``padding`` columns of ``fill``."""
    if padding:
        tensors = [*tensors, tensors[0].new_full((*tensors[0].shape[:-1], padding), fill)]
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), -1)


def _dtype(rule: UpdateRule) -> torch.dtype:
    return next(rule.parameters()).dtype
