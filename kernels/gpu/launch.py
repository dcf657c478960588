"""The launch of a rule's kernel in Triton: a table of addresses, and the arguments of the kernel.

Triton is imported by the first launch, not before.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from learned_optim.kernels.addresses import FREED_MEMORY
from learned_optim.kernels.devices import interpreting
from learned_optim.kernels.gpu.modules import step_module
from learned_optim.kernels.gpu.tables import on_device, tables
from learned_optim.kernels.slots import Columns, StepSettings
from learned_optim.kernels.sources.registry import registered
from learned_optim.kernels.sources.triton import dtype_argument

WARPS = 4
"""Warps of a program. Threads of a program share nothing but the cache, so that more would change little."""
OPTIONS = {"enable_fp_fusion": True}
"""Options of Triton's compiler: a product and a sum are one instruction. Triton 3.9 warns that it will no longer do so
unasked."""


def launch_triton(
    key: str, weights: Tensor, columns: Columns, settings: StepSettings, block: int | None = None
) -> None:
    """Step contiguous tensors in place.

    Args:
        key: the key of a registered program.
        weights: the rule's weights, in the order in which the kernel reads them, on the device.
        columns: tensors that :func:`~learned_optim.kernels.addresses.can_be_addressed` accepts.
        settings: the settings of the step, which hold for all tensors.
        block: coordinates of a program, a power of two; None takes that of the program.

    Raises:
        RuntimeError: the memory of a tensor has been freed.
        CompilationError: no folder can keep the source of the kernel.
    """
    device = columns.parameters[0].device
    first = columns.steps[0]
    shared = all(step is first for step in columns.steps)
    steps = on_device([first] if shared else list(columns.steps), device)
    block = block or registered(key).block
    rows: list[int] = []
    programs = 0
    for place, slot in enumerate(columns.slots()):
        size = slot.parameter.numel()
        addresses = [tensor.data_ptr() for tensor in (slot.parameter, slot.grad, *slot.state.values())]
        if not all(addresses):
            raise RuntimeError(FREED_MEMORY)
        rows += (size, programs, *addresses[:2])
        rows.append(0 if shared else steps[place].data_ptr())
        rows.append(0 if slot.scale is None else slot.scale.data_ptr())
        rows.append(int(slot.sees_parameter))
        rows += addresses[2:]
        programs += -(-size // block)
    table, tensor_of_program = tables(tuple(rows), len(columns.parameters), programs, device)
    arguments = {
        "table": table,
        "tensor_of_program": tensor_of_program,
        "weights": weights,
        "step": steps[0],
        "lr": _number(settings.lr, device),
        "weight_decay": float(settings.weight_decay),
        "progress": _number(settings.progress, device),
        "averaging": float(settings.averaging),
        "grad_scale": _moved(settings.grad_scale, device),
        "found_inf": _moved(settings.found_inf, device),
        **constants(key, columns, settings, shared=shared),
        "LR_ON_DEVICE": _is_on(settings.lr, device),
        "PROGRESS_ON_DEVICE": _is_on(settings.progress, device),
        "BLOCK": block,
    }
    with device_guard(device):
        step_module(key, interpreting()).step[(programs,)](**arguments, num_warps=WARPS, **OPTIONS)


def _number(value: float | Tensor, device: torch.device) -> float | Tensor:
    """An argument of a kernel: a number, or a tensor on the device; a tensor elsewhere is waited for."""
    return value if _is_on(value, device) else float(value)


def _is_on(value: float | Tensor, device: torch.device) -> bool:
    return isinstance(value, Tensor) and value.device == device


def constants(key: str, columns: Columns, settings: StepSettings, *, shared: bool) -> dict[str, Any]:
    """The constexpr arguments that follow from the program, the tensors and the settings of a launch."""
    entries = {
        dtype_argument(entry): _triton_dtype(column[0].dtype)
        for entry, column in zip(registered(key).traced.features, columns.states.values(), strict=True)
    }
    return {
        "PARAMETER_DTYPE": _triton_dtype(columns.parameters[0].dtype),
        "GRAD_DTYPE": _triton_dtype(columns.grads[0].dtype),
        **entries,
        "UPDATE_HAS_LR": registered(key).conditions,
        "SCALED": columns.scales[0] is not None,
        "DECAYS": settings.weight_decay != 0,
        "MAXIMIZE": settings.maximize,
        "SKIP_NONFINITE": settings.skip_nonfinite,
        "STEP_IN_TABLE": not shared,
    }


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return tensor if tensor is None or tensor.device == device else tensor.to(device, non_blocking=True)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which the device is current, so that launches go to it."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return guard
