"""The fused step: one call of a rule's kernel for all tensors of a device, in compiled C or in Triton.

Tensors that a kernel cannot address where they lie are stepped in copies.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from learned_optim.kernels.addresses import (
    can_be_addressed,
    group_by_dtypes,
    ordinary,
    refuse_mismatch,
    write_back,
)
from learned_optim.kernels.cpu.kernel import TILE
from learned_optim.kernels.cpu.launch import kernel_for, launch_c
from learned_optim.kernels.devices import supported_dtypes, uses_c
from learned_optim.kernels.gpu.launch import launch_triton
from learned_optim.kernels.layout import blocks, in_memory_order, pieces
from learned_optim.kernels.slots import Columns, Slot, StepSettings
from learned_optim.kernels.sources.registry import registered

LARGEST_COPY_GPU = 1 << 20
"""Coordinates that are copied at a time, with their state, where a parameter or gradient has gaps or another memory
order than the state."""
LARGEST_COPY_CPU = 16 * TILE
"""Coordinates that are copied at a time on a CPU; these copies stay in the cache."""


class Plan(NamedTuple):
    """A rule in the form that its kernel takes."""

    key: str
    """The key of its program; see :func:`learned_optim.kernels.sources.registry.register`."""
    weights: Tensor
    """One-dimensional, on the device, in the order in which the kernel reads them."""
    entries: tuple[str, ...]
    """Names of the entries of the state, in the kernel's order."""
    features: tuple[int, ...]
    """Features of each entry."""


def launch(plan: Plan, columns: Columns, settings: StepSettings, block: int | None = None) -> None:
    """Step all tensors; parameters and states are changed in place.

    Nothing is addressed unchecked. Tensors with gaps, or in another memory order than their state, are stepped in
    contiguous copies of at most :data:`LARGEST_COPY_GPU` coordinates, fewer on a CPU; those of a subclass, of another
    dtype, negated lazily or without memory of their own are copied as a whole.

    Args:
        plan: the rule.
        columns: parameters of one device and one dtype, among those of
            :func:`~learned_optim.kernels.devices.supported_dtypes`, with any strides; gradients of their shapes, with
            any strides; entries of the state in the plan's order, ``(features, *shape)``, contiguous or each feature
            dense and in one memory order; step counts and scales as float32.
        settings: the settings of the step, which hold for all parameters.
        block: coordinates of a program on a GPU, a power of two; None chooses.

    Raises:
        RuntimeError: a gradient or state is not of its parameter's shape and device; or the entries of a state are not
            dense and in one memory order.
        CompilationError: there is no kernel for these dtypes, and the C compiler makes none; nothing has changed then.
    """
    parameters = columns.parameters
    sizes = list(map(Tensor.numel, parameters))
    if not any(sizes):
        return
    if 0 in sizes:
        columns = columns.at([place for place, size in enumerate(sizes) if size > 0])
        sizes = list(filter(None, sizes))
    if can_be_addressed(columns, sizes, plan.features, supported_dtypes(parameters[0].device)):
        _launch(plan, columns, settings, block)
    else:
        _launch_with_copies(plan, columns.slots(), settings, block)
    torch.autograd.graph.increment_version(list(parameters))


def _launch_with_copies(plan: Plan, originals: Sequence[Slot], settings: StepSettings, block: int | None) -> None:
    """Step what can be addressed where it is, and the rest in copies."""
    for original in originals:
        refuse_mismatch(original, plan.features)
    dtypes = supported_dtypes(originals[0].parameter.device)
    slots = [ordinary(original, dtypes) for original in originals]
    direct: list[Slot] = []
    copied: list[Slot] = []
    largest_copy = LARGEST_COPY_CPU if uses_c(slots[0].parameter.device) else LARGEST_COPY_GPU
    for slot in slots:
        parameter, grad, entries = in_memory_order(slot.parameter, slot.grad, list(slot.state.values()))
        if parameter.is_contiguous() and grad.is_contiguous():
            state = dict(zip(slot.state, entries, strict=True))
            direct.append(slot._replace(parameter=parameter, grad=grad, state=state))
            continue
        flat_state = {name: entry.view(len(entry), -1) for name, entry in zip(slot.state, entries, strict=True)}
        for index, flat in pieces(parameter.shape, largest_copy):
            piece = {name: entry[:, flat] for name, entry in flat_state.items()}
            copied.append(slot._replace(parameter=parameter[index], grad=grad[index], state=piece))
    if uses_c(slots[0].parameter.device):
        for group in group_by_dtypes([*direct, *copied]):
            kernel_for(plan.key, Columns.of(group[:1]))  # may fail, and has to before anything is changed
    for group in group_by_dtypes(direct):
        _launch(plan, Columns.of(group), settings, block)
    for group in group_by_dtypes(copied):
        for together in blocks([slot.parameter.numel() for slot in group], largest_copy):
            _launch_on_copies(plan, [group[place] for place in together], settings, block)
    for slot, original in zip(slots, originals, strict=True):
        write_back(slot, original)


def _launch_on_copies(plan: Plan, originals: Sequence[Slot], settings: StepSettings, block: int | None) -> None:
    """One launch for tensors or pieces of any strides."""
    contiguous = [
        slot._replace(
            parameter=slot.parameter.contiguous(),
            grad=slot.grad.contiguous(),
            state={name: entry.contiguous() for name, entry in slot.state.items()},
        )
        for slot in originals
    ]
    _launch(plan, Columns.of(contiguous), settings, block)
    for slot, original in zip(contiguous, originals, strict=True):
        write_back(slot, original)


def _launch(plan: Plan, columns: Columns, settings: StepSettings, block: int | None) -> None:
    """One launch for contiguous tensors."""
    if uses_c(columns.parameters[0].device):
        launch_c(plan.key, plan.weights, columns, settings)
    else:
        launch_triton(plan.key, plan.weights, columns, settings, block)


@torch.library.custom_op("learned_optim::fused_step", mutates_args=("parameters", "states"))
def launch_op(
    parameters: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
    scales: list[Tensor],
    weights: Tensor,
    key: str,
    sees_parameter: list[bool],
    lr: Tensor,
    weight_decay: Tensor,
    maximize: bool,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    progress: Tensor,
    averaging: bool,
) -> None:
    """:func:`launch` as one operation of torch.compile, which sees addresses only when it runs.

    Args:
        parameters: the field of :class:`Columns`.
        grads: the field of :class:`Columns`.
        states: all tensors of the first entry, then all of the second, and so on.
        steps: the field of :class:`Columns`.
        scales: the field of :class:`Columns`, empty if there are none.
        weights: the plan's weights.
        key: the plan's key.
        sees_parameter: the field of :class:`Columns`.
        lr: the field of :class:`StepSettings`, as are the following; 0-d, on any device.
        weight_decay: 0-d, on the CPU.
        maximize: ascend instead of descend.
        skip_nonfinite: leave coordinates of nonfinite gradients alone.
        grad_scale: factor of a ``GradScaler`` on the gradients.
        found_inf: not zero if a ``GradScaler`` has found infinities.
        progress: 0-d, on any device.
        averaging: whether parameters may be averages over the steps.
    """
    features, count = registered(key).traced.features, len(parameters)
    by_entry: dict[str, list[Tensor]] = {
        entry: states[number * count : (number + 1) * count] for number, entry in enumerate(features)
    }
    launch(
        Plan(key, weights, tuple(features), tuple(features.values())),
        Columns(parameters, grads, by_entry, steps, [*scales] or [None] * count, sees_parameter),
        StepSettings(lr, float(weight_decay), maximize, skip_nonfinite, grad_scale, found_inf, progress, averaging),
    )
