"""Uploads of a launch: the table of addresses, which is kept for as long as these stay the same, and step counts."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TABLES = 64
"""Tables kept, one for each set of addresses: where the allocator returns gradients to the same places, no upload."""

_cache: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()


def tables(rows: tuple[int, ...], tensors: int, programs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows on the device, and for each program the row of its tensor.

    They depend on the arguments alone, so that a kept pair is never out of date.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        table = in_graph(rows, device)
        return table, _tensors_of_programs(table, tensors, programs)
    key = (rows, programs, device, _stream(device))
    if key in _cache:
        _cache.move_to_end(key)
        return _cache[key]
    table = uploaded(rows, torch.int64, device)
    _cache[key] = table, _tensors_of_programs(table, tensors, programs)
    if len(_cache) > TABLES:
        _cache.popitem(last=False)
    return _cache[key]


def in_graph(values: Sequence[int], device: torch.device) -> Tensor:
    """A table that each replay of a CUDA graph makes anew, in the graph's memory.

    The values travel as arguments of the graph's kernels: a buffer of the host would have to outlive the graph.
    """
    table = torch.zeros(len(values), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), list(values))
    return table


def _tensors_of_programs(table: Tensor, tensors: int, programs: int) -> Tensor:
    first = table.view(tensors, -1)[:, 1]
    counts = torch.diff(first, append=first.new_full((1,), programs))
    return torch.repeat_interleave(
        counts.int(), output_size=programs
    )  # whose size is known here: nothing is waited for


def uploaded(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """These values as a tensor on the device, without waiting for it."""
    cuda = device.type == "cuda"  # elsewhere, whether memory can be pinned is not known
    host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=cuda)
    return host.to(device, non_blocking=cuda)


def _stream(device: torch.device) -> int:
    return 0 if device.type == "cpu" else int(torch.accelerator.current_stream(device).stream_id)


def on_device(steps: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Step counts on the device, where the launch can read them."""
    if all(step.device == device for step in steps):
        return steps
    if len(steps) == 1:
        return [torch.full((), float(steps[0]), device=device, dtype=torch.float32)]
    return list(uploaded([float(step) for step in steps], torch.float32, device).unbind())
