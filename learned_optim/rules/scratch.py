"""Memory that steps in place use again and again: fresh memory means page faults, which cost more than arithmetic."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Scratch(threading.local):
    """Buffers by name, on the CPU, as large as the largest that was asked for; each thread has its own."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor whose values mean nothing yet. The next call with this name takes its memory back."""
        count = math.prod(shape)
        buffer = self.buffers.get((name, dtype))
        if buffer is None or len(buffer) < count:
            buffer = self.buffers[name, dtype] = torch.empty(count, dtype=dtype, device="cpu")
        return buffer[:count].view(shape)

    def rows(self, like: Tensor, name: str, count: int) -> Tensor:
        """The same of shape ``(..., count, C)``, in the dtype of ``like``, a gradient ``(..., C)``."""
        return self.empty(name, (*like.shape[:-1], count, like.shape[-1]), like.dtype)


scratch = Scratch()


@contextmanager
def in_dtype(stored: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """``stored`` itself if it has that dtype; else a copy in scratch memory, which is written back in the end."""
    if stored.dtype == dtype:
        yield stored
        return
    copy = scratch.empty("in dtype", tuple(stored.shape), dtype).copy_(stored)
    yield copy
    stored.copy_(copy)
