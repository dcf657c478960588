"""Update rules against the float64 oracle, and the laws that every update rule keeps."""

import json
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.func import functional_call, vmap

from helpers.reference import (
    Array,
    ScheduleFreeLSTMReference,
    adam_updates,
    central_difference,
    schedule_free_points,
)
from helpers.rules import RULES, VARIANTS, Build, as_reference, each, few_examples, normal, random_state, randomised
from learned_optim.rules import (
    ARCHITECTURES,
    LSTML2L,
    MLP,
    RuleState,
    ScaleFreeLSTM,
    ScheduleFreeLSTM,
    UpdateRule,
    schedule_free_lstm,
)

# Factors of 1 on the updates: derivatives are then far above the absolute tolerances of the checks.
SMALL: dict[str, Build] = {
    "lstm-l2l": partial(LSTML2L, hidden_size=2, output_scale=1.0),
    "scale-free-lstm": partial(ScaleFreeLSTM, 2, momentum_decays=(0.5, 0.9), rate=1.0),
    "schedule-free-lstm": partial(ScheduleFreeLSTM, 2, rate=1.0),
    "mlp": partial(MLP, 3, rate=1.0, magnitude_rate=1.0),
}


def call_forward(rule: UpdateRule, grad: Tensor, state: RuleState, step: int) -> tuple[Tensor, RuleState]:
    update, state = rule(grad, state, torch.tensor(step))
    return update, state


@torch.no_grad()
def run(rule: UpdateRule, grads: Tensor) -> tuple[Tensor, RuleState]:
    """Updates ``(steps, *coordinates)`` for gradients of that shape, from the zero state; and the last state."""
    state = rule.init_state(tuple(grads.shape[1:]), dtype=grads.dtype)
    updates = []
    for step, grad in enumerate(grads, start=1):
        update, state = call_forward(rule, grad, state, step)
        updates.append(update)
    return torch.stack(updates), state


def hostile_grads(largest: float, steps: int = 60) -> Array:
    """Gradients (steps, 11) of many magnitudes. Each is a float32: rounding the input takes no part in an error."""
    generator = np.random.default_rng(0)
    threshold = math.exp(-10)  # where the preprocessing of lstm-l2l changes its branch
    grads = generator.standard_normal((steps, 11))
    grads *= [1.0, 1e-3, 1e3, 1e-12, 1e-30, largest, threshold, 0.0, 1.0, 1.0, 1.0]
    grads[:, 8] *= generator.random(steps) < 0.1  # mostly zero, as in the rows of an embedding
    grads[:, 9] *= 10.0 ** generator.uniform(-9.0, 9.0, steps)  # another magnitude at each step
    grads[: steps // 2, 10] = 0.0  # pushed late
    return grads.astype(np.float32).astype(np.float64)


def assert_close(actual: Tensor, expected: Tensor | Array, tolerance: float, smallest: float = 0.0) -> None:
    """Equal up to ``tolerance`` times the largest value that each coordinate (last axis) has along the other axes.

    An element alone is no measure of its own error: updates and momenta are sums whose terms can cancel.
    """
    actual, expected = actual.double(), torch.as_tensor(expected)
    assert actual.shape == expected.shape
    allowed = tolerance * expected.abs().amax(dim=tuple(range(expected.dim() - 1)), keepdim=True) + smallest
    excess = (actual - expected).abs() - allowed
    assert (excess <= 0).all(), f"largest excess over the tolerance: {excess.max()}"  # also false for NaN


@each(RULES | VARIANTS)
def test_rule_does_not_depart_from_its_equations(build: Build) -> None:
    rule = randomised(build())
    grads = hostile_grads(largest=1e20)
    reference = as_reference(rule)

    updates, state = run(rule, torch.from_numpy(grads))
    expected = np.stack([reference.step(grad) for grad in grads])

    # The oracle's 1 - b^t loses three digits at b = 0.999 (1e-13); 60 recurrent steps may add one. Seen: 3e-14.
    assert_close(updates, expected, 1e-12)
    for entry, value in state.items():
        assert_close(value, getattr(reference, entry), 1e-12)


@each(RULES | VARIANTS)
def test_float32_step_keeps_its_digits(build: Build) -> None:
    rule = randomised(build()).float()
    # The largest magnitude whose square is a float32; beyond it see the test of overflow.
    grads = hostile_grads(largest=1e20 if isinstance(rule, LSTML2L) else 1e18)
    reference = as_reference(rule)
    state = rule.init_state((grads.shape[1],))

    updates, expected = [], []
    states: dict[str, list[Tensor]] = {entry: [] for entry in state}
    expected_states: dict[str, list[Array]] = {entry: [] for entry in state}
    for step, grad in enumerate(grads, start=1):
        with torch.no_grad():
            update, new_state = call_forward(rule, torch.from_numpy(grad).float(), state, step)
        updates.append(update)
        expected.append(reference.step(grad))
        for entry, value in new_state.items():
            states[entry].append(value)
            expected_states[entry].append(getattr(reference, entry).copy())
        # Each step starts at the oracle's state, so that errors do not pile up and hide where they arise.
        state = {entry: torch.from_numpy(getattr(reference, entry)).float() for entry in state}

    # A gate sums up to 41 products and 3 such sums lie between gradient and update: a few tens of roundings, partly
    # of opposite sign. Seen: 11 eps over several seeds.
    limits = torch.finfo(torch.float32)
    assert_close(torch.stack(updates), np.stack(expected), 32 * limits.eps)
    for entry, values in states.items():  # squares of the smallest gradients vanish
        assert_close(torch.stack(values), np.stack(expected_states[entry]), 32 * limits.eps, limits.tiny)


SCALE_FREE: dict[str, Build] = {name: RULES[name] for name in ("scale-free-lstm", "schedule-free-lstm", "mlp")}


@each(SCALE_FREE)
def test_scale_free_rule_survives_gradients_whose_square_overflows(build: Build) -> None:
    grads = torch.ones(3, 2)
    grads[0, 0] = 1e20
    updates, state = run(randomised(build()).float(), grads)
    assert updates.isfinite().all()
    assert all(value.isfinite().all() for value in state.values())


@each(SMALL)
def test_meta_gradient_is_not_that_of_another_function(build: Build) -> None:
    rule = randomised(build())
    grads, payoff = normal(5, 3, seed=1), normal(5, 3, seed=2)

    state = rule.init_state((3,), dtype=torch.float64)
    objective = torch.zeros((), dtype=torch.float64)
    for step, grad in enumerate(grads, start=1):
        update, state = rule(grad, state, torch.tensor(step))
        objective = objective + (payoff[step - 1] * update).sum()
    objective.backward()

    weights = {name: value.detach().numpy() for name, value in rule.named_parameters()}
    for name, parameter in rule.named_parameters():

        def oracle_objective(weight: Array, name: str = name) -> float:
            reference = as_reference(rule, {**weights, name: weight})
            return sum(
                float(row @ reference.step(grad)) for row, grad in zip(payoff.numpy(), grads.numpy(), strict=True)
            )

        # Truncation costs epsilon^2 of the third derivative and rounding 1e-16 / epsilon: 1e-10 and 1e-11. Seen: 4e-11.
        expected = central_difference(oracle_objective, weights[name], epsilon=1e-5)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, torch.from_numpy(expected), rtol=1e-7, atol=1e-9)


def test_untrained_scale_free_lstm_is_not_off_adams_updates() -> None:
    grads = normal(60, 5) * torch.tensor([1.0, 1e-3, 1e3, 1e20, 0.0], dtype=torch.float64)
    updates, _ = run(ScaleFreeLSTM().double(), grads)
    # Adam adds eps to the root, the rule its square under the root: apart by eps / rms, 1e-12 / 3e-4 for the first
    # small gradients.
    expected = adam_updates(grads.numpy(), lr=3e-3, betas=(0.9, 0.999), eps=1e-12)
    assert_close(updates, expected, 1e-8)


def test_untrained_mlp_is_not_off_adams_updates() -> None:
    grads = normal(60, 5) * torch.tensor([1.0, 1e-3, 1e3, 1e20, 0.0], dtype=torch.float64)
    updates, _ = run(MLP().double(), grads)
    expected = adam_updates(grads.numpy(), lr=1e-3, betas=(0.9, 0.9), eps=1e-12)
    assert_close(updates, expected, 1e-8)  # as above


@pytest.mark.slow
@few_examples
@given(history=hnp.arrays(np.float64, (40, 3), elements=st.floats(-1e6, 1e6, allow_subnormal=False)))
def test_no_direction_of_a_momentum_exceeds_one(history: Array) -> None:
    # What the rule reads is then bounded, whatever the gradients: a weighted mean is at most the weighted root mean
    # square. Each direction is read off by a coefficient of its own.
    rule = MLP(1, rate=1.0).double()
    for scale in range(5):
        with torch.no_grad():
            rule.output_bias.zero_()
            rule.output_bias[1] = -1.0  # without the start's direction
            rule.output_bias[scale] += 1.0
        updates, _ = run(rule, torch.from_numpy(history))
        assert updates.abs().max() <= 1 + 1e-9


@pytest.mark.parametrize(
    ("eps", "tolerance"),
    [
        # The rule has its eps under the root: as below, at most 1e-12 / 0.02 of 300 steps of 0.003.
        pytest.param(1e-12, 5e-11, id="same-eps"),
        # torch's default. It shortens a step by eps / rms(gradient): at most 1e-8 / 0.02 of 300 steps of 0.003.
        pytest.param(1e-8, 5e-7, id="default-eps"),
    ],
)
def test_untrained_scale_free_lstm_does_not_leave_torch_adams_trajectory(eps: float, tolerance: float) -> None:
    curvature = torch.tensor([0.1, 1.0, 10.0, 100.0], dtype=torch.float64)
    adams = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.5, -0.2], dtype=torch.float64))
    optimizer = torch.optim.Adam([adams], lr=3e-3, eps=eps)
    rule = ScaleFreeLSTM().double()
    ours, state = adams.detach().clone(), rule.init_state((4,), dtype=torch.float64)

    for step in range(1, 301):
        adams.grad = curvature * adams.detach().sin()
        optimizer.step()
        with torch.no_grad():
            update, state = rule(curvature * ours.sin(), state, torch.tensor(step))
        ours = ours + update

    torch.testing.assert_close(ours, adams.detach(), rtol=0.0, atol=tolerance)


def test_untrained_schedule_free_lstm_does_not_leave_the_two_sequences() -> None:
    # RMSprop with hypergradients and, kept apart as in the paper, its points and their mean.
    constants, rate, steps = ScheduleFreeLSTMReference, 0.03, 300
    second_moment, squares, momentum, log_rate = np.zeros(5), np.zeros((0, 5)), np.zeros(5), np.zeros(5)

    def gradient(y: Array) -> Array:
        # The last one is pushed no more once it is below 0.5: the mean still follows.
        return np.array([0.1, 1.0, 10.0, 100.0, 1.0]) * np.where(np.arange(5) < 4, np.sin(y), np.maximum(y - 0.5, 0.0))

    def moves(grad: Array, t: int) -> Array:
        nonlocal second_moment, squares, momentum, log_rate
        largest = np.where(second_moment > 0, 100 * second_moment, math.inf)
        squares = np.vstack([squares, np.minimum(grad**2, largest)])
        second_moment = 0.9 * second_moment + 0.1 * grad**2
        rms = np.sqrt(second_moment / (1 - 0.9**t) + constants.EPS**2)
        direction = np.clip(grad / rms, -constants.LARGEST_DIRECTION, constants.LARGEST_DIRECTION)
        agreement = direction * momentum / (1 - 0.9**t) / rms
        log_rate = (1 - constants.FORGETTING) * log_rate + constants.GAIN * agreement
        log_rate = np.clip(log_rate, -constants.BOUND, constants.HIGHEST)
        momentum = 0.9 * momentum + 0.1 * grad
        shrunk = np.minimum(rms / np.sqrt(squares.mean(0) + constants.EPS**2), 1)
        log_factor = log_rate + np.log(shrunk) / 2
        warmth = min(t / constants.WARMUP, 1)
        move: Array = -rate * warmth * np.exp(constants.BOUND * np.tanh(log_factor / constants.BOUND)) * direction
        return move

    def share(t: int) -> float:
        return 1 / (1 + (t - 1) * math.exp(-constants.RECENCY))

    start = np.array([1.0, -1.0, 0.5, -0.2, 1.0])
    expected = schedule_free_points(gradient, start, moves, steps, 1 - constants.FAST_SHARE, share)

    rule, state = ScheduleFreeLSTM(rate=rate).double(), ScheduleFreeLSTM().init_state((5,), dtype=torch.float64)
    points = [torch.from_numpy(start)]
    for step in range(1, steps + 1):
        with torch.no_grad():  # gradients of the expected points: the problem is stiff, and roundings would grow
            update, state = rule(torch.from_numpy(gradient(expected[step - 1])), state, torch.tensor(step))
        points.append(points[-1] + update)

    torch.testing.assert_close(torch.stack(points), torch.from_numpy(expected), rtol=0.0, atol=1e-12)
    last_push = int(np.flatnonzero(expected[:, 4] > 0.5)[-1])
    assert expected[last_push + 1, 4] - expected[-1, 4] > 0.05


def test_log_rate_does_not_leave_its_bounds() -> None:
    rule = randomised(ScheduleFreeLSTM(2))
    reference = as_reference(rule)
    grads = torch.ones(120, 3, dtype=torch.float64)  # agree for so long that the bound is reached
    updates, state = run(rule, grads)
    assert_close(updates, np.stack([reference.step(grad) for grad in grads.numpy()]), 1e-12)
    assert (state["log_rate"] == schedule_free_lstm.HIGHEST).all()


def test_derivative_is_not_passed_on_beyond_a_cut() -> None:
    rule = randomised(ScheduleFreeLSTM(2, rate=1.0))
    bound, highest = schedule_free_lstm.FACTOR_BOUND, schedule_free_lstm.HIGHEST
    grad = torch.tensor([5.0, 5.0, 0.5, -5.0], dtype=torch.float64)  # against a root mean square of .3 before
    state = random_state(rule, 4)
    state["second_moment"] = torch.full_like(state["second_moment"], 0.1)
    state["momentum"] = torch.full_like(state["momentum"], 1.0)
    state["log_rate"] = torch.tensor([[0.1, highest - 0.01, highest - 1.5, -bound + 0.01]], dtype=torch.float64)

    def forward(grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        update, new_state = rule(grad, dict(zip(state, values, strict=True)), torch.tensor(400))
        return (update, *new_state.values())

    inputs = [value.requires_grad_() for value in (grad, *state.values())]
    assert torch.autograd.gradcheck(forward, inputs, eps=1e-7, atol=1e-6)
    new_rate = forward(*inputs)[1 + list(state).index("log_rate")]
    assert ((new_rate == highest) | (new_rate == -bound)).tolist() == [[False, True, False, True]]
    (d_rate,) = torch.autograd.grad(new_rate.sum(), state["log_rate"])
    assert (d_rate == 0).tolist() == [[False, True, False, True]]


def test_lstm_l2l_does_not_change_its_number_of_meta_parameters() -> None:
    # 4 * 20 * (2 + 20 + 1) + 4 * 20 * (20 + 20 + 1) + 20 + 1
    assert sum(parameter.numel() for parameter in LSTML2L().parameters()) == 5141


@pytest.mark.slow
@each(SCALE_FREE)
@few_examples
@given(exponent=st.floats(-6.0, 6.0), seed=st.integers(0, 1000))
def test_scale_free_rule_does_not_see_the_scale_of_the_loss(build: Build, exponent: float, seed: int) -> None:
    rule = randomised(build(), seed)
    grads = normal(30, 5, seed=seed)
    grads = grads.sign() * (0.5 + grads.abs())  # root mean squares of at least 0.5
    scale = 10.0**exponent

    updates, _ = run(rule, grads)
    scaled_updates, _ = run(rule, scale * grads)

    # eps changes a direction by eps / (scale * 0.5); the weights may magnify it, tenfold is allowed. Plus rounding.
    assert_close(scaled_updates, updates, 10 * 1e-12 / (0.5 * min(scale, 1.0)) + 1e-12)


@each(SCALE_FREE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_scale_free_rule_never_moves_a_coordinate_that_was_never_pushed(dtype: torch.dtype, build: Build) -> None:
    grads = normal(60, 6).to(dtype)
    pushed = torch.tensor([True, False, True, True, False, True])
    grads[:, ~pushed] = 0.0
    # Weights of order one: a hidden state of the still coordinates is far from zero.
    updates, state = run(randomised(build(), deviation=1.0).to(dtype), grads)
    assert (updates[:, ~pushed] == 0).all()
    assert (updates[:, pushed] != 0).all()
    assert "hidden" not in state or (state["hidden"][:, ~pushed] != 0).any()


def test_lstm_l2l_is_not_tamed_into_leaving_still_coordinates_alone() -> None:
    # Faithful to the paper: its biases reach the update. The documentation warns of it.
    updates, _ = run(randomised(LSTML2L()), torch.zeros(60, 1, dtype=torch.float64))
    assert (updates != 0).all()


# Coordinatewise laws.
#
# Which coordinates share a block changes the last bits, and nothing else: torch's sigmoid takes a vector path for full
# registers and a scalar path for the rest, sums over the leading axis add in another order there, and BLAS takes
# another kernel for a matrix with a single column. So a coordinate that changes its place, or the size of its block,
# is held to float64 rounding; reshaping changes neither, and is held to the bit.
LAW_TOLERANCE = 1e-12  # relative to the block's largest update; a leak between coordinates is of order one

histories = hnp.arrays(
    np.float64, st.tuples(st.just(3), st.integers(1, 24)), elements=st.floats(-1e6, 1e6, allow_subnormal=False)
)


def assert_same_block(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=LAW_TOLERANCE * expected.abs().max().item())


@each(RULES)
@few_examples
@given(history=histories, data=st.data())
def test_permuting_coordinates_does_not_change_their_updates(build: Build, history: Array, data: st.DataObject) -> None:
    rule, grads = randomised(build()), torch.from_numpy(history)
    order = data.draw(st.permutations(range(grads.shape[1])))
    updates, state = run(rule, grads)
    permuted_updates, permuted_state = run(rule, grads[:, order])
    assert_same_block(permuted_updates, updates[:, order])
    for entry, value in state.items():
        assert_same_block(permuted_state[entry], value[:, order])


@each(RULES)
@few_examples
@given(history=histories, data=st.data())
def test_splitting_a_block_does_not_change_updates(build: Build, history: Array, data: st.DataObject) -> None:
    rule, grads = randomised(build()), torch.from_numpy(history)
    cut = data.draw(st.integers(0, grads.shape[1]))
    updates, state = run(rule, grads)
    (left, left_state), (right, right_state) = run(rule, grads[:, :cut]), run(rule, grads[:, cut:])
    assert_same_block(torch.cat([left, right], dim=1), updates)
    for entry, value in state.items():
        assert_same_block(torch.cat([left_state[entry], right_state[entry]], dim=1), value)


@each(RULES)
@few_examples
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 1000))
def test_flattening_a_parameter_does_not_change_a_bit(build: Build, rows: int, columns: int, seed: int) -> None:
    rule, grads = randomised(build()), normal(3, rows, columns, seed=seed)
    updates, state = run(rule, grads)
    flat_updates, flat_state = run(rule, grads.flatten(1))
    assert torch.equal(flat_updates, updates.flatten(1))
    for entry, value in state.items():
        assert torch.equal(flat_state[entry], value.flatten(1))


@each(RULES)
def test_scalar_parameter_is_not_treated_unlike_a_vector_of_one(build: Build) -> None:
    rule, grads = randomised(build()), normal(4)
    updates, state = run(rule, grads)
    vector_updates, vector_state = run(rule, grads[:, None])
    assert torch.equal(updates, vector_updates[:, 0])
    for entry, value in state.items():
        assert torch.equal(value, vector_state[entry][:, 0])


@each(RULES)
@pytest.mark.parametrize("coordinates", [(0,), (3, 0)], ids=str)
def test_empty_parameter_does_not_raise(build: Build, coordinates: tuple[int, ...]) -> None:
    rule = randomised(build())
    updates, state = run(rule, torch.empty(2, *coordinates, dtype=torch.float64))
    assert updates.shape == (2, *coordinates)
    for entry, features in rule.state_features.items():
        assert state[entry].shape == (features, *coordinates)


@each(RULES)
def test_forward_does_not_write_to_its_inputs_or_weights(build: Build) -> None:
    rule = randomised(build())
    grad, state, step = normal(5), random_state(rule, 5), torch.tensor(3)
    before = [value.clone() for value in (grad, *state.values(), step, *rule.state_dict().values())]
    names = list(state)

    first, first_state = rule(grad, state, step)
    second, second_state = rule(grad, state, step)

    after = [grad, *state.values(), step, *rule.state_dict().values()]
    assert list(state) == names
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert torch.equal(first, second)
    assert all(torch.equal(first_state[entry], second_state[entry]) for entry in names)


@each(RULES)
def test_global_random_state_is_not_touched(build: Build) -> None:
    torch_before, python_before = torch.get_rng_state(), random.getstate()
    rule = build()
    rule.reset_parameters(seed=1)
    run(rule, torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert random.getstate() == python_before


@each(RULES)
def test_seed_does_not_leave_the_weights_to_chance(build: Build) -> None:
    def weights(seed: int) -> Tensor:
        rule = build()
        rule.reset_parameters(seed)
        return torch.nn.utils.parameters_to_vector(rule.parameters())

    assert torch.equal(weights(0), torch.nn.utils.parameters_to_vector(build().parameters()))
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@each(SMALL)
def test_no_derivative_of_forward_is_wrong(build: Build) -> None:
    rule = randomised(build())
    entries, names = list(rule.state_features), [name for name, _ in rule.named_parameters()]

    def forward(grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        state = dict(zip(entries, values[: len(entries)], strict=True))
        weights = dict(zip(names, values[len(entries) :], strict=True))
        update, new_state = functional_call(rule, weights, (grad, state, torch.tensor(3)))
        return (update, *(new_state[entry] for entry in entries))

    # One gradient on the steep branch of the log-and-sign preprocessing, none on its corners 0 and exp(-10).
    grad = torch.tensor([0.5, -2e-5, 2.0], dtype=torch.float64)
    inputs = [grad, *random_state(rule, 3).values(), *(value.detach() for value in rule.parameters())]
    # eps 1e-7 moves that gradient by 0.5 % only, where the slope is exp(10); rounding then costs 1e-16 / 1e-7.
    assert torch.autograd.gradcheck(forward, [value.requires_grad_() for value in inputs], eps=1e-7, atol=1e-7)


@each(RULES)
def test_input_that_is_always_zero_does_not_poison_the_meta_gradient(build: Build) -> None:
    # A pixel that is black in every image: its weight's gradient is zero, and with second derivatives the
    # meta-gradient flows back through that gradient.
    rule = randomised(build())
    images = torch.tensor([[0.0, 1.0, 0.5], [0.0, -1.0, 2.0]], dtype=torch.float64)

    def loss(pixel_weights: Tensor) -> Tensor:
        return ((images @ pixel_weights).tanh() - 1).square().sum()

    pixel_weights = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    state = rule.init_state((3,), dtype=torch.float64)
    for step in range(1, 4):
        (grad,) = torch.autograd.grad(loss(pixel_weights), pixel_weights, create_graph=True)
        update, state = rule(grad, state, torch.tensor(step))
        pixel_weights = pixel_weights + update
    meta_gradients = torch.autograd.grad(loss(pixel_weights), list(rule.parameters()))
    assert all(gradient.isfinite().all() for gradient in meta_gradients)


@each(RULES)
def test_vmap_over_meta_parameters_is_not_unlike_a_loop(build: Build) -> None:
    rule = build()
    members = [{n: p.detach().clone() for n, p in randomised(build(), seed).named_parameters()} for seed in range(3)]
    stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}

    def unroll(weights: dict[str, Tensor], grads: Tensor) -> Tensor:
        state, updates = rule.init_state((4,), dtype=torch.float64), []
        for step, grad in enumerate(grads, start=1):
            update, state = functional_call(rule, weights, (grad, state, torch.tensor(step)))
            updates.append(update)
        return torch.stack(updates)

    grads = normal(4, 4)
    looped = torch.stack([unroll(member, grads) for member in members])
    together = vmap(unroll, in_dims=(0, None))(stacked, grads)
    # A batched matrix product sums in another order.
    torch.testing.assert_close(together, looped, rtol=1e-12, atol=1e-14)


@each(RULES)
def test_tasks_of_different_age_do_not_share_a_clock(build: Build) -> None:
    rule = randomised(build())
    grads, state, steps = normal(3, 4), random_state(rule, 3, 4), torch.tensor([[1], [7], [4000]])

    updates, new_state = rule(grads, state, steps)

    for task in range(3):
        own_state = {entry: value[:, task] for entry, value in state.items()}
        update, own_state = rule(grads[task], own_state, steps[task, 0])
        assert_same_block(updates[task], update)
        for entry, value in own_state.items():
            assert_same_block(new_state[entry][:, task], value)


@each(RULES)
@pytest.mark.parametrize("everything", [False, True], ids=["recurrent", "everything"])
def test_bfloat16_state_is_not_refused_nor_used_for_arithmetic(build: Build, everything: bool) -> None:
    rule = randomised(build()).float()
    grad, step = normal(5).float(), torch.tensor(3)
    assert rule.recurrent_state == {"hidden", "cell"} & rule.state_features.keys()
    stored = {
        entry: value.to(torch.bfloat16 if everything or entry in rule.recurrent_state else torch.float32)
        for entry, value in random_state(rule, 5).items()
    }

    update, state = rule(grad, stored, step)
    expected, expected_state = rule(grad, {entry: value.float() for entry, value in stored.items()}, step)

    assert update.dtype == torch.float32
    assert torch.equal(update, expected)
    for entry, value in state.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected_state[entry])


@each(RULES | VARIANTS)
def test_settings_do_not_forget_part_of_the_architecture(build: Build) -> None:
    rule = randomised(build())
    written = json.loads(json.dumps(dict(rule.settings)))  # as a file carries them: tuples come back as lists
    rebuilt = ARCHITECTURES[rule.name](**written).double()
    assert type(rebuilt) is type(rule)
    assert rebuilt.settings == rule.settings
    assert rebuilt.state_features == rule.state_features
    rebuilt.load_state_dict(rule.state_dict())
    grads = normal(3, 4)
    assert torch.equal(run(rebuilt, grads)[0], run(rule, grads)[0])


NAN = float("nan")


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        pytest.param(partial(LSTML2L, hidden_size=0), "hidden_size", id="lstm-l2l-no-units"),
        pytest.param(partial(LSTML2L, layers=0), "layers", id="lstm-l2l-no-layers"),
        pytest.param(partial(LSTML2L, p=0.0), "p", id="lstm-l2l-p-zero"),
        pytest.param(partial(LSTML2L, p=NAN), "p", id="lstm-l2l-p-nan"),
        pytest.param(partial(LSTML2L, output_scale=-0.1), "output_scale", id="lstm-l2l-negative-scale"),
        pytest.param(partial(ScaleFreeLSTM, hidden_size=0), "hidden_size", id="scale-free-lstm-no-units"),
        pytest.param(partial(ScaleFreeLSTM, momentum_decays=()), "momentum_decays", id="scale-free-lstm-no-decays"),
        pytest.param(partial(ScaleFreeLSTM, momentum_decays=(0.5,)), "momentum_decays", id="scale-free-lstm-no-0.9"),
        pytest.param(partial(ScaleFreeLSTM, momentum_decays=(0.9, 1.0)), "momentum_decays", id="scale-free-lstm-1.0"),
        pytest.param(partial(ScaleFreeLSTM, momentum_decays=(-0.1, 0.9)), "momentum_decays", id="scale-free-lstm-neg"),
        pytest.param(partial(ScaleFreeLSTM, momentum_decays=(0.9, NAN)), "momentum_decays", id="scale-free-lstm-nan"),
        pytest.param(partial(ScaleFreeLSTM, rate=0.0), "rate", id="scale-free-lstm-no-rate"),
        pytest.param(partial(ScaleFreeLSTM, rate=NAN), "rate", id="scale-free-lstm-rate-nan"),
        pytest.param(partial(ScheduleFreeLSTM, hidden_size=0), "hidden_size", id="schedule-free-lstm-no-units"),
        pytest.param(partial(ScheduleFreeLSTM, rate=-0.1), "rate", id="schedule-free-lstm-negative-rate"),
        pytest.param(partial(ScheduleFreeLSTM, rate=NAN), "rate", id="schedule-free-lstm-rate-nan"),
        pytest.param(partial(MLP, hidden_size=0), "hidden_size", id="mlp-no-units"),
        pytest.param(partial(MLP, rate=0.0), "rate", id="mlp-no-rate"),
        pytest.param(partial(MLP, magnitude_rate=NAN), "magnitude_rate", id="mlp-magnitude-rate-nan"),
    ],
)
def test_impossible_setting_is_not_accepted(build: Build, argument: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        build()


def test_schedule_free_lstm_steps_with_outputs_of_zero_and_tells_what_its_lstm_would_say() -> None:
    generator = torch.Generator().manual_seed(0)
    rule = ScheduleFreeLSTM(hidden_size=3)
    unsteered = ScheduleFreeLSTM(hidden_size=3)
    with torch.no_grad():
        rule.output_weight.normal_(generator=generator)
        rule.output_bias.normal_(generator=generator)
    state, calm, said, signals = rule.init_state((4,)), rule.init_state((4,)), [], []
    for step in range(1, 41):
        grad = torch.randn(4, generator=generator)
        seen, after = rule.observe(grad, calm, torch.tensor(step))
        _, expected = unsteered(grad, calm, torch.tensor(step))
        calm = expected
        for entry in ("momentum", "second_moment", "displacement", "log_rate"):
            assert after[entry].equal(expected[entry]), entry
        seen, _ = rule.observe(grad, state, torch.tensor(step))
        _, state = rule(grad, state, torch.tensor(step))
        signals.append(seen.detach())
        said.append(rule.output_weight @ state["hidden"] + rule.output_bias[:, None])
    outputs = rule.outputs(torch.stack(signals))
    torch.testing.assert_close(outputs, torch.stack(said))
    (gradient,) = torch.autograd.grad(outputs.sum(), rule.cell.weight)
    (expected_gradient,) = torch.autograd.grad(torch.stack(said).sum(), rule.cell.weight)
    assert not gradient.equal(torch.zeros_like(gradient))
    assert expected_gradient.isfinite().all()
