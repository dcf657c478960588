"""The path that joins and cuts tensors into blocks, against one call of the rule for each tensor."""

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.rules import RULES, Build, each, few_examples, normal, randomised
from helpers.slots import FIRST, PLAIN, as_slots, assert_same_slots, clones, layouts
from learned_optim import LearnedOptimizer
from learned_optim.kernels.layout import blocks
from learned_optim.kernels.slots import Slot, StepSettings
from learned_optim.rules import LSTML2L, RuleState, ScaleFreeLSTM, UpdateRule
from learned_optim.step.plain import LANES, apply_in_blocks, apply_per_tensor, default_block_size

Shape = tuple[int, ...]

SMALL_AND_LARGE: Sequence[Shape] = [*[(1 + index % 7,) for index in range(20)], (), (0,), (3, 0), (17, 19), (2, 3)]


CASES = [
    pytest.param(torch.float32, None, id="float32"),
    pytest.param(torch.float32, torch.bfloat16, id="float32-recurrent-bfloat16"),
    pytest.param(torch.float64, None, id="float64"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float16, torch.float16, id="float16"),
]


@pytest.mark.slow
@each(RULES)
@pytest.mark.parametrize(("dtype", "recurrent"), CASES)
@pytest.mark.parametrize("block_size", [13, 200, None], ids=["block-13", "block-200", "block-default"])
@pytest.mark.parametrize("kind", ["small-and-large", "layouts"])
def test_blocks_match_one_call_per_tensor(
    build: Build, dtype: torch.dtype, recurrent: torch.dtype | None, block_size: int | None, kind: str
) -> None:
    rule = randomised(build()).to(torch.float64 if dtype == torch.float64 else torch.float32)
    shapes = [normal(*shape, seed=index) for index, shape in enumerate(SMALL_AND_LARGE)]
    slots = as_slots(rule, shapes if kind == "small-and-large" else layouts(), dtype, recurrent)
    for count in (1, 2):
        slots = [slot._replace(step=torch.tensor(float(count))) for slot in slots]
        before, blocked = clones(slots), clones(slots)
        apply_per_tensor(rule, slots, PLAIN)
        apply_in_blocks(rule, blocked, PLAIN, block_size)
        # The next step starts from the plain path's result, so that errors neither pile up nor cancel.
        assert_same_slots(blocked, slots, before)
        assert any(not torch.equal(new.parameter, old.parameter) for new, old in zip(slots, before, strict=True))


@each(RULES)
@few_examples
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6),
    block_size=st.integers(1, 40),
)
def test_all_shapes_and_block_sizes_match_one_call_per_tensor(
    build: Build, shapes: list[Shape], block_size: int
) -> None:
    rule = randomised(build())
    slots = as_slots(
        rule, [normal(*shape, seed=index) for index, shape in enumerate(shapes)], torch.float64, step=torch.tensor(3.0)
    )
    before, blocked = clones(slots), clones(slots)
    apply_per_tensor(rule, slots, PLAIN)
    apply_in_blocks(rule, blocked, PLAIN, block_size)
    assert_same_slots(blocked, slots, before)


@pytest.mark.parametrize("path", [apply_per_tensor, apply_in_blocks], ids=["per-tensor", "blocks"])
def test_gradients_are_unchanged(path: Callable[[UpdateRule, Sequence[Slot], StepSettings], None]) -> None:
    rule = randomised(ScaleFreeLSTM()).float()
    slots = as_slots(rule, [*layouts(), normal(3)], torch.float32)
    before, versions = [slot.grad.clone() for slot in slots], [slot.grad._version for slot in slots]
    path(rule, slots, StepSettings(lr=0.5, weight_decay=0.1, maximize=True))
    assert all(torch.equal(slot.grad, grad) for slot, grad in zip(slots, before, strict=True))
    assert [slot.grad._version for slot in slots] == versions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameter_is_rounded_once(dtype: torch.dtype) -> None:
    # Rounding the update first would miss the nearest value in a few of a hundred coordinates.
    rule = randomised(ScaleFreeLSTM(rate=1.0)).float()
    (slot,) = as_slots(rule, [normal(1000)], dtype)
    update, _ = rule(slot.grad.float(), slot.state, torch.tensor(1.0))
    expected = (slot.parameter.float() + 0.7 * update).to(dtype)
    apply_per_tensor(rule, [slot], PLAIN._replace(lr=0.7))
    assert torch.equal(slot.parameter, expected)


@each(RULES)
def test_nan_stays_in_its_coordinate(build: Build) -> None:
    rule = randomised(build()).float()
    slots = as_slots(rule, [normal(5), normal(6)], torch.float32)
    slots[0].grad[2] = float("nan")
    apply_in_blocks(rule, slots, PLAIN)
    assert slots[0].parameter.isnan().tolist() == [False, False, True, False, False]
    assert not slots[1].parameter.isnan().any()
    for value in slots[0].state.values():
        assert not value[:, [0, 1, 3, 4]].isnan().any()


def test_non_contiguous_state_is_refused() -> None:
    rule = randomised(ScaleFreeLSTM()).float()
    (slot,) = as_slots(rule, [normal(3, 4)], torch.float32)
    slot.state["momentum"] = slot.state["momentum"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(RuntimeError, match="flat view"):
        apply_in_blocks(rule, [slot], PLAIN)


def test_empty_slots_are_accepted() -> None:
    apply_in_blocks(randomised(ScaleFreeLSTM()), [], PLAIN)


def test_small_tensors_are_joined_and_large_ones_cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = randomised(ScaleFreeLSTM()).float()
    size = default_block_size(rule, torch.device("cpu"))
    calls: list[int] = []
    forward = rule.forward

    def counted(grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        calls.append(grad.numel())
        return forward(grad, state, step)

    monkeypatch.setattr(rule, "forward", counted)
    apply_in_blocks(rule, as_slots(rule, [normal(3)] * 50, torch.float32), PLAIN)
    assert calls == [3 * LANES]  # 150, filled up
    calls.clear()
    apply_in_blocks(rule, as_slots(rule, [normal(2 * size + 1)], torch.float32), PLAIN)
    assert calls == [size, size, LANES]


@pytest.mark.slow
def test_block_size_falls_with_the_size_of_the_state() -> None:
    cpu = torch.device("cpu")
    sizes = [default_block_size(ScaleFreeLSTM(hidden_size=hidden), cpu) for hidden in (6, 60, 2000)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[1]
    assert sizes[2] == 1024  # smaller blocks would spend their time in calls


@few_examples
@given(sizes=st.lists(st.integers(0, 50), max_size=12), block_size=st.integers(1, 60))
def test_blocks_hold_every_tensor_once(sizes: list[int], block_size: int) -> None:
    found = list(blocks(sizes, block_size))
    assert [place for block in found for place in block] == [place for place, size in enumerate(sizes) if size > 0]
    totals = [sum(sizes[place] for place in block) for block in found]
    assert all(total <= block_size or len(block) == 1 for total, block in zip(totals, found, strict=True))
    for total, following in zip(totals, found[1:], strict=False):
        assert total + sizes[following[0]] > block_size  # no block is left half empty


@pytest.mark.slow
@each(RULES)
@pytest.mark.parametrize(("dtype", "recurrent"), CASES)
@few_examples
@given(
    sizes=st.lists(st.integers(0, 150), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
    block_size=st.integers(1, 8).map(lambda lanes: lanes * LANES),
    together=st.booleans(),
)
def test_coordinates_are_independent_bitwise(
    build: Build,
    dtype: torch.dtype,
    recurrent: torch.dtype | None,
    sizes: list[int],
    order: random.Random,
    block_size: int,
    together: bool,
) -> None:
    rule = randomised(build()).to(torch.float64 if dtype == torch.float64 else torch.float32)
    (whole,) = as_slots(rule, [normal(sum(sizes))], dtype, recurrent)
    parts = [
        Slot(
            parameter.clone(),
            grad.clone(),
            dict(zip(whole.state, state, strict=True)),
            FIRST,
            whole.scale,
            whole.sees_parameter,
        )
        for parameter, grad, *state in zip(
            whole.parameter.split(sizes),
            whole.grad.split(sizes),
            *[[part.clone() for part in tensor.split(sizes, dim=1)] for tensor in whole.state.values()],
            strict=True,
        )
    ]
    shuffled = order.sample(parts, len(parts))
    for call in [shuffled] if together else [[part] for part in shuffled]:
        apply_in_blocks(rule, call, PLAIN, block_size)
    apply_in_blocks(rule, [whole], PLAIN)
    assert torch.equal(torch.cat([part.parameter for part in parts]), whole.parameter)
    for entry, tensor in whole.state.items():
        assert torch.equal(torch.cat([part.state[entry] for part in parts], dim=1), tensor)


@each(RULES)
def test_skipped_non_finite_coordinates_keep_parameter_and_state(build: Build) -> None:
    rule = randomised(build()).float()
    slots = as_slots(rule, [normal(5), normal(6)], torch.float32, torch.bfloat16)
    for path in (apply_per_tensor, apply_in_blocks):
        clean, spoilt = clones(slots), clones(slots)
        spoilt[0].grad[[1, 3]] = torch.tensor([float("nan"), float("-inf")])
        for values in (clean, spoilt):
            path(rule, values, PLAIN._replace(skip_nonfinite=True, weight_decay=0.1))
        kept = torch.tensor([1, 3])
        for one, before, other in zip(spoilt, slots, clean, strict=True):
            pairs = [(one.parameter, before.parameter, other.parameter)]
            pairs += [(one.state[entry], before.state[entry], other.state[entry]) for entry in one.state]
            for value, old, new in pairs:
                if one is spoilt[0]:
                    assert torch.equal(value[..., kept], old[..., kept])
                    new = new.clone()
                    new[..., kept] = old[..., kept]
                assert torch.equal(value, new)


@pytest.mark.parametrize("path", [apply_per_tensor, apply_in_blocks], ids=["per-tensor", "blocks"])
@pytest.mark.parametrize("value", [float("inf"), 1.0], ids=["infinity-here", "infinity-elsewhere"])
def test_found_inf_skips_the_step(
    path: Callable[[UpdateRule, Sequence[Slot], StepSettings], None], value: float
) -> None:
    rule = randomised(LSTML2L()).float()
    slots = as_slots(rule, [normal(5), normal(6)], torch.float32, torch.bfloat16)
    slots[0].grad[1] = value
    called_off, scaled, plain = clones(slots), clones(slots), clones(slots)
    scale = torch.tensor(1024.0)  # a power of two: division does not round
    path(rule, called_off, PLAIN._replace(grad_scale=scale, found_inf=torch.tensor(1.0), weight_decay=0.1))
    for one, before in zip(called_off, slots, strict=True):
        assert torch.equal(one.parameter, before.parameter)
        assert all(torch.equal(one.state[entry], before.state[entry]) for entry in one.state)
    for slot in scaled:
        slot.grad.mul_(scale)
    path(rule, scaled, PLAIN._replace(grad_scale=scale, found_inf=torch.tensor(0.0)))
    path(rule, plain, PLAIN)
    for one, other in zip(scaled, plain, strict=True):
        assert torch.equal(one.parameter[2:], other.parameter[2:])


def test_each_slot_uses_its_own_step_count() -> None:
    rule = randomised(ScaleFreeLSTM()).float()
    slots = as_slots(rule, [normal(3), normal(4), normal(100)], torch.float32)
    slots = [slot._replace(step=torch.tensor(float(count))) for slot, count in zip(slots, (1, 50, 7), strict=True)]
    before, blocked = clones(slots), clones(slots)
    apply_per_tensor(rule, slots, PLAIN)
    apply_in_blocks(rule, blocked, PLAIN)
    assert_same_slots(blocked, slots, before)


class Forgetful(ScaleFreeLSTM):
    """A rule that leaves an entry out of its new state."""

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        update, new_state = super().forward(grad, state, step)
        return update, {entry: value for entry, value in new_state.items() if entry != "cell"}


def test_state_without_an_entry_is_refused_by_name() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"must return a new state with the entries of state_features, .*cell; it"):
        LearnedOptimizer([parameter], Forgetful(), fused=False).step()
