"""One launch of a rule's kernel for all tensors of a device: rows of addresses, choice of sizes, the launch itself.

Triton is imported by the first launch, not before. On a CPU the launch is a call of compiled C.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from learned_optim.kernels import cpu
from learned_optim.kernels.addresses import (
    DTYPES,
    DTYPES_IN_C,
    TableColumns,
    TableRow,
    can_be_addressed,
    of_the_same_dtypes,
    ordinary,
    refuse_mismatch,
    write_back,
)
from learned_optim.kernels.layout import blocks, in_memory_order, pieces
from learned_optim.kernels.sources import registered, triton_module
from learned_optim.kernels.tables import on_device, tables
from learned_optim.kernels.triton_source import dtype_argument

WARPS = 4
"""Warps of a program. Threads of a program share nothing but the cache, so that more would change little."""
LARGEST_COPY = 1 << 20
"""Coordinates that are copied at a time, with their state, where a parameter or gradient has gaps or another memory
order than the state."""

OPTIONS = {"enable_fp_fusion": True}
"""Of the compiler: a product and a sum are one instruction. Triton 3.9 warns that it will no longer do so unasked."""

NO_MEMORY = "the memory of a parameter, its gradient or its state has been freed; step while it is there"


class Plan(NamedTuple):
    """A rule as its kernel takes it."""

    key: str
    """Of its program; see :func:`learned_optim.kernels.sources.register`."""
    weights: Tensor
    """One-dimensional, on the device, in the order in which the kernel reads them."""
    entries: tuple[str, ...]
    """Names of the entries of the state, in the kernel's order."""
    features: tuple[int, ...]
    """Features of each entry."""


class Step(NamedTuple):
    """Settings of a step, as in a parameter group and a ``GradScaler``."""

    lr: float | Tensor
    weight_decay: float
    maximize: bool
    skip_nonfinite: bool
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    progress: float | Tensor = 0.0
    averaging: bool = True


def step_in_place(
    plan: Plan,
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Sequence[Sequence[Tensor]],
    steps: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    are_given: Sequence[bool],
    settings: Step,
    block: int | None = None,
) -> None:
    """Step all tensors; parameters and states are changed in place.

    Nothing is addressed unchecked. Tensors with gaps, or in another memory order than their state, are stepped in
    contiguous copies of at most :data:`LARGEST_COPY` coordinates, fewer on a CPU; those of a subclass, of another
    dtype, negated lazily or without memory of their own are copied as a whole.

    Args:
        plan: the rule.
        parameters: on one device, of one dtype that is among ``addresses.DTYPES``; any strides.
        grads: of the parameters' shapes; any strides.
        entries: of the state in the kernel's order, each with the tensors of all parameters: ``(features, *shape)``,
            contiguous or each feature dense and in one memory order. Moments are best float32.
        steps: count of this step for each parameter: 0-d float32 tensors, on the device; or on the CPU.
        scales: factor on the update of each parameter: 0-d float32 tensors, on the device; or None for all.
        are_given: whether the rule is told the values of each parameter; otherwise zeros.
        settings: of all parameters.
        block: coordinates of a program; None chooses.

    Raises:
        RuntimeError: a gradient or state is not of its parameter's shape and device; or the entries of a state are not
            dense and in one memory order.
        CompilationError: there is no kernel for these dtypes, and the C compiler makes none; nothing has changed then.
    """
    tensors = TableColumns(parameters, grads, entries, steps, scales, are_given)
    sizes = list(map(Tensor.numel, parameters))
    if 0 in sizes:
        tensors = TableColumns.of([row for row, size in zip(tensors.rows(), sizes, strict=True) if size > 0])
        sizes = list(filter(None, sizes))
    if not sizes:
        return
    if can_be_addressed(tensors, sizes, plan.features, dtypes_of(parameters[0].device)):
        _launch(plan, tensors, settings, block)
    else:
        _launch_with_copies(plan, tensors.rows(), settings, block)
    torch.autograd.graph.increment_version(list(parameters))


def _launch_with_copies(plan: Plan, originals: Sequence[TableRow], settings: Step, block: int | None) -> None:
    """Step what can be addressed where it is, and the rest in copies."""
    for original in originals:
        refuse_mismatch(original, plan.features)
    dtypes = dtypes_of(originals[0].parameter.device)
    rows = [ordinary(original, dtypes) for original in originals]
    direct: list[TableRow] = []
    copied: list[TableRow] = []
    largest_copy = cpu.LARGEST_COPY if in_c(rows[0].parameter.device) else LARGEST_COPY
    for row in rows:
        parameter, grad, entries = in_memory_order(row.parameter, row.grad, row.entries)
        if parameter.is_contiguous() and grad.is_contiguous():
            direct.append(row._replace(parameter=parameter, grad=grad, entries=entries))
            continue
        flat_entries = [entry.view(len(entry), -1) for entry in entries]
        for index, flat in pieces(parameter.shape, largest_copy):
            piece = [entry[:, flat] for entry in flat_entries]
            copied.append(row._replace(parameter=parameter[index], grad=grad[index], entries=piece))
    if in_c(rows[0].parameter.device):
        for group in of_the_same_dtypes([*direct, *copied]):
            _kernel_in_c(plan, TableColumns.of(group[:1]))  # may fail, and has to before anything is changed
    for group in of_the_same_dtypes(direct):
        _launch(plan, TableColumns.of(group), settings, block)
    for group in of_the_same_dtypes(copied):
        for together in blocks([row.parameter.numel() for row in group], largest_copy):
            _launch_on_copies(plan, [group[place] for place in together], settings, block)
    for row, original in zip(rows, originals, strict=True):
        write_back(row, original)


def _launch_on_copies(plan: Plan, originals: Sequence[TableRow], settings: Step, block: int | None) -> None:
    """One launch for tensors or pieces of any strides."""
    contiguous = [
        row._replace(
            parameter=row.parameter.contiguous(),
            grad=row.grad.contiguous(),
            entries=[entry.contiguous() for entry in row.entries],
        )
        for row in originals
    ]
    _launch(plan, TableColumns.of(contiguous), settings, block)
    for row, original in zip(contiguous, originals, strict=True):
        write_back(row, original)


def _launch(plan: Plan, tensors: TableColumns, settings: Step, block: int | None) -> None:
    """One launch for contiguous tensors."""
    device = tensors.parameters[0].device
    if in_c(device):
        _call(plan, tensors, settings)
        return
    first = tensors.steps[0]
    shared = all(step is first for step in tensors.steps)
    steps = on_device([first] if shared else list(tensors.steps), device)
    block = block or registered(plan.key).block
    rows: list[int] = []
    programs = 0
    for place, row in enumerate(tensors.rows()):
        size = row.parameter.numel()
        addresses = [tensor.data_ptr() for tensor in (row.parameter, row.grad, *row.entries)]
        if not all(addresses):
            raise RuntimeError(NO_MEMORY)
        rows += (size, programs, *addresses[:2])
        rows.append(0 if shared else steps[place].data_ptr())
        rows.append(0 if row.scale is None else row.scale.data_ptr())
        rows.append(int(row.is_given))
        rows += addresses[2:]
        programs += -(-size // block)
    table, tensor_of_program = tables(tuple(rows), len(tensors.parameters), programs, device)
    arguments = {
        "table": table,
        "tensor_of_program": tensor_of_program,
        "weights": plan.weights,
        "step": steps[0],
        "lr": _number(settings.lr, device),
        "weight_decay": float(settings.weight_decay),
        "progress": _number(settings.progress, device),
        "averaging": float(settings.averaging),
        "grad_scale": _moved(settings.grad_scale, device),
        "found_inf": _moved(settings.found_inf, device),
        **constants(plan, tensors, settings, shared=shared),
        "LR_ON_DEVICE": _is_on(settings.lr, device),
        "PROGRESS_ON_DEVICE": _is_on(settings.progress, device),
        "BLOCK": block,
    }
    with device_guard(device):
        triton_module(plan.key, interpreting()).step[(programs,)](**arguments, num_warps=WARPS, **OPTIONS)


def _call(plan: Plan, tensors: TableColumns, settings: Step) -> None:
    """The same on a CPU."""
    if settings.found_inf is not None and settings.found_inf.item() != 0:
        return
    parameters, grads, entries, steps, scales, are_given = tensors
    addressed = [parameters, grads, *entries]
    table = np.empty((len(parameters), cpu.FIXED_COLUMNS + len(addressed)), np.int64)
    table[:, 0] = table[:, 1] = list(map(Tensor.numel, parameters))
    table[:, 2] = [cpu.ONE if scale is None else scale.data_ptr() for scale in scales]
    table[:, 3] = cpu.ZERO + (cpu.ONE - cpu.ZERO) * np.array(are_given)
    table[:, 4] = 0
    table[:, 5] = plan.weights.data_ptr()
    table[:, 6] = list(map(Tensor.data_ptr, steps))
    for place, column in enumerate(addressed, cpu.FIXED_COLUMNS):
        table[:, place] = list(map(Tensor.data_ptr, column))
    if not table[:, 6:].all():
        raise RuntimeError(NO_MEMORY)
    lr = float(settings.lr)
    factor = 1.0 if registered(plan.key).conditions else lr
    grad_scale = 1.0 if settings.grad_scale is None else settings.grad_scale.item()
    step = _kernel_in_c(plan, tensors)
    step(
        table,
        cpu.Settings(
            0.0,
            lr,
            float(settings.progress),
            settings.averaging,
            factor,
            lr * settings.weight_decay,
            grad_scale,
            settings.maximize,
            settings.skip_nonfinite,
        ),
    )


def _kernel_in_c(plan: Plan, tensors: TableColumns) -> cpu.Kernel:
    columns = tensors.parameters, tensors.grads, *tensors.entries
    return cpu.kernel(plan.key, tuple(column[0].dtype for column in columns))


def _number(value: float | Tensor, device: torch.device) -> float | Tensor:
    """An argument of a kernel: a tensor stays on the device, and is read there; one that is elsewhere is waited for."""
    return value if _is_on(value, device) else float(value)


def _is_on(value: float | Tensor, device: torch.device) -> bool:
    return isinstance(value, Tensor) and value.device == device


@torch.library.custom_op("learned_optim::fused_step", mutates_args=("parameters", "states"))
def traced_step_in_place(
    parameters: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
    scales: list[Tensor],
    weights: Tensor,
    key: str,
    features: list[int],
    are_given: list[bool],
    lr: Tensor,
    weight_decay: Tensor,
    maximize: bool,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    progress: Tensor,
    averaging: bool,
) -> None:
    """:func:`step_in_place` as torch.compile takes it: one operation, which sees addresses only when it runs.

    Args:
        parameters: as there, and so are the others.
        grads: as above.
        states: all tensors of the first entry, of the second ...
        steps: as above.
        scales: as above, or empty.
        weights: of the plan.
        key: of the plan.
        features: of the plan.
        are_given: as above.
        lr: 0-d, on any device.
        weight_decay: 0-d, on the CPU.
        maximize: as above.
        skip_nonfinite: as above.
        grad_scale: as above.
        found_inf: as above.
        progress: 0-d, on any device.
        averaging: as above.
    """
    step_in_place(
        Plan(key, weights, (), tuple(features)),
        parameters,
        grads,
        [states[first : first + len(parameters)] for first in range(0, len(states), len(parameters))],
        steps,
        scales or [None] * len(parameters),
        are_given,
        Step(lr, float(weight_decay), maximize, skip_nonfinite, grad_scale, found_inf, progress, averaging),
    )


def constants(plan: Plan, tensors: TableColumns, settings: Step, *, shared: bool) -> dict[str, Any]:
    """Constexpr arguments that follow from the tensors and settings of a launch."""
    entries = {
        dtype_argument(entry): _triton_dtype(column[0].dtype)
        for entry, column in zip(registered(plan.key).program.features, tensors.entries, strict=True)
    }
    return {
        "PARAMETER_DTYPE": _triton_dtype(tensors.parameters[0].dtype),
        "GRAD_DTYPE": _triton_dtype(tensors.grads[0].dtype),
        **entries,
        "LR_GIVEN": registered(plan.key).conditions,
        "SCALED": tensors.scales[0] is not None,
        "DECAYS": settings.weight_decay != 0,
        "MAXIMIZE": settings.maximize,
        "SKIP_NONFINITE": settings.skip_nonfinite,
        "STEP_IN_TABLE": not shared,
    }


def dtypes_of(device: torch.device) -> tuple[torch.dtype, ...]:
    """What the kernels of a device read and write."""
    return DTYPES_IN_C if in_c(device) else DTYPES


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def in_c(device: torch.device) -> bool:
    """Whether the kernels of a device are those in C, not Triton's."""
    return device.type == "cpu" and not interpreting()


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return tensor if tensor is None or tensor.device == device else tensor.to(device, non_blocking=True)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the device current, where launches go."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return guard
