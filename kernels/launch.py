"""One launch of a rule's kernel for all tensors of a device: rows of addresses, choice of sizes, the launch itself.

Triton is imported by the first launch, not before. On a CPU the launch is a call of compiled C.
"""

import contextlib
import functools
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from learned_optim.kernels import cpu
from learned_optim.kernels.addresses import (
    TableColumns,
    TableRow,
    can_be_addressed,
    of_the_same_dtypes,
    ordinary,
    refuse_mismatch,
    write_back,
)
from learned_optim.kernels.layout import blocks, in_memory_order, pieces
from learned_optim.kernels.tables import on_device, tables

WARPS = 4
"""Warps of a program. Threads of a program share nothing but the cache, so that more would change little."""
UNROLLED_UNITS = 8
"""A layer of at most so many units is one straight piece of code; larger ones loop over their units."""
LARGEST_COPY = 1 << 20
"""Coordinates that are copied at a time, with their state, where a parameter or gradient has gaps or another memory
order than the state."""

OPTIONS = {"enable_fp_fusion": True}
"""Of the compiler: a product and a sum are one instruction. Triton 3.9 warns that it will no longer do so unasked."""

NO_MEMORY = "the memory of a parameter, its gradient or its state has been freed; step while it is there"

Constants = Mapping[str, int | float | tuple[float, ...]]


class Plan(NamedTuple):
    """A rule as its kernel takes it."""

    architecture: str
    constants: Constants
    """Values of the kernel's constexpr arguments of the rule."""
    weights: Tensor
    """Float32, one-dimensional, on the device, in the kernel's order."""
    entries: tuple[str, ...]
    """Names of the entries of the state, in the kernel's order."""
    features: tuple[int, ...]
    """Features of each entry."""
    description: str
    """The constants as JSON, which torch.compile can pass on."""
    key: str
    """Of the program in C; see :func:`learned_optim.kernels.cpu.register`."""
    weights_in_c: Tensor
    """In the order in which that reads them."""


class Sizes(NamedTuple):
    """What is chosen for a kernel by the registers that it then takes (``resources.csv``)."""

    block: int
    """Coordinates of a program."""
    units: int
    """LSTM units of one round of the loop."""
    warps: int = WARPS


class Step(NamedTuple):
    """Settings of a step, as in a parameter group and a ``GradScaler``."""

    lr: float | Tensor
    weight_decay: float
    maximize: bool
    skip_nonfinite: bool
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


def sizes(architecture: str, hidden_size: int) -> Sizes:
    """Coordinates of a thread as many as fit its registers: each shares the loads of weights with the others."""
    if architecture == "lstm-l2l":
        return Sizes(256, 1)
    unrolled = hidden_size <= UNROLLED_UNITS
    return Sizes(512 if unrolled else 256, hidden_size if unrolled else 1)


def step_in_place(
    plan: Plan,
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    entries: Sequence[Sequence[Tensor]],
    steps: Sequence[Tensor],
    scales: Sequence[Tensor | None],
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
        settings: of all parameters.
        block: coordinates of a program; None chooses.

    Raises:
        RuntimeError: a gradient or state is not of its parameter's shape and device; or the entries of a state are not
            dense and in one memory order.
        CompilationError: there is no kernel for these dtypes, and the C compiler makes none; nothing has changed then.
    """
    tensors = TableColumns(parameters, grads, entries, steps, scales)
    sizes = list(map(Tensor.numel, parameters))
    if 0 in sizes:
        tensors = TableColumns.of([row for row, size in zip(tensors.rows(), sizes, strict=True) if size > 0])
        sizes = list(filter(None, sizes))
    if not sizes:
        return
    if can_be_addressed(tensors, sizes, plan.features):
        _launch(plan, tensors, settings, block)
    else:
        _launch_with_copies(plan, tensors.rows(), settings, block)
    torch.autograd.graph.increment_version(list(parameters))


def _launch_with_copies(plan: Plan, originals: Sequence[TableRow], settings: Step, block: int | None) -> None:
    """Step what can be addressed where it is, and the rest in copies."""
    for original in originals:
        refuse_mismatch(original, plan.features)
    rows = [ordinary(original) for original in originals]
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
    choice = sizes(plan.architecture, int(plan.constants["HIDDEN"]))  # type: ignore[arg-type]
    block = block or choice.block
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
        rows += addresses[2:]
        programs += -(-size // block)
    table, tensor_of_program = tables(tuple(rows), len(tensors.parameters), programs, device)
    arguments = {
        "table": table,
        "tensor_of_program": tensor_of_program,
        "weights": plan.weights,
        "step": steps[0],
        **_rate(settings, device),
        "grad_scale": _moved(settings.grad_scale, device),
        "found_inf": _moved(settings.found_inf, device),
        **plan.constants,
        **constants(
            plan.architecture,
            tensors.parameters[0],
            tensors.grads[0],
            [column[0] for column in tensors.entries],
            settings,
            shared=shared,
            scaled=tensors.scales[0] is not None,
        ),
        "BLOCK": block,
        "UNITS": choice.units,
    }
    kernel = getattr(kernels(), KERNELS[plan.architecture])
    with device_guard(device):
        kernel[(programs,)](**arguments, num_warps=choice.warps, **OPTIONS)


def _call(plan: Plan, tensors: TableColumns, settings: Step) -> None:
    """The same on a CPU."""
    if settings.found_inf is not None and settings.found_inf.item() != 0:
        return
    parameters, grads, entries, steps, scales = tensors
    addressed = [parameters, grads, *entries]
    table = np.empty((len(parameters), 5 + len(addressed)), np.int64)
    table[:, 0] = table[:, 1] = list(map(Tensor.numel, parameters))
    table[:, 2] = [cpu.NO_SCALE if scale is None else scale.data_ptr() for scale in scales]
    table[:, 3] = plan.weights_in_c.data_ptr()
    table[:, 4] = list(map(Tensor.data_ptr, steps))
    for place, column in enumerate(addressed, 5):
        table[:, place] = list(map(Tensor.data_ptr, column))
    if not table[:, 4:].all():
        raise RuntimeError(NO_MEMORY)
    lr = float(settings.lr)
    grad_scale = 1.0 if settings.grad_scale is None else settings.grad_scale.item()
    step = _kernel_in_c(plan, tensors)
    step(table, cpu.Settings(lr, lr * settings.weight_decay, grad_scale, settings.maximize, settings.skip_nonfinite))


def _kernel_in_c(plan: Plan, tensors: TableColumns) -> cpu.Kernel:
    columns = tensors.parameters, tensors.grads, *tensors.entries
    return cpu.kernel(plan.key, tuple(column[0].dtype for column in columns))


def _rate(settings: Step, device: torch.device) -> dict[str, Any]:
    """The arguments that say how far to move: ``lr`` as a tensor stays on the device, and is read there."""
    lr = settings.lr
    if isinstance(lr, Tensor) and lr.device == device:
        return {"lr": lr, "weight_decay": float(settings.weight_decay), "LR_ON_DEVICE": True}
    lr = float(lr)  # of the CPU; one of another GPU has to be waited for
    return {"lr": lr, "weight_decay": lr * settings.weight_decay, "LR_ON_DEVICE": False}


@torch.library.custom_op("learned_optim::fused_step", mutates_args=("parameters", "states"))
def traced_step_in_place(
    parameters: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
    scales: list[Tensor],
    weights: Tensor,
    weights_in_c: Tensor,
    key: str,
    architecture: str,
    constants: str,
    features: list[int],
    lr: Tensor,
    weight_decay: Tensor,
    maximize: bool,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """:func:`step_in_place` as torch.compile takes it: one operation, which sees addresses only when it runs.

    Args:
        parameters: as there, and so are the others.
        grads: as above.
        states: all tensors of the first entry, of the second ...
        steps: as above.
        scales: as above, or empty.
        weights: of the plan.
        weights_in_c: of the plan.
        key: of the plan.
        architecture: of the plan.
        constants: the plan's description.
        features: of the plan.
        lr: 0-d, on any device.
        weight_decay: 0-d, on the CPU.
        maximize: as above.
        skip_nonfinite: as above.
        grad_scale: as above.
        found_inf: as above.
    """
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(constants).items()}
    step_in_place(
        Plan(architecture, values, weights, (), tuple(features), constants, key, weights_in_c),
        parameters,
        grads,
        [states[first : first + len(parameters)] for first in range(0, len(states), len(parameters))],
        steps,
        scales or [None] * len(parameters),
        Step(lr, float(weight_decay), maximize, skip_nonfinite, grad_scale, found_inf),
    )


KERNELS = {
    "schedule-free-lstm": "schedule_free_lstm_step",
    "scale-free-lstm": "scale_free_lstm_step",
    "lstm-l2l": "lstm_l2l_step",
}
"""Names of the kernels of the architectures, in ``step.py``."""


def constants(
    architecture: str,
    parameter: Tensor,
    grad: Tensor,
    entries: Sequence[Tensor],
    settings: Step,
    *,
    shared: bool,
    scaled: bool,
) -> dict[str, Any]:
    """Constexpr arguments that follow from the tensors and settings of a launch."""
    hidden, cell = entries[-2:]
    in_table = {} if architecture == "lstm-l2l" else {"STEP_IN_TABLE": not shared}  # which has no use for the count
    return {
        **in_table,
        "PARAMETER_DTYPE": _triton_dtype(parameter.dtype),
        "GRAD_DTYPE": _triton_dtype(grad.dtype),
        "HIDDEN_DTYPE": _triton_dtype(hidden.dtype),
        "CELL_DTYPE": _triton_dtype(cell.dtype),
        "SCALED": scaled,
        "DECAYS": settings.weight_decay != 0,
        "MAXIMIZE": settings.maximize,
        "SKIP_NONFINITE": settings.skip_nonfinite,
    }


def kernels(file: str = "step") -> ModuleType:
    """The kernels of a file; with ``TRITON_INTERPRET=1`` in the environment, as Triton's interpreter runs them."""
    return load_kernels(interpreting(), file)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def in_c(device: torch.device) -> bool:
    """Whether the kernels of a device are those in C, not Triton's."""
    return device.type == "cpu" and not interpreting()


@functools.cache
def load_kernels(interpreted: bool, file: str = "step") -> ModuleType:
    """The kernels to be compiled or interpreted: Triton decides when it decorates, so that each kind is a copy.

    Each kind is a package of its own over the same files, in which they find one another by relative imports.
    """
    name = "learned_optim.kernels." + ("interpreted" if interpreted else "compiled")
    if name not in sys.modules:
        package = ModuleType(name, "Copies of the kernels of one kind.")
        package.__path__ = [str(Path(__file__).parent)]
        sys.modules[name] = package
    return importlib.import_module(f"{name}.{file}")


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
