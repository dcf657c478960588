"""Which tensors a kernel may take by their addresses, and substitutes for those that it may not."""

import itertools
import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

ORDINARY = frozenset({Tensor, nn.Parameter, nn.Buffer})
"""Types of tensors that have memory of their own. What a subclass holds is known to its operations alone."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels read and write."""
DTYPES_IN_C = (*DTYPES, torch.float64)
"""What those on a CPU read and write."""

_dtype, _device = operator.attrgetter("dtype"), operator.attrgetter("device")
_is_cpu = operator.attrgetter("is_cpu")


class TableRow(NamedTuple):
    """What a row of the table points to: a tensor, or a piece of one, with its gradient and state."""

    parameter: Tensor
    grad: Tensor
    entries: Sequence[Tensor]
    step: Tensor
    scale: Tensor | None
    is_given: bool
    """Whether the rule is told the parameter's values; otherwise zeros."""


class TableColumns(NamedTuple):
    """Many rows of one dtype each column, column by column."""

    parameters: Sequence[Tensor]
    grads: Sequence[Tensor]
    entries: Sequence[Sequence[Tensor]]
    """Of each entry of the state, the tensors of all rows."""
    steps: Sequence[Tensor]
    scales: Sequence[Tensor | None]
    are_given: Sequence[bool]

    @classmethod
    def of(cls, rows: Sequence[TableRow]) -> "TableColumns":
        """The columns of some rows."""
        parameters, grads, states, *rest = zip(*rows, strict=True) if rows else ((),) * len(TableRow._fields)
        return cls(parameters, grads, list(zip(*states, strict=True)), *rest)

    def rows(self) -> list[TableRow]:
        """One by one."""
        entries = zip(*self.entries, strict=True)
        return list(map(TableRow, self.parameters, self.grads, entries, self.steps, self.scales, self.are_given))


def can_be_addressed(
    tensors: TableColumns, sizes: Sequence[int], features: Sequence[int], dtypes: Sequence[torch.dtype]
) -> bool:
    """Whether all tensors can be read and written where they are; asked of many at once, which is fast.

    Args:
        tensors: parameters of one dtype, none of them empty.
        sizes: coordinates of each parameter.
        features: of each entry of the state.
        dtypes: that the kernel knows.
    """
    parameters, grads, entries, scales = tensors.parameters, tensors.grads, tensors.entries, tensors.scales
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


def of_the_same_dtypes(rows: Sequence[TableRow]) -> list[list[TableRow]]:
    """The rows in groups that a launch can take together."""
    groups: defaultdict[tuple[torch.dtype, ...], list[TableRow]] = defaultdict(list)
    for row in rows:
        groups[row.parameter.dtype, row.grad.dtype, *map(_dtype, row.entries)].append(row)
    return list(groups.values())


def refuse_mismatch(row: TableRow, features: Sequence[int]) -> None:
    """Raise a RuntimeError if gradient or state are not of the parameter's shape and device."""
    shape, device = row.parameter.shape, row.parameter.device
    tensors = [row.grad, *row.entries]
    shapes = [shape, *((count, *shape) for count in features)]
    for tensor, expected in zip(tensors, shapes, strict=True):
        if tensor.shape != expected or tensor.device != device:
            raise RuntimeError(
                f"a parameter of shape {tuple(shape)} on {device} has a gradient or state of shape "
                f"{tuple(tensor.shape)} on {tensor.device}, where {tuple(expected)} is needed"
            )


def ordinary(row: TableRow, dtypes: Sequence[torch.dtype]) -> TableRow:
    """The row itself, or one with substitutes that a kernel can address, as far as layout does not matter."""
    scale = row.scale
    if scale is not None:
        scale = _substitute(scale, (torch.float32,)).to(row.parameter.device)
    new = row._replace(parameter=_substitute(row.parameter, dtypes), grad=_substitute(row.grad, dtypes), scale=scale)
    entries = [_substitute(entry, dtypes) for entry in row.entries]
    if any(map(operator.is_not, entries, row.entries)):
        new = new._replace(entries=[entry.clone(memory_format=torch.contiguous_format) for entry in entries])
    return row if all(map(operator.is_, new, row)) else new


def _substitute(tensor: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """The tensor, or an ordinary one with its values."""
    if type(tensor) in ORDINARY and tensor.dtype in dtypes and not tensor.is_neg() and not tensor._is_zerotensor():
        return tensor
    dtype = tensor.dtype if tensor.dtype in dtypes else torch.float32
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def write_back(row: TableRow, original: TableRow) -> None:
    """Copy parameter and state of a row into the tensors that they stand for."""
    for target, source in zip([original.parameter, *original.entries], [row.parameter, *row.entries], strict=True):
        if source is not target:
            target.copy_(source)
