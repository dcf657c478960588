"""The fused kernels: values in Triton's interpreter, in C and, if there is one, on a GPU; resources of machine code."""

import functools

import pytest
import torch
from torch import Tensor

from helpers.kernel_steps import (
    COUNTING,
    EACH_KERNEL,
    KernelPlace,
    apply_fused,
    assert_only_rounded_step,
    needs_compiler,
    slots_of,
    values_of,
)
from helpers.rules import Build, each, normal, randomised
from helpers.slots import FIRST, PLAIN, as_slots, assert_same_slots, clones, layouts
from helpers.triton import HAS_TRITON
from learned_optim.kernels.gpu import tables
from learned_optim.kernels.gpu.modules import step_module
from learned_optim.kernels.slots import Slot, StepSettings
from learned_optim.kernels.sources.triton import dtype_argument
from learned_optim.rules import (
    LSTML2L,
    MLP,
    ScaleFreeLSTM,
    ScheduleFreeLSTM,
    schedule_free_lstm,
)
from learned_optim.step import fused, programs
from learned_optim.step.plain import apply_per_tensor

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (pip install learned-optim[gpu])")

SIZES = (0, 1, 63, 64, 65, 1023, 1025)
KERNEL_RULES: dict[str, Build] = {
    "scale-free-lstm": ScaleFreeLSTM,
    "scale-free-lstm-decay-zero": functools.partial(ScaleFreeLSTM, 1, momentum_decays=(0.9, 0.0, 0.99), rate=0.1),
    "scale-free-lstm-looped": functools.partial(ScaleFreeLSTM, 14),
    "schedule-free-lstm": ScheduleFreeLSTM,
    "schedule-free-lstm-no-units": functools.partial(ScheduleFreeLSTM, 0),
    "schedule-free-lstm-looped": functools.partial(ScheduleFreeLSTM, 13, rate=0.1),
    "lstm-l2l": functools.partial(LSTML2L, 4),
    "lstm-l2l-one-layer": functools.partial(LSTML2L, 5, layers=1, p=5.0, output_scale=0.7),
    "lstm-l2l-three-layers": functools.partial(LSTML2L, 3, layers=3),
    "lstm-l2l-looped": functools.partial(LSTML2L, 16),
    "mlp": functools.partial(MLP, 5, rate=0.1, magnitude_rate=0.1),
}
DTYPES = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.float32, torch.bfloat16, id="recurrent-bfloat16"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float16, torch.float32, id="float16"),
]


@each(KERNEL_RULES)
@pytest.mark.parametrize(("dtype", "recurrent"), DTYPES)
def test_kernel_matches_the_oracle_within_rounding(
    build: Build, dtype: torch.dtype, recurrent: torch.dtype, place: KernelPlace
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
def test_float64_step_matches_the_plain_path(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_kernel_of_the_papers_size_matches_the_oracle(place: KernelPlace) -> None:
    rule = randomised(LSTML2L()).float()
    slots = [slot._replace(step=torch.tensor(2.0)) for slot in slots_of(rule, (65,), torch.float32, torch.float32)]
    assert_only_rounded_step(rule, slots, PLAIN, place)


def test_clipped_values_match_the_oracle(place: KernelPlace) -> None:
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
def test_first_steps_match_the_oracle(build: Build, place: KernelPlace) -> None:
    # Bias corrections 1 / (1 - decay ** step) lose their digits in the first steps, if anywhere.
    rule = randomised(build()).float()
    (slot,) = as_slots(rule, [normal(500)], torch.float32)
    slot = slot._replace(state={entry: torch.zeros_like(value) for entry, value in slot.state.items()})
    for count in range(1, 5):
        slot = slot._replace(step=torch.tensor(float(count)), grad=normal(500, seed=count).float())
        (slot,) = assert_only_rounded_step(rule, [slot], PLAIN, place)


@each(EACH_KERNEL)
def test_non_contiguous_tensors_match_the_plain_path(build: Build, place: KernelPlace) -> None:
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


def test_strided_view_keeps_the_values_between_its_coordinates(on_cpu: None) -> None:
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


def test_non_contiguous_state_is_refused(on_cpu: None) -> None:
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
def test_settings_match_the_plain_path(build: Build, settings: StepSettings, place: KernelPlace) -> None:
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
def test_each_tensor_uses_its_own_step_count(build: Build, place: KernelPlace) -> None:
    rule = randomised(build()).float()
    slots = as_slots(rule, [normal(3), normal(4), normal(100)], torch.float32)
    slots = [slot._replace(step=torch.tensor(float(count))) for slot, count in zip(slots, (1, 50, 7), strict=True)]
    by_kernel, plain = clones(slots), clones(slots)
    apply_fused(rule, by_kernel, PLAIN, place)
    apply_per_tensor(rule, plain, PLAIN)
    assert_same_slots(by_kernel, plain, slots)


def test_host_step_counts_are_moved_to_the_device() -> None:
    cpu = torch.device("cpu")
    steps = [torch.tensor(3.0, device="meta") for _ in range(2)]
    assert tables.on_device(steps, torch.device("meta")) is steps
    counts = [torch.tensor(1.0), torch.tensor(5.0)]
    assert [float(step) for step in tables.on_device(counts, cpu)] == [1.0, 5.0]
    assert tables.uploaded([1, 2**40], torch.int64, cpu).tolist() == [1, 2**40]


@each(COUNTING)
def test_coordinate_with_zero_gradients_does_not_move(build: Build, place: KernelPlace) -> None:
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
def test_coordinates_are_independent_bitwise(build: Build, on_cpu: None) -> None:
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


def test_offsets_beyond_32_bits_are_addressed(interpreted: None) -> None:
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


def test_empty_slots_are_accepted(on_cpu: None) -> None:
    plan = programs.plan_of(randomised(ScaleFreeLSTM()).float())
    fused.apply_fused(plan, [], PLAIN)
    fused.apply_fused(plan, as_slots(ScaleFreeLSTM(), [normal(0), normal(3, 0)], torch.float32), PLAIN)
