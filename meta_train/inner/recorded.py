"""Functions of tensors whose operations are recorded, so that Python is spared on the way to them."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

CALLS_BEFORE = 50
"""Calls with tensors of the same shapes before the next one is recorded, which takes as long as a hundred calls."""

Kind = tuple[torch.Size, torch.dtype, torch.device]


class Recorded:
    """A function that is called often with tensors of the same shapes, dtypes and devices.

    What functional transforms such as ``vmap(grad(...))`` do in Python takes longer than the operations themselves if
    tensors are small. After some calls the operations are recorded and from then on repeated, with the same results.

    Args:
        function: of trees of nothing but tensors, always nested alike; it does the same operations whatever the values
            are, and has no other inputs. Neither is checked.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._calls: dict[tuple[Kind, ...], int] = {}
        self._records: dict[tuple[Kind, ...], Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """The function's results."""
        tensors = tree_leaves(arguments)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return self.function(*arguments)  # a record may have detached what has a derivative
        kinds = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        if record := self._records.get(kinds):
            return record(*arguments)
        self._calls[kinds] = calls = self._calls.get(kinds, 0) + 1
        if calls <= CALLS_BEFORE:
            return self.function(*arguments)
        self._records[kinds] = make_fx(lambda *inputs: self.function(*inputs))(*arguments)
        return self._records[kinds](*arguments)
