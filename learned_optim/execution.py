"""How a rule is applied to the tensors of an optimizer: one tensor at a time, or packed into cache-sized blocks."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.rules import RuleState, UpdateRule

CPU_BLOCK_BYTES = 4 << 20
"""Activations of one block on a CPU: about what the second-level caches hold (found with benchmarks/step_time.py)."""
GPU_BLOCK_BYTES = 1 << 30
"""Activations of one block on a GPU: bounds the memory that a step borrows."""


class Settings(NamedTuple):
    """What a parameter group says about its step."""

    lr: float | Tensor
    """A number or a 0-d tensor."""
    weight_decay: float
    maximize: bool


class Slot(NamedTuple):
    """One parameter with its gradient and state, all on one device."""

    parameter: Tensor
    grad: Tensor
    state: RuleState
    """Entries of shape ``(features, *parameter.shape)``, contiguous."""


class Piece(NamedTuple):
    """Coordinates ``start`` to ``stop`` of the flattened tensors of a slot, given by its place in the list."""

    place: int
    start: int
    stop: int


def apply_per_tensor(rule: UpdateRule, slots: Sequence[Slot], step: Tensor, settings: Settings) -> None:
    """Step every slot in place, one call of the rule each: the ground truth for every faster path.

    Args:
        rule: on the slots' device, in the dtype of the arithmetic.
        slots: parameters with gradients and states; parameters and states are changed, gradients are not.
        step: count of this step, 0-d.
        settings: of the parameter group.
    """
    for slot in slots:
        grad = _signed(slot.grad.to(_dtype(rule)), settings)
        update, state = rule(grad, slot.state, step)
        _move(slot.parameter, update, settings)
        for entry, tensor in state.items():
            slot.state[entry].copy_(tensor)


def apply_in_blocks(
    rule: UpdateRule, slots: Sequence[Slot], step: Tensor, settings: Settings, block_size: int | None = None
) -> None:
    """Like :func:`apply_per_tensor`, with small tensors packed together and large ones cut into blocks.

    Args:
        rule: as above.
        slots: as above; all parameters of one dtype, states alike.
        step: as above.
        settings: as above.
        block_size: coordinates of a block; None chooses by rule and device.
    """
    if not slots:
        return
    size = block_size or default_block_size(rule, slots[0].parameter.device)
    parameters = [slot.parameter.reshape(-1) for slot in slots]  # copies where memory is not contiguous
    grads = [slot.grad.reshape(-1) for slot in slots]
    # view, not reshape: a copy of a state would be updated in its place, and lost
    states = [
        {entry: tensor.view(len(tensor), slot.parameter.numel()) for entry, tensor in slot.state.items()}
        for slot in slots
    ]
    for pieces in blocks([grad.numel() for grad in grads], size):
        grad = _joined([grads[piece.place][piece.start : piece.stop] for piece in pieces], 0)
        views = [
            {entry: tensor[:, piece.start : piece.stop] for entry, tensor in states[piece.place].items()}
            for piece in pieces
        ]
        state = {entry: _joined([view[entry] for view in views], 1) for entry in views[0]}
        update, new_state = rule(_signed(grad.to(_dtype(rule)), settings), state, step)
        lengths = [piece.stop - piece.start for piece in pieces]
        for piece, part in zip(pieces, update.split(lengths), strict=True):
            _move(parameters[piece.place][piece.start : piece.stop], part, settings)
        for entry, tensor in new_state.items():
            for view, part in zip(views, tensor.split(lengths, dim=1), strict=True):
                view[entry].copy_(part)
    for slot, parameter in zip(slots, parameters, strict=True):
        if not slot.parameter.is_contiguous():
            slot.parameter.copy_(parameter.view(slot.parameter.shape))


def blocks(sizes: Sequence[int], block_size: int) -> Iterator[list[Piece]]:
    """Cut tensors of the given sizes into blocks of at most ``block_size`` coordinates, in order, each filled."""
    pieces: list[Piece] = []
    room = block_size
    for place, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            pieces.append(Piece(place, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield pieces
                pieces, room = [], block_size
    if pieces:
        yield pieces


def default_block_size(rule: UpdateRule, device: torch.device) -> int:
    """Coordinates whose activations fit the block of this kind of device."""
    units = sum(rule.state_features.values())
    bytes_per_coordinate = 4 * 8 * units  # gates, activations and copies: about eight float32 values for each feature
    available = CPU_BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
    return max(1024, available // bytes_per_coordinate)


def _move(parameter: Tensor, update: Tensor, settings: Settings) -> None:
    """``parameter <- (1 - lr weight_decay) parameter + lr update``, in place and rounded once to its dtype."""
    change = settings.lr * update
    if settings.weight_decay != 0:
        change -= settings.lr * settings.weight_decay * parameter.to(update.dtype)
    parameter.add_(change)


def _signed(grad: Tensor, settings: Settings) -> Tensor:
    return -grad if settings.maximize else grad


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _dtype(rule: UpdateRule) -> torch.dtype:
    return next(rule.parameters()).dtype
