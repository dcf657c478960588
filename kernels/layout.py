"""The order of coordinates in memory, and the division of tensors into blocks: no copy is larger than a block."""

import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

Index = tuple[int | slice, ...]


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions from the outermost to the innermost in memory; those of a contiguous tensor as they are."""
    if tensor.is_contiguous():
        return tuple(range(tensor.dim()))
    return tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))


def laid_out_like(tensor: Tensor, value: Tensor, make: Callable[[Tensor], Tensor] = Tensor.contiguous) -> Tensor:
    """A state ``value`` ``(features, *tensor.shape)`` with each feature dense and in the memory order of ``tensor``.

    ``make`` returns a contiguous tensor for the permuted ``value``: by default itself or a copy.
    """
    order = memory_order(tensor)
    if order == tuple(range(tensor.dim())):
        return make(value)
    back = sorted(range(tensor.dim()), key=order.__getitem__)
    return make(value.permute(0, *[1 + dim for dim in order])).permute(0, *[1 + dim for dim in back])


def in_memory_order(parameter: Tensor, grad: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Views of the same tensors, their dimensions permuted so that the entries of the state are contiguous.

    Without a state, the parameter's own memory order is taken.

    Parameter and gradient are then contiguous too if they have the state's memory order and no gaps.

    Raises:
        RuntimeError: an entry of the state has gaps, or another memory order than the first.
    """
    first = state[0][0] if state else parameter
    if not first.is_contiguous():
        order = memory_order(first)
        parameter, grad = parameter.permute(order), grad.permute(order)
        state = [entry.permute(0, *[1 + dim for dim in order]) for entry in state]
    if not all(entry.is_contiguous() for entry in state):
        raise RuntimeError(
            "the entries of a parameter's state must be contiguous, or dense and all in one memory order: no flat view "
            "can be made of these; use .contiguous()"
        )
    return parameter, grad, list(state)


def pieces(shape: Sequence[int], size: int) -> Iterator[tuple[Index, slice]]:
    """Cut a tensor into boxes of at most ``size`` coordinates that are whole ranges of a contiguous one.

    Yields:
        The index of a box, and the range of its coordinates when the tensor is flat; in order.
    """
    if math.prod(shape) <= size:
        yield (), slice(0, math.prod(shape))
        return
    inner = math.prod(shape[1:])
    if inner > size:
        for place in range(shape[0]):
            for index, flat in pieces(shape[1:], size):
                yield (place, *index), slice(place * inner + flat.start, place * inner + flat.stop)
        return
    rows = size // inner
    for first in range(0, shape[0], rows):
        last = min(first + rows, shape[0])
        yield (slice(first, last),), slice(first * inner, last * inner)


def blocks(sizes: Sequence[int], block_size: int) -> Iterator[list[int]]:
    """Group tensors into blocks, in order: several of at most ``block_size`` coordinates together, or a single one.

    Tensors without coordinates are left out.
    """
    block: list[int] = []
    total = 0
    for place, size in enumerate(sizes):
        if size == 0:
            continue
        if block and total + size > block_size:
            yield block
            block, total = [], 0
        block.append(place)
        total += size
    if block:
        yield block
