"""Memory order of states, cutting into pieces, and the temporary memory of a step: at most a block."""

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.rules import Build, each, few_examples, normal, randomised
from helpers.slots import FIRST, PLAIN, clones
from learned_optim import LearnedOptimizer
from learned_optim.kernels import launch
from learned_optim.kernels.cpu import kernel as cpu_kernel
from learned_optim.kernels.layout import in_memory_order, laid_out_like, memory_order, pieces
from learned_optim.kernels.slots import Columns, Slot
from learned_optim.rules import ScaleFreeLSTM, ScheduleFreeLSTM
from learned_optim.step import plain
from learned_optim.step.fused import apply_fused
from learned_optim.step.plain import apply_in_blocks, apply_per_tensor
from learned_optim.step.programs import plan_of

BLOCK = 1024
BYTES_OF_GATES = 4 * 24 * BLOCK
"""The widest activations of a block: four gates of six units, in float32."""
needs_compiler = pytest.mark.skipif(cpu_kernel.compiler() is None, reason="needs a C compiler")
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "channels-last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.transpose(0, 3).contiguous().transpose(0, 3),
    "gaps": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
}
each_rule = each({"scale-free-lstm": ScaleFreeLSTM, "schedule-free-lstm": ScheduleFreeLSTM})
each_layout = pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))


def largest_allocation(run: Callable[[], object]) -> int:
    """Bytes of the largest piece of memory that the CPU's allocator hands out."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)


@few_examples
@given(shape=st.lists(st.integers(1, 6), max_size=4), size=st.integers(1, 30))
def test_pieces_cover_each_coordinate_once_within_the_size(shape: list[int], size: int) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    found = list(pieces(shape, size))
    assert all(torch.equal(numbers[index].reshape(-1), numbers.view(-1)[flat]) for index, flat in found)
    assert [flat.start for _, flat in found] == [0, *[flat.stop for _, flat in found][:-1]]
    assert found[-1][1].stop == numbers.numel()
    assert all(0 < flat.stop - flat.start <= size for _, flat in found)


@each_layout
def test_state_has_the_memory_order_of_its_parameter(layout: Callable[[Tensor], Tensor]) -> None:
    parameter, value = layout(normal(2, 3, 4, 5)), normal(7, 2, 3, 4, 5, seed=1)
    state = laid_out_like(parameter, value)
    assert torch.equal(state, value)
    assert memory_order(state[0]) == memory_order(parameter)
    seen, _, (entry,) = in_memory_order(parameter, parameter.clone(), [state])
    assert entry.is_contiguous()
    assert torch.equal(entry[0], value[0].permute(memory_order(parameter)))
    assert seen.data_ptr() == parameter.data_ptr()
    assert seen.is_contiguous() == (layout is not LAYOUTS["gaps"])


@pytest.mark.slow
@each_rule
@each_layout
@pytest.mark.parametrize("other", [False, True], ids=["grad-alike", "grad-contiguous"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1], ids=["", "decay"])
def test_cpu_step_allocates_at_most_a_block(
    build: Build, layout: Callable[[Tensor], Tensor], other: bool, weight_decay: float
) -> None:
    rule = randomised(build()).float()
    parameter = layout(normal(16, 8, 8, 16).float())
    grad = normal(16, 8, 8, 16, seed=1).float()
    grad = grad if other else layout(grad)
    state = {entry: laid_out_like(parameter, value) for entry, value in rule.init_state(parameter.shape).items()}
    slot = Slot(parameter, grad, state, FIRST)
    settings = PLAIN._replace(weight_decay=weight_decay)
    assert largest_allocation(lambda: apply_in_blocks(rule, [slot], settings, BLOCK)) <= BYTES_OF_GATES
    assert parameter.numel() >= 16 * BLOCK


@each_rule
def test_small_tensors_are_joined_up_to_a_block(build: Build) -> None:
    rule = randomised(build()).float()
    slots = [
        Slot(normal(100, seed=seed).float(), normal(100, seed=seed).float(), rule.init_state((100,)), FIRST)
        for seed in range(100)
    ]
    assert largest_allocation(lambda: apply_in_blocks(rule, slots, PLAIN, BLOCK)) <= BYTES_OF_GATES


@each_layout
@pytest.mark.parametrize("in_c", [False, pytest.param(True, marks=needs_compiler)], ids=["plain", "c"])
def test_optimizer_step_allocates_at_most_a_block(
    layout: Callable[[Tensor], Tensor], in_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "default_block_size", lambda *_: BLOCK)
    monkeypatch.setattr(launch, "LARGEST_COPY_CPU", BLOCK)
    parameter = nn.Parameter(layout(normal(16, 8, 8, 16).float()))
    parameter.grad = torch.empty_like(parameter).copy_(normal(16, 8, 8, 16, seed=1))
    optimizer = LearnedOptimizer([parameter], "specialised-mnist", fused=in_c)
    optimizer.step()
    hidden = 2 * optimizer.rule.state_features["hidden"]  # bytes a coordinate, copied where there are gaps
    in_copies = hidden if layout is LAYOUTS["gaps"] else 4
    assert largest_allocation(optimizer.step) <= (in_copies * BLOCK if in_c else BYTES_OF_GATES)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@each_rule
@each_layout
def test_kernel_copies_only_strided_tensors_and_at_most_a_block(
    build: Build, layout: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launch, "LARGEST_COPY_GPU", 50)
    rule = randomised(build()).float()
    parameters = [layout(normal(3, 4, 2, 5, seed=seed).float()) for seed in (1, 2)]
    slots = [
        Slot(
            parameter,
            layout(normal(3, 4, 2, 5, seed=3).float()),
            {e: laid_out_like(parameter, value) for e, value in rule.init_state(parameter.shape).items()},
            FIRST,
        )
        for parameter in parameters
    ]
    launched: list[list[Slot]] = []
    original = launch._launch

    def watched(plan: launch.Plan, columns: Columns, *rest: Any) -> None:
        launched.append(columns.slots())
        original(plan, columns, *rest)

    monkeypatch.setattr(launch, "_launch", watched)
    expected = clones(slots)
    apply_fused(plan_of(rule), slots, PLAIN)
    apply_per_tensor(rule, expected, PLAIN)
    for slot, other in zip(slots, expected, strict=True):
        torch.testing.assert_close(slot.parameter, other.parameter, rtol=0, atol=1e-6)  # a few roundings of 1
        for entry, value in other.state.items():
            torch.testing.assert_close(slot.state[entry], value, rtol=1e-5, atol=1e-6)
    if layout is LAYOUTS["gaps"]:
        sizes = [sum(row.parameter.numel() for row in rows) for rows in launched]
        assert max(sizes) <= 50
        assert sum(sizes) == 240
    else:
        (rows,) = launched
        assert [row.parameter.data_ptr() for row in rows] == [parameter.data_ptr() for parameter in parameters]


@each_layout
def test_saved_state_is_restored_bit_exact_in_its_memory_order(layout: Callable[[Tensor], Tensor]) -> None:
    def parameter_with_grad(seed: int) -> nn.Parameter:
        parameter = nn.Parameter(layout(normal(2, 3, 4, 5, seed=seed).float()))
        parameter.grad = torch.empty_like(parameter).copy_(normal(2, 3, 4, 5, seed=1 + seed))
        return parameter

    parameter = parameter_with_grad(0)
    optimizer = LearnedOptimizer([parameter])
    optimizer.step()
    saved = optimizer.state_dict()
    rows = {entry: value.contiguous() for entry, value in saved["state"][0].items()}  # as some file formats store it
    continued = []
    for state in (saved["state"][0], rows):
        copy = nn.Parameter(layout(parameter.detach().contiguous()))
        copy.grad = parameter.grad
        other = LearnedOptimizer([copy])
        other.load_state_dict({**saved, "state": {0: state}})
        assert all(torch.equal(other.state[copy][entry], value) for entry, value in rows.items())
        assert memory_order(other.state[copy]["momentum"][0]) == memory_order(copy)
        other.step()
        continued.append(copy.detach())
    optimizer.step()
    assert torch.equal(continued[0], parameter)
    assert torch.equal(continued[1], parameter)
