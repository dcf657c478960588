"""The fused kernels: values in Triton's interpreter, in C and, if there is one, on a GPU; resources of machine code."""

import copy
import csv
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import kernel_resources
from helpers.rounding import OF_KERNELS, Results, assert_only_rounded, spread
from helpers.rules import Build, as_reference, each, normal, randomised
from helpers.slots import FIRST, PLAIN, as_slots, assert_same_slots, clones, layouts
from helpers.triton import HAS_TRITON, ONE_UNIT, StandInDriver, needs_cuda
from learned_optim import LearnedOptimizer
from learned_optim.kernels import launch
from learned_optim.kernels.cpu import kernel as cpu_kernel
from learned_optim.kernels.gpu import launch as gpu_launch
from learned_optim.kernels.gpu import modules, tables
from learned_optim.kernels.gpu.modules import step_module
from learned_optim.kernels.slots import Slot, StepSettings
from learned_optim.kernels.sources.triton import dtype_argument
from learned_optim.rules import (
    LSTML2L,
    MLP,
    Conditions,
    RuleState,
    ScaleFreeLSTM,
    ScheduleFreeLSTM,
    UpdateRule,
    schedule_free_lstm,
)
from learned_optim.step import fused, programs
from learned_optim.step.plain import apply_per_tensor

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (pip install learned-optim[gpu])")
needs_compiler = pytest.mark.skipif(cpu_kernel.compiler() is None, reason="needs a C compiler")

SIZES = (0, 1, 63, 64, 65, 1023, 1025)
BLOCK = 1024
"""Coordinates of a program in the interpreter, whose time goes by programs."""
KERNEL_RULES: dict[str, Build] = {
    "scale-free-lstm": ScaleFreeLSTM,
    "scale-free-lstm-decay-zero": functools.partial(ScaleFreeLSTM, 1, momentum_decays=(0.9, 0.0, 0.99), rate=0.1),
    "scale-free-lstm-looped": functools.partial(ScaleFreeLSTM, 14),
    "schedule-free-lstm": ScheduleFreeLSTM,
    "schedule-free-lstm-looped": functools.partial(ScheduleFreeLSTM, 13, rate=0.1),
    "lstm-l2l": functools.partial(LSTML2L, 4),
    "lstm-l2l-one-layer": functools.partial(LSTML2L, 5, layers=1, p=5.0, output_scale=0.7),
    "lstm-l2l-three-layers": functools.partial(LSTML2L, 3, layers=3),
    "lstm-l2l-looped": functools.partial(LSTML2L, 16),
    "mlp": functools.partial(MLP, 5, rate=0.1, magnitude_rate=0.1),
}
COUNTING: dict[str, Build] = {"scale-free-lstm": ScaleFreeLSTM, "schedule-free-lstm": ScheduleFreeLSTM}
"""Rules that heed the step count, and move no coordinate that was never pushed."""
EACH_KERNEL = COUNTING | {"lstm-l2l": functools.partial(LSTML2L, 2)}
DTYPES = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.float32, torch.bfloat16, id="recurrent-bfloat16"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float16, torch.float32, id="float16"),
]


class Place(NamedTuple):
    """Where kernels run, and the size of a program there."""

    device: str
    block: int | None
    cuts: bool = False
    """Whether bfloat16 is cut off there instead of rounded, as Triton's interpreter does."""


@pytest.fixture(
    params=[
        pytest.param("interpreter", marks=pytest.mark.slow),
        pytest.param("c", marks=needs_compiler),
        pytest.param("cuda", marks=needs_cuda),
    ]
)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        return Place("cpu", BLOCK, cuts=True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return Place("cpu" if request.param == "c" else "cuda", None)


@pytest.fixture(params=["interpreter", pytest.param("c", marks=needs_compiler)])
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def moved(slots: Sequence[Slot], device: str) -> list[Slot]:
    return [
        Slot(
            slot.parameter.to(device),
            slot.grad.to(device),
            {entry: value.to(device) for entry, value in slot.state.items()},
            slot.step.to(device),
            None if slot.scale is None else slot.scale.to(device),
            slot.sees_parameter,
        )
        for slot in slots
    ]


@torch.no_grad()
def apply_fused(rule: UpdateRule, slots: Sequence[Slot], settings: StepSettings, where: Place) -> None:
    """The kernel's step of slots on the CPU, wherever it runs; parameters and states lie between poisoned margins."""
    there = moved(slots, where.device)
    guarded = [
        slot._replace(
            parameter=in_poison(slot.parameter),
            state={entry: in_poison(value) for entry, value in slot.state.items()},
        )
        for slot in there
    ]
    fused.apply_fused(programs.plan_of(rule.to(where.device)), guarded, settings, where.block)
    rule.cpu()
    for slot, result in zip(slots, guarded, strict=True):
        for old, new in zip(
            [slot.parameter, *slot.state.values()], [result.parameter, *result.state.values()], strict=True
        ):
            assert_margins_are_poisoned(new)
            old.copy_(new)


def in_poison(tensor: Tensor, margin: int = 16) -> Tensor:
    """A copy of the same strides in the middle of a buffer of NaN."""
    copy = tensor.clone()  # dense
    buffer = copy.new_full((tensor.numel() + 2 * margin,), torch.nan)
    return torch.as_strided(buffer, tensor.shape, copy.stride(), margin).copy_(tensor)


def assert_margins_are_poisoned(tensor: Tensor, margin: int = 16) -> None:
    whole = torch.as_strided(tensor, (tensor.numel() + 2 * margin,), (1,), tensor.storage_offset() - margin)
    assert whole[:margin].isnan().all()
    assert whole[margin + tensor.numel() :].isnan().all()


@torch.no_grad()
def oracle_step(rule: UpdateRule, slot: Slot, settings: StepSettings) -> Results:
    """Parameter and state after the step in float64, from the values as they are stored."""
    reference = as_reference(rule)
    reference.steps_taken = int(slot.step) - 1
    for entry, value in slot.state.items():
        if reference.steps_taken > 0:
            setattr(reference, entry, value.double().numpy())
        else:
            assert not value.any()
    grad = -slot.grad.double() if settings.maximize else slot.grad.double()
    update = torch.from_numpy(reference.step(grad.numpy(), *told(rule, slot, settings)))
    state = {entry: torch.from_numpy(getattr(reference, entry)) for entry in slot.state}
    return {"parameter": stepped(rule, slot, update, settings), **state}


def told(rule: UpdateRule, slot: Slot, settings: StepSettings) -> tuple[Any, ...]:
    """What a rule that uses conditions is told of the slot, in float64."""
    if not rule.uses_conditions:
        return ()
    scale = 1.0 if slot.scale is None else slot.scale.double()
    known = torch.as_tensor(slot.sees_parameter)
    values = torch.where(known, slot.parameter.double() / scale, 0.0)
    return values.numpy(), settings.lr, settings.progress, float(settings.averaging)


def stepped(rule: UpdateRule, slot: Slot, update: Tensor, settings: StepSettings) -> Tensor:
    parameter = slot.parameter.double()
    if slot.scale is not None:
        update = slot.scale.double() * update
    of_update = 1.0 if rule.uses_conditions else settings.lr
    return parameter + of_update * update - settings.lr * settings.weight_decay * parameter


@torch.no_grad()
def spread_of_step(rule: UpdateRule, slot: Slot, settings: StepSettings) -> Results:
    """Errors that roundings bring to parameter and state."""
    rule = copy.deepcopy(rule).double()
    state = {entry: value.double() for entry, value in slot.state.items()}

    def step() -> Results:
        grad = -slot.grad.double() if settings.maximize else slot.grad.double()
        values, *others = told(rule, slot, settings) or [0.0]
        update, new_state = rule.forward_under(
            Conditions(torch.as_tensor(values), *others), grad, state, slot.step.double()
        )
        return {"parameter": stepped(rule, slot, update, settings), **new_state}

    return spread(step)


def side_by_side(slots: Sequence[Slot]) -> Slot:
    """All coordinates in one slot; steps and scales become those of coordinates."""
    scales = [slot.scale.expand(slot.grad.shape) for slot in slots if slot.scale is not None]
    return Slot(
        torch.cat([slot.parameter for slot in slots]),
        torch.cat([slot.grad for slot in slots]),
        {entry: torch.cat([slot.state[entry] for slot in slots], 1) for entry in slots[0].state},
        torch.cat([slot.step.expand(slot.grad.shape) for slot in slots]),
        torch.cat(scales) if scales else None,
        torch.cat([torch.full(slot.grad.shape, slot.sees_parameter) for slot in slots]),  # type: ignore[arg-type]
    )


def values_of(slots: Sequence[Slot]) -> Results:
    together = side_by_side(slots)
    return {"parameter": together.parameter, **together.state}


@torch.no_grad()
def assert_only_rounded_step(
    rule: UpdateRule, slots: Sequence[Slot], settings: StepSettings, where: Place
) -> list[Slot]:
    """One step by the kernel and by the plain path, both held to the oracle; returns the plain path's slots."""
    steps = [oracle_step(rule, slot, settings) for slot in slots]
    truth = {name: torch.cat([step[name] for step in steps], -1) for name in steps[0]}
    spreads = spread_of_step(rule, side_by_side(slots), settings)
    by_kernel, plain = clones(slots), clones(slots)
    apply_fused(rule, by_kernel, settings, where)
    apply_per_tensor(rule, plain, settings)
    for slots_after, roundings, cuts in ((plain, 1.0, False), (by_kernel, OF_KERNELS, where.cuts)):
        found = values_of(slots_after)
        stored = {name: lost(found[name].dtype, values, cuts) for name, values in truth.items()}
        assert_only_rounded(found, truth, spreads, stored, roundings)
    return plain


def lost(dtype: torch.dtype, values: Tensor, cuts: bool) -> Tensor:
    """What is lost where values are stored in a coarser dtype: half a spacing, or a whole one."""
    if dtype == torch.float32:
        return torch.zeros_like(values)
    limits = torch.finfo(dtype)
    spacing = limits.eps * values.abs().clamp(min=limits.smallest_normal)
    return spacing if cuts and dtype == torch.bfloat16 else spacing / 2


def slots_of(rule: UpdateRule, sizes: Sequence[int], dtype: torch.dtype, recurrent: torch.dtype) -> list[Slot]:
    slots = as_slots(rule, [normal(size, seed=size) for size in sizes], dtype, recurrent)
    return [slot._replace(parameter=slot.parameter * 100) for slot in slots]  # so that weight decay counts


@each(KERNEL_RULES)
@pytest.mark.parametrize(("dtype", "recurrent"), DTYPES)
def test_kernel_is_not_further_from_the_truth_than_roundings_explain(
    build: Build, dtype: torch.dtype, recurrent: torch.dtype, place: Place
) -> None:
    rule = randomised(build()).float()
    every_size = dtype == recurrent == torch.float32
    slots = slots_of(rule, SIZES if every_size else (65, 1025), dtype, recurrent)
    for count, progress, averaging in ((2, 0.0, True), (400, 0.75, False)) if every_size else ((30, 0.25, True),):
        settings = StepSettings(0.7, 0.01, maximize=True, progress=progress, averaging=averaging)
        slots = [slot._replace(step=torch.tensor(float(count))) for slot in slots]
        slots = assert_only_rounded_step(rule, slots, settings, place)  # the next step starts from the plain path's


@needs_compiler
@each(KERNEL_RULES)
def test_step_in_double_precision_is_the_plain_one(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rule = randomised(build())
    by_kernel = [
        slot._replace(step=torch.tensor(7.0)) for slot in as_slots(rule, [normal(9), normal(30)], torch.float64)
    ]
    plain = clones(by_kernel)
    settings = StepSettings(lr=0.7, weight_decay=0.01, maximize=True)
    for _ in range(2):
        fused.apply_fused(programs.plan_of(rule), by_kernel, settings)
        apply_per_tensor(rule, plain, settings)
    for name, values in values_of(plain).items():
        torch.testing.assert_close(values_of(by_kernel)[name], values, rtol=1e-11, atol=1e-13)


def test_kernel_of_the_paper_s_size_is_not_further_from_the_truth(place: Place) -> None:
    rule = randomised(LSTML2L()).float()
    slots = [slot._replace(step=torch.tensor(2.0)) for slot in slots_of(rule, (65,), torch.float32, torch.float32)]
    assert_only_rounded_step(rule, slots, PLAIN, place)


def test_values_that_are_cut_are_not_further_from_the_truth(place: Place) -> None:
    rule = randomised(ScheduleFreeLSTM()).float()
    (slot,) = slots_of(rule, (200,), torch.float32, torch.float32)
    slot = slot._replace(step=torch.tensor(400.0))  # gradients of many times their root mean square come late
    bound = schedule_free_lstm.FACTOR_BOUND
    slot.state["second_moment"].mul_(0.01)
    slot.state["log_rate"].sign_().mul_(bound)
    slot.state["displacement"].mul_(100)
    direction = slot.grad / (0.1 * slot.grad.square() + 0.9 * slot.state["second_moment"][0]).sqrt()
    plain = assert_only_rounded_step(rule, [slot], PLAIN, place)[0]
    at_bound = (plain.state["log_rate"].abs() == bound).float().mean()
    assert 0.2 < at_bound < 0.8
    assert 0.2 < (direction.abs() > schedule_free_lstm.LARGEST_DIRECTION).float().mean() < 0.8


@each(COUNTING)
def test_first_steps_are_not_further_from_the_truth(build: Build, place: Place) -> None:
    # Bias corrections 1 / (1 - decay ** step) lose their digits in the first steps, if anywhere.
    rule = randomised(build()).float()
    (slot,) = as_slots(rule, [normal(500)], torch.float32)
    slot = slot._replace(state={entry: torch.zeros_like(value) for entry, value in slot.state.items()})
    for count in range(1, 5):
        slot = slot._replace(step=torch.tensor(float(count)), grad=normal(500, seed=count).float())
        (slot,) = assert_only_rounded_step(rule, [slot], PLAIN, place)


@each(EACH_KERNEL)
def test_memory_that_is_not_contiguous_is_not_stepped_differently(build: Build, place: Place) -> None:
    rule = randomised(build()).float()
    slots = as_slots(rule, layouts(), torch.float32)
    # Gradients in other layouts than their parameters: the other way round, and in steps of two.
    slots = [slot._replace(grad=torch.stack([slot.grad, slot.grad], -1)[..., 0]) for slot in slots]
    slots = [
        slot._replace(grad=slot.grad.t().contiguous().t() if slot.grad.dim() == 2 else slot.grad) for slot in slots
    ]
    before = clones(slots)
    by_kernel, plain = clones(slots), clones(slots)
    apply_fused(rule, by_kernel, PLAIN, place)
    apply_per_tensor(rule, plain, PLAIN)
    assert_same_slots(by_kernel, plain, before)


def test_view_with_gaps_is_not_overwritten_between_its_coordinates(on_cpu: None) -> None:
    rule = randomised(ScaleFreeLSTM()).float()
    (slot,) = as_slots(rule, [normal(20)], torch.float32)
    whole = torch.arange(40.0)
    view = whole[::2]
    state = {entry: value.clone() for entry, value in slot.state.items()}
    fused.apply_fused(programs.plan_of(rule), [Slot(view, slot.grad, state, FIRST)], PLAIN)
    assert torch.equal(whole[1::2], torch.arange(1.0, 40.0, 2))
    expected = Slot(torch.arange(0.0, 40.0, 2), slot.grad, slot.state, FIRST)
    apply_per_tensor(rule, [expected], PLAIN)
    torch.testing.assert_close(view, expected.parameter, rtol=1e-6, atol=1e-6)  # roundings of values up to 38
    assert not torch.equal(view, torch.arange(0.0, 40.0, 2))


def test_state_that_is_not_contiguous_is_refused(on_cpu: None) -> None:
    rule = randomised(ScaleFreeLSTM()).float()
    (slot,) = as_slots(rule, [normal(3, 4)], torch.float32)
    slot.state["momentum"] = slot.state["momentum"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(RuntimeError, match="flat view"):
        fused.apply_fused(programs.plan_of(rule), [slot], PLAIN)


@each(EACH_KERNEL)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(StepSettings(torch.tensor(0.3), 0.01, False), id="lr-tensor"),
        pytest.param(StepSettings(torch.tensor(0.3, dtype=torch.float64), 0.0, True), id="lr-float64"),
        pytest.param(PLAIN._replace(grad_scale=torch.tensor(512.0)), id="grad-scale"),
        pytest.param(PLAIN._replace(grad_scale=torch.tensor(3.0), found_inf=torch.tensor(0.0)), id="found-none"),
        pytest.param(PLAIN._replace(found_inf=torch.tensor(1.0), weight_decay=0.1), id="found-inf"),
        pytest.param(PLAIN._replace(skip_nonfinite=True, weight_decay=0.1), id="skip"),
        pytest.param(PLAIN, id="propagate"),
        pytest.param(PLAIN._replace(lr=0.0), id="lr-zero"),
    ],
)
def test_setting_is_not_understood_differently(build: Build, settings: StepSettings, place: Place) -> None:
    rule = randomised(build()).float()
    slots = as_slots(rule, [normal(20), normal(7)], torch.float32, torch.bfloat16)
    spoilt = {3: float("nan"), 5: float("inf"), 7: float("-inf")} if settings.lr else {}
    for index, nonfinite in spoilt.items():
        slots[0].grad[index] = nonfinite
    by_kernel, plain = clones(slots), clones(slots)
    there = settings._replace(
        lr=settings.lr.to(place.device) if isinstance(settings.lr, Tensor) else settings.lr,
        grad_scale=None if settings.grad_scale is None else settings.grad_scale.to(place.device),
        found_inf=None if settings.found_inf is None else settings.found_inf.to(place.device),
    )
    apply_fused(rule, by_kernel, there, place)
    apply_per_tensor(rule, plain, settings)
    for one, other, start in zip(by_kernel, plain, slots, strict=True):
        assert torch.equal(one.parameter.isnan(), other.parameter.isnan())
        finite = ~other.parameter.isnan()
        torch.testing.assert_close(one.parameter[finite], other.parameter[finite], rtol=2e-6, atol=1e-7)
        for entry, value in other.state.items():
            # bfloat16 hidden and cell: one rounding, 2 ** -8
            torch.testing.assert_close(
                one.state[entry],
                value,
                rtol=2e-6 if value.dtype == torch.float32 else 2**-7,
                atol=1e-6 if value.dtype == torch.float32 else 2**-7,
                equal_nan=True,
            )
        if settings.found_inf is not None and settings.found_inf:
            assert torch.equal(one.parameter, start.parameter)
            assert all(torch.equal(one.state[entry], start.state[entry]) for entry in one.state)
    if settings.skip_nonfinite:
        kept = list(spoilt)
        assert torch.equal(by_kernel[0].parameter[kept], slots[0].parameter[kept])
        assert all(torch.equal(by_kernel[0].state[e][:, kept], slots[0].state[e][:, kept]) for e in slots[0].state)


@each(COUNTING)
def test_step_counts_of_tensors_are_not_mixed_up(build: Build, place: Place) -> None:
    rule = randomised(build()).float()
    slots = as_slots(rule, [normal(3), normal(4), normal(100)], torch.float32)
    slots = [slot._replace(step=torch.tensor(float(count))) for slot, count in zip(slots, (1, 50, 7), strict=True)]
    by_kernel, plain = clones(slots), clones(slots)
    apply_fused(rule, by_kernel, PLAIN, place)
    apply_per_tensor(rule, plain, PLAIN)
    assert_same_slots(by_kernel, plain, slots)


def test_step_counts_on_the_host_serve_tensors_elsewhere() -> None:
    cpu = torch.device("cpu")
    steps = [torch.tensor(3.0, device="meta") for _ in range(2)]
    assert tables.on_device(steps, torch.device("meta")) is steps
    counts = [torch.tensor(1.0), torch.tensor(5.0)]
    assert [float(step) for step in tables.on_device(counts, cpu)] == [1.0, 5.0]
    assert tables.uploaded([1, 2**40], torch.int64, cpu).tolist() == [1, 2**40]


@each(COUNTING)
def test_coordinate_that_was_never_pushed_is_not_moved(build: Build, place: Place) -> None:
    rule = randomised(build()).float()
    (slot,) = as_slots(rule, [normal(50)], torch.float32)
    slot.grad.zero_()
    state = {entry: torch.zeros_like(value) for entry, value in slot.state.items()}
    before, slot = slot.parameter.clone(), slot._replace(state=state)
    for count in (1.0, 2.0):
        apply_fused(rule, [slot._replace(step=torch.tensor(count))], PLAIN, place)
    assert torch.equal(slot.parameter, before)


@pytest.mark.slow
@each(COUNTING)
def test_no_bit_of_a_coordinate_depends_on_its_neighbours(build: Build, on_cpu: None) -> None:
    rule = randomised(build()).float()
    (whole,) = as_slots(rule, [normal(90)], torch.float32, torch.bfloat16)
    parts = [
        Slot(
            whole.parameter[first:last].clone(),
            whole.grad[first:last],
            {entry: value[:, first:last].clone() for entry, value in whole.state.items()},
            FIRST,
            whole.scale,
            whole.sees_parameter,
        )
        for first, last in [(0, 1), (1, 40), (40, 90)]
    ]
    plan = programs.plan_of(rule)
    fused.apply_fused(plan, [whole], PLAIN, 128)
    fused.apply_fused(plan, parts[::-1], PLAIN, 16)
    assert torch.equal(torch.cat([part.parameter for part in parts]), whole.parameter)
    for entry, value in whole.state.items():
        assert torch.equal(torch.cat([part.state[entry] for part in parts], 1), value)


def test_offset_beyond_32_bits_is_not_cut_off(interpreted: None) -> None:
    # A tensor of 2 ** 33 + 5 coordinates, of which only the last five exist; a rule of one unit has no second feature.
    import triton.language as tl

    rule = randomised(LSTML2L(1, layers=1)).float()
    (slot,) = as_slots(rule, [normal(5)], torch.float32)
    before, expected = clones([slot]), clones([slot])
    far, block = 2**33, 16
    tensors = slot.parameter, slot.grad, None, None, slot.state["hidden"], slot.state["cell"]
    addresses = [0 if tensor is None else tensor.data_ptr() - 4 * far for tensor in tensors]
    plan = programs.plan_of(rule)
    step_module(plan.key, interpreted=True).step[(1,)](
        torch.tensor([far + 5, -far // block, *addresses[:3], 0, *addresses[3:]]),
        torch.zeros(1, dtype=torch.int32),
        plan.weights,
        slot.step,
        1.0,
        0.0,
        0.0,
        1.0,
        None,
        None,
        **dict.fromkeys(["PARAMETER_DTYPE", "GRAD_DTYPE", *map(dtype_argument, plan.entries)], tl.float32),
        **dict.fromkeys(["SCALED", "UPDATE_HAS_LR", "LR_ON_DEVICE", "PROGRESS_ON_DEVICE"], False),
        **dict.fromkeys(["DECAYS", "MAXIMIZE", "SKIP_NONFINITE", "STEP_IN_TABLE"], False),
        BLOCK=block,
    )
    apply_per_tensor(rule, expected, PLAIN)
    assert_same_slots([slot], expected, before)
    assert not torch.equal(slot.parameter, before[0].parameter)


def test_nothing_to_step_does_not_raise(on_cpu: None) -> None:
    plan = programs.plan_of(randomised(ScaleFreeLSTM()).float())
    fused.apply_fused(plan, [], PLAIN)
    fused.apply_fused(plan, as_slots(ScaleFreeLSTM(), [normal(0), normal(3, 0)], torch.float32), PLAIN)


class TestTables:
    def test_made_in_a_graph_is_the_one_that_is_uploaded(self) -> None:
        rows = (5, 0, 2**47 + 8, 3, 0, 7, 300, 1, 2**46, 4, 0, 9)
        cpu = torch.device("cpu")
        uploaded, of_programs = tables.tables(rows, 2, 4, cpu)
        assert uploaded.tolist() == list(rows)
        assert of_programs.tolist() == [0, 1, 1, 1]
        assert torch.equal(tables.in_graph(rows, cpu), uploaded)

    def test_are_kept_for_the_same_addresses_only_and_not_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tables, "TABLES", 2)
        tables._cache.clear()
        cpu = torch.device("cpu")
        first, _ = tables.tables((1, 0, 10), 1, 1, cpu)
        assert tables.tables((1, 0, 10), 1, 1, cpu)[0] is first
        other, _ = tables.tables((1, 0, 11), 1, 1, cpu)
        assert other.tolist() == [1, 0, 11]
        tables.tables((1, 0, 12), 1, 1, cpu)
        assert len(tables._cache) == 2

    def test_gradient_at_a_new_address_is_not_missed(self, interpreted: None) -> None:
        rule = randomised(ScaleFreeLSTM()).float()
        (slot,) = as_slots(rule, [normal(10)], torch.float32)
        kept, expected = [slot.grad], clones([slot])
        plan = programs.plan_of(rule)
        for index in range(3):
            kept.append(normal(10, seed=index).float())  # keeps the old one alive, so that its address stays taken
            fused.apply_fused(plan, [slot._replace(grad=kept[-1])], PLAIN)
            apply_per_tensor(rule, [expected[0]._replace(grad=kept[-1])], PLAIN)
        torch.testing.assert_close(slot.parameter, expected[0].parameter, rtol=0, atol=1e-6)  # three steps of roundings


class TestDispatch:
    def test_step_of_the_optimizer_is_the_plain_one(self, on_cpu: None) -> None:
        results = []
        for choice in (False, True):
            parameters = [normal(3, 4).float().requires_grad_(), normal(5).bfloat16().requires_grad_()]
            optimizer = LearnedOptimizer(parameters, weight_decay=0.01, fused=choice, state_dtype=torch.float32)
            for count in range(3):
                for index, parameter in enumerate(parameters):
                    parameter.grad = normal(*parameter.shape, seed=10 * count + index).to(parameter.dtype)
                optimizer.step()
            results.append([parameter.detach() for parameter in parameters])
        for one, other in zip(*results, strict=True):
            # Roundings of three steps; the interpreter cuts bfloat16 off, three times one spacing of values below 4.
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if one.dtype == torch.float32 else 3 * 2**-6)

    @pytest.mark.parametrize("choice", [None, True])
    def test_interpreter_runs_only_where_it_is_told_to(
        self, choice: bool | None, interpreted: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []
        monkeypatch.setattr("learned_optim.step.dispatch.apply_fused_to_columns", lambda *_: calls.append(1))
        parameter = normal(3).float().requires_grad_()
        parameter.grad = parameter.detach().clone()
        LearnedOptimizer([parameter], fused=choice).step()
        assert bool(calls) == bool(choice)

    def test_reason_why_not_is_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Mean(LSTML2L):
            def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
                return super().forward(grad - grad.mean(), state, step)

        monkeypatch.setenv("TRITON_INTERPRET", "1")
        host, gpu = torch.device("cpu"), torch.device("cuda")
        assert programs.unsupported_reason(ScaleFreeLSTM(), host, torch.bfloat16) is None
        reason = str(programs.unsupported_reason(Mean(), host, torch.float32))
        assert "no fused kernel can be made of the rule 'lstm-l2l' (Mean): " in reason
        assert "(in `return super().forward(grad - grad.mean(), state, step)`) mixes coordinates" in reason
        assert "torch.float64" in str(programs.unsupported_reason(ScaleFreeLSTM(), host, torch.float64))
        assert "16,384 multiply-adds a coordinate; the rule 'lstm-l2l' has 30,450" in str(
            programs.unsupported_reason(LSTML2L(50), host, torch.float32)
        )
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        assert "triton is not installed" in str(programs.unsupported_reason(LSTML2L(), gpu, torch.float32))
        assert "need a GPU or a CPU" in str(programs.unsupported_reason(LSTML2L(), torch.device("mps"), torch.float32))

    def test_no_folder_for_the_source_does_not_stop_a_training(
        self, interpreted: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(name: str, text: str) -> Path:
            raise OSError("No space left on device")

        monkeypatch.setattr(modules, "keep_text", full)
        monkeypatch.setattr(programs, "is_faster_fused", lambda device: True)
        rule = randomised(ScheduleFreeLSTM(7)).float()  # which no other test has made a module of
        stepped = []
        for choice in (None, False, True):
            parameter = normal(5).float().requires_grad_()
            parameter.grad = normal(5, seed=1).float()
            optimizer = LearnedOptimizer([parameter], rule, fused=choice)
            if choice:
                with pytest.raises(RuntimeError, match="in Triton cannot be kept: No space left"):
                    optimizer.step()
            elif choice is None:
                with pytest.warns(UserWarning, match="a slower one instead: .*No space left"):
                    optimizer.step()
            else:
                optimizer.step()
            stepped.append(parameter.detach())
        assert torch.equal(stepped[0], stepped[1])
        assert torch.equal(stepped[2], normal(5).float())

    def test_rule_that_cannot_be_traced_is_stepped_by_its_forward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Peculiar(LSTML2L):
            def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
                if grad.numel() == 3:  # as in the trace
                    raise OSError("out of ink")
                return super().forward(grad, state, step) if float(step) < 2 else (-grad, state)

        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        parameter = normal(5).float().requires_grad_()
        parameter.grad = torch.ones(5)
        with pytest.raises(RuntimeError, match="fails in a trace: OSError: out of ink; use fused=None"):
            LearnedOptimizer([parameter], Peculiar(2), fused=True)
        optimizer = LearnedOptimizer([parameter], Peculiar(2))
        optimizer.step()
        before = parameter.detach().clone()
        optimizer.step()
        assert torch.equal(parameter, before - 1)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # by torch, in its own files
    def test_compiled_step_is_the_eager_one(self, on_cpu: None) -> None:
        def trained(compiled: bool) -> Tensor:
            parameter = normal(6).float().requires_grad_()
            optimizer = LearnedOptimizer([parameter], fused=True)
            step: Callable[[], Any] = optimizer.step
            if compiled:
                step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
            for count in range(2):
                parameter.grad = normal(6, seed=count).float()
                step()
            return parameter.detach()

        assert torch.equal(trained(True), trained(False))

    def test_autograd_is_told_of_the_change(self, on_cpu: None) -> None:
        parameter = normal(3).float().requires_grad_()
        loss = parameter.square().sum()
        parameter.grad = normal(3).float()
        LearnedOptimizer([parameter], fused=True).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.slow
    def test_import_of_the_optimizer_does_not_load_triton(self) -> None:
        script = "import sys, learned_optim.step.fused; sys.exit('triton' in sys.modules)"
        subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
@each(ONE_UNIT)
def test_arguments_of_a_launch_are_those_that_the_compiler_takes(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter does not look at types, specialisation and options of a launch; this does all but launch.
    from triton.runtime import driver

    compiled: list[Any] = []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for module in (launch, programs):
        monkeypatch.setattr(module, "uses_c", lambda device: False)

    class Compiling:
        def __init__(self, kernel: Any) -> None:
            self.step = self
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda **arguments: compiled.append(self.kernel.warmup(grid=grid, **arguments))

    monkeypatch.setattr(gpu_launch, "step_module", lambda *which: Compiling(step_module(*which).step))
    rule = randomised(build()).float()
    every = StepSettings(torch.tensor(0.5), 0.1, False, True, torch.tensor(2.0), torch.tensor(0.0))
    monkeypatch.setattr(driver, "_active", StandInDriver())
    for settings, count in ((PLAIN, 1), (every, 2)):
        slots = as_slots(rule, [normal(5), normal(0), normal(3)], torch.float32, torch.bfloat16)
        slots = [slot._replace(step=torch.tensor(1.0) if count > 1 else FIRST) for slot in slots]
        fused.apply_fused(programs.plan_of(rule), slots, settings)
        assert len(compiled) == count
    assert all("cubin" in kernel.asm for kernel in compiled)


@pytest.mark.slow
@pytest.mark.parametrize("capability", kernel_resources.COMPUTE_CAPABILITIES)
@pytest.mark.parametrize("name", kernel_resources.CASES)
def test_machine_code_does_not_spill_nor_change_unnoticed(
    name: str, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with kernel_resources.TABLE.open() as file:
        recorded = {(row["kernel"], row["compute_capability"]): row for row in csv.DictReader(file)}
    for values in kernel_resources.rows([name], [capability]):
        row = dict(zip(kernel_resources.HEADER, values, strict=True))
        assert row["spill_stores"] == row["spill_loads"] == "0", row
        before = recorded[row["kernel"], str(capability)]
        if before["triton"] == row["triton"]:  # another version brings another assembler
            assert row == before, "run: python -m benchmarks.kernel_resources"
