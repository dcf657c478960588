"""Batches of tensors that one call of a rule serves: the local parts of one device, dtype and step count."""

from collections import defaultdict
from typing import Any

import torch

from learned_optim.kernels.slots import Columns, Slot
from learned_optim.step.modes import fake_mode_of


def batches_of(columns: Columns, *, capturable: bool) -> list[Columns]:
    """Divide parameters into batches that one call of the rule can serve.

    Parameters of a batch have one device, one dtype and, where the host may read it, one step count.

    Args:
        columns: parameters, each with a step count of its own, perhaps on another device.
        capturable: the host must not wait for counts that are not on the CPU.

    Returns:
        The batches. Their counts are on the parameters' device, and are one tensor where they are known to be equal.
    """
    parameters, steps = columns.parameters, columns.steps
    compiling = torch.compiler.is_compiling() or fake_mode_of(parameters[0]) is not None
    keys = [
        (
            parameter.device,
            parameter.dtype,
            None if compiling or (capturable and parameter.device.type != "cpu") else float(step),
        )
        for parameter, step in zip(parameters, steps, strict=True)
    ]
    places: defaultdict[Any, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    result = []
    for (device, _, count), chosen in places.items():
        together = columns if len(places) == 1 else columns.at(chosen)
        if count is not None:
            counts = [torch.full((), count, device=device, dtype=torch.float32)] * len(chosen)
        else:  # with torch.compile, but without capturable, they are elsewhere
            counts = [step.to(device, non_blocking=True) for step in together.steps]
        result.append(together._replace(steps=counts))
    return result


def local_columns(columns: Columns) -> Columns:
    """The columns with the local part of every tensor in its place; see :func:`local_coordinates`."""
    return Columns.of([local_coordinates(slot) for slot in columns.slots()])


def local_coordinates(slot: Slot) -> Slot:
    """The slot of the coordinates that are on this device: all of a tensor, this process's shard of a DTensor."""
    parameter: Any = slot.parameter
    grad: Any = slot.grad
    state: dict[str, Any] = slot.state
    if not hasattr(parameter, "to_local"):
        return slot
    if grad.placements != parameter.placements:
        grad = grad.redistribute(parameter.device_mesh, parameter.placements)
    shards = {entry: tensor.to_local() for entry, tensor in state.items()}
    return slot._replace(parameter=parameter.to_local(), grad=grad.to_local(), state=shards)
