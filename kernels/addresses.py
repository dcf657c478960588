"""Checks of which tensors a kernel can take by their addresses, and substitutes for the others."""

import itertools
import operator
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from learned_optim.kernels.slots import Columns, Slot

ORDINARY = frozenset({Tensor, nn.Parameter, nn.Buffer})
"""Types of tensors that have memory of their own. The content of a subclass is known to its operations alone."""
FREED_MEMORY = "the memory of a parameter, its gradient or its state has been freed; step while it is there"

_dtype, _device = operator.attrgetter("dtype"), operator.attrgetter("device")
_is_cpu = operator.attrgetter("is_cpu")


def can_be_addressed(
    columns: Columns, sizes: Sequence[int], features: Sequence[int], dtypes: Sequence[torch.dtype]
) -> bool:
    """Whether all tensors can be read and written where they are; many are checked at once, which is fast.

    Args:
        columns: parameters of one dtype, none of them empty.
        sizes: coordinates of each parameter.
        features: number of features of each entry of the state.
        dtypes: the dtypes that the kernel supports.
    """
    parameters, grads, entries, scales = columns.parameters, columns.grads, columns.states.values(), columns.scales
    everything = [*parameters, *grads, *itertools.chain(*entries)]
    device = parameters[0].device
    on_cpu = device.type == "cpu"
    return (
        set(map(type, everything)) <= ORDINARY
        and (all(map(_is_cpu, everything)) if on_cpu else set(map(_device, everything)) == {device})
        and all(map(Tensor.is_contiguous, everything))
        and not any(map(Tensor.is_neg, everything))
        and all(map(Tensor.data_ptr, grads))
        and list(map(Tensor.numel, grads)) == sizes
        and all(
            list(map(Tensor.numel, column)) == [count * size for size in sizes]
            for count, column in zip(features, entries, strict=True)
        )
        and all(_of_one_dtype(column, dtypes) for column in (grads, *entries))
        and (
            scales[0] is None or (set(map(_device, scales)) == {device} and set(map(_dtype, scales)) == {torch.float32})
        )
    )


def _of_one_dtype(tensors: Sequence[Tensor], allowed: Sequence[torch.dtype]) -> bool:
    dtypes = set(map(_dtype, tensors))
    return len(dtypes) == 1 and dtypes <= {*allowed}


def group_by_dtypes(slots: Sequence[Slot]) -> list[list[Slot]]:
    """The slots in groups that one launch can take together."""
    groups: defaultdict[tuple[torch.dtype, ...], list[Slot]] = defaultdict(list)
    for slot in slots:
        groups[slot.parameter.dtype, slot.grad.dtype, *map(_dtype, slot.state.values())].append(slot)
    return list(groups.values())


def refuse_mismatch(slot: Slot, features: Sequence[int]) -> None:
    """Raise a RuntimeError if gradient or state do not have the parameter's shape and device."""
    shape, device = slot.parameter.shape, slot.parameter.device
    tensors = [slot.grad, *slot.state.values()]
    shapes = [shape, *((count, *shape) for count in features)]
    for tensor, expected in zip(tensors, shapes, strict=True):
        if tensor.shape != expected or tensor.device != device:
            raise RuntimeError(
                f"a parameter of shape {tuple(shape)} on {device} has a gradient or state of shape "
                f"{tuple(tensor.shape)} on {tensor.device}, where {tuple(expected)} is needed"
            )


def ordinary(slot: Slot, dtypes: Sequence[torch.dtype]) -> Slot:
    """The slot itself, or one with substitutes that a kernel can address, layout aside."""
    scale = slot.scale
    if scale is not None:
        scale = _substitute(scale, (torch.float32,)).to(slot.parameter.device)
    new = slot._replace(parameter=_substitute(slot.parameter, dtypes), grad=_substitute(slot.grad, dtypes), scale=scale)
    state = {name: _substitute(entry, dtypes) for name, entry in slot.state.items()}
    if any(map(operator.is_not, state.values(), slot.state.values())):
        dense = {name: entry.clone(memory_format=torch.contiguous_format) for name, entry in state.items()}
        new = new._replace(state=dense)
    return slot if all(map(operator.is_, new, slot)) else new


def _substitute(tensor: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """The tensor, or an ordinary one with its values."""
    if type(tensor) in ORDINARY and tensor.dtype in dtypes and not tensor.is_neg() and not tensor._is_zerotensor():
        return tensor
    dtype = tensor.dtype if tensor.dtype in dtypes else torch.float32
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def write_back(slot: Slot, original: Slot) -> None:
    """Copy parameter and state of a substitute into the tensors of the original slot."""
    for target, source in zip(
        [original.parameter, *original.state.values()], [slot.parameter, *slot.state.values()], strict=True
    ):
        if source is not target:
            target.copy_(source)
