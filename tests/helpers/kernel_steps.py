"""Steps by a kernel, by the plain path and by the oracle, and the errors that roundings explain."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from helpers.rounding import OF_KERNELS, Results, assert_only_rounded, spread
from helpers.rules import Build, as_reference, normal
from helpers.slots import as_slots, clones
from learned_optim.kernels.cpu import kernel as cpu_kernel
from learned_optim.kernels.slots import Slot, StepSettings
from learned_optim.rules import (
    LSTML2L,
    Conditions,
    ScaleFreeLSTM,
    ScheduleFreeLSTM,
    UpdateRule,
)
from learned_optim.step import fused, programs
from learned_optim.step.plain import apply_per_tensor

needs_compiler = pytest.mark.skipif(cpu_kernel.compiler() is None, reason="needs a C compiler")
INTERPRETED_BLOCK_SIZE = 1024
"""Coordinates of a program in the interpreter, whose time goes by programs."""
COUNTING: dict[str, Build] = {"scale-free-lstm": ScaleFreeLSTM, "schedule-free-lstm": ScheduleFreeLSTM}
"""Rules that depend on the step count, and move no coordinate whose gradients are zero."""
EACH_KERNEL = COUNTING | {"lstm-l2l": functools.partial(LSTML2L, 2)}


class KernelPlace(NamedTuple):
    """A device or interpreter that kernels run on, and the size of a program there."""

    device: str
    block: int | None
    cuts: bool = False
    """Whether bfloat16 is cut off there instead of rounded, as Triton's interpreter does."""


def slots_on(slots: Sequence[Slot], device: str) -> list[Slot]:
    return [
        Slot(
            slot.parameter.to(device),
            slot.grad.to(device),
            {entry: value.to(device) for entry, value in slot.state.items()},
            slot.step.to(device),
            None if slot.scale is None else slot.scale.to(device),
            slot.sees_parameter,
        )
        for slot in slots
    ]


@torch.no_grad()
def apply_fused(rule: UpdateRule, slots: Sequence[Slot], settings: StepSettings, where: KernelPlace) -> None:
    """The kernel's step of slots on the CPU, wherever it runs; parameters and states lie between poisoned margins."""
    there = slots_on(slots, where.device)
    guarded = [
        slot._replace(
            parameter=in_poison(slot.parameter),
            state={entry: in_poison(value) for entry, value in slot.state.items()},
        )
        for slot in there
    ]
    fused.apply_fused(programs.plan_of(rule.to(where.device)), guarded, settings, where.block)
    rule.cpu()
    for slot, result in zip(slots, guarded, strict=True):
        for old, new in zip(
            [slot.parameter, *slot.state.values()], [result.parameter, *result.state.values()], strict=True
        ):
            assert_margins_are_poisoned(new)
            old.copy_(new)


def in_poison(tensor: Tensor, margin: int = 16) -> Tensor:
    """A copy of the same strides in the middle of a buffer of NaN."""
    copy = tensor.clone()  # dense
    buffer = copy.new_full((tensor.numel() + 2 * margin,), torch.nan)
    return torch.as_strided(buffer, tensor.shape, copy.stride(), margin).copy_(tensor)


def assert_margins_are_poisoned(tensor: Tensor, margin: int = 16) -> None:
    whole = torch.as_strided(tensor, (tensor.numel() + 2 * margin,), (1,), tensor.storage_offset() - margin)
    assert whole[:margin].isnan().all()
    assert whole[margin + tensor.numel() :].isnan().all()


@torch.no_grad()
def oracle_step(rule: UpdateRule, slot: Slot, settings: StepSettings) -> Results:
    """Parameter and state after the step in float64, from the values as they are stored."""
    reference = as_reference(rule)
    reference.steps_taken = int(slot.step) - 1
    for entry, value in slot.state.items():
        if reference.steps_taken > 0:
            setattr(reference, entry, value.double().numpy())
        else:
            assert not value.any()
    grad = -slot.grad.double() if settings.maximize else slot.grad.double()
    update = torch.from_numpy(reference.step(grad.numpy(), *conditions_in_float64(rule, slot, settings)))
    state = {entry: torch.from_numpy(getattr(reference, entry)) for entry in slot.state}
    return {"parameter": stepped(rule, slot, update, settings), **state}


def conditions_in_float64(rule: UpdateRule, slot: Slot, settings: StepSettings) -> tuple[Any, ...]:
    """The conditions of the slot as the oracle takes them, in float64; none for a rule that uses no conditions."""
    if not rule.uses_conditions:
        return ()
    scale = 1.0 if slot.scale is None else slot.scale.double()
    known = torch.as_tensor(slot.sees_parameter)
    values = torch.where(known, slot.parameter.double() / scale, 0.0)
    return values.numpy(), settings.lr, settings.progress, float(settings.averaging)


def stepped(rule: UpdateRule, slot: Slot, update: Tensor, settings: StepSettings) -> Tensor:
    parameter = slot.parameter.double()
    if slot.scale is not None:
        update = slot.scale.double() * update
    of_update = 1.0 if rule.uses_conditions else settings.lr
    return parameter + of_update * update - settings.lr * settings.weight_decay * parameter


@torch.no_grad()
def exact_step(rule: UpdateRule, slot: Slot, settings: StepSettings) -> Results:
    """Parameter and state after the step by the rule itself in float64, for rules that have no oracle."""
    rule = copy.deepcopy(rule).double()
    state = {entry: value.double() for entry, value in slot.state.items()}
    grad = -slot.grad.double() if settings.maximize else slot.grad.double()
    values, *others = conditions_in_float64(rule, slot, settings) or [0.0]
    update, new_state = rule.forward_under(
        Conditions(torch.as_tensor(values), *others), grad, state, slot.step.double()
    )
    return {"parameter": stepped(rule, slot, update, settings), **new_state}


def spread_of_step(rule: UpdateRule, slot: Slot, settings: StepSettings) -> Results:
    """Errors that roundings bring to parameter and state."""
    return spread(lambda: exact_step(rule, slot, settings))


def side_by_side(slots: Sequence[Slot]) -> Slot:
    """All coordinates in one slot; steps and scales become those of coordinates."""
    scales = [slot.scale.expand(slot.grad.shape) for slot in slots if slot.scale is not None]
    return Slot(
        torch.cat([slot.parameter for slot in slots]),
        torch.cat([slot.grad for slot in slots]),
        {entry: torch.cat([slot.state[entry] for slot in slots], 1) for entry in slots[0].state},
        torch.cat([slot.step.expand(slot.grad.shape) for slot in slots]),
        torch.cat(scales) if scales else None,
        torch.cat([torch.full(slot.grad.shape, slot.sees_parameter) for slot in slots]),  # type: ignore[arg-type]
    )


def values_of(slots: Sequence[Slot]) -> Results:
    together = side_by_side(slots)
    return {"parameter": together.parameter, **together.state}


@torch.no_grad()
def assert_only_rounded_step(
    rule: UpdateRule,
    slots: Sequence[Slot],
    settings: StepSettings,
    where: KernelPlace,
    true_step: Callable[[UpdateRule, Slot, StepSettings], Results] = oracle_step,
) -> list[Slot]:
    """One step by the kernel and by the plain path, both held to the oracle; returns the plain path's slots."""
    steps = [true_step(rule, slot, settings) for slot in slots]
    truth = {name: torch.cat([step[name] for step in steps], -1) for name in steps[0]}
    spreads = spread_of_step(rule, side_by_side(slots), settings)
    by_kernel, plain = clones(slots), clones(slots)
    apply_fused(rule, by_kernel, settings, where)
    apply_per_tensor(rule, plain, settings)
    for slots_after, roundings, cuts in ((plain, 1.0, False), (by_kernel, OF_KERNELS, where.cuts)):
        found = values_of(slots_after)
        stored = {name: lost(found[name].dtype, values, cuts) for name, values in truth.items()}
        assert_only_rounded(found, truth, spreads, stored, roundings)
    return plain


def lost(dtype: torch.dtype, values: Tensor, cuts: bool) -> Tensor:
    """Largest error of storing values in a coarser dtype: half a spacing, or a whole one where it is cut off."""
    if dtype == torch.float32:
        return torch.zeros_like(values)
    limits = torch.finfo(dtype)
    spacing = limits.eps * values.abs().clamp(min=limits.smallest_normal)
    return spacing if cuts and dtype == torch.bfloat16 else spacing / 2


def slots_of(rule: UpdateRule, sizes: Sequence[int], dtype: torch.dtype, recurrent: torch.dtype) -> list[Slot]:
    slots = as_slots(rule, [normal(size, seed=size) for size in sizes], dtype, recurrent)
    return [slot._replace(parameter=slot.parameter * 100) for slot in slots]  # so that weight decay counts
