"""Update rules against the float64 oracle and against Adam; bounds, gradient scales and zero gradients."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from helpers.histories import SMALL, call_forward, run
from helpers.numerical_gradients import central_difference
from helpers.reference import Array, adam_updates
from helpers.rules import RULES, VARIANTS, Build, as_reference, each, few_examples, normal, random_state, randomised
from helpers.schedule_free_reference import ScheduleFreeLSTMReference, schedule_free_points
from learned_optim.rules import LSTML2L, MLP, ScaleFreeLSTM, ScheduleFreeLSTM, schedule_free_lstm


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
def test_rule_matches_the_oracle(build: Build) -> None:
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
def test_float32_step_matches_the_oracle_within_rounding(build: Build) -> None:
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
def test_meta_gradient_matches_finite_differences(build: Build) -> None:
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


def test_untrained_scale_free_lstm_equals_adam() -> None:
    grads = normal(60, 5) * torch.tensor([1.0, 1e-3, 1e3, 1e20, 0.0], dtype=torch.float64)
    updates, _ = run(ScaleFreeLSTM().double(), grads)
    # Adam adds eps to the root, the rule its square under the root: apart by eps / rms, 1e-12 / 3e-4 for the first
    # small gradients.
    expected = adam_updates(grads.numpy(), lr=3e-3, betas=(0.9, 0.999), eps=1e-12)
    assert_close(updates, expected, 1e-8)


def test_untrained_mlp_equals_adam() -> None:
    grads = normal(60, 5) * torch.tensor([1.0, 1e-3, 1e3, 1e20, 0.0], dtype=torch.float64)
    updates, _ = run(MLP().double(), grads)
    expected = adam_updates(grads.numpy(), lr=1e-3, betas=(0.9, 0.9), eps=1e-12)
    assert_close(updates, expected, 1e-8)  # the same eps / rms as for the scale-free LSTM


@pytest.mark.slow
@few_examples
@given(history=hnp.arrays(np.float64, (40, 3), elements=st.floats(-1e6, 1e6, allow_subnormal=False)))
def test_momentum_directions_of_the_mlp_are_at_most_one(history: Array) -> None:
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
        # The rule has its eps under the root: apart by at most 1e-12 / 0.02 of 300 steps of 0.003.
        pytest.param(1e-12, 5e-11, id="same-eps"),
        # torch's default. It shortens a step by eps / rms(gradient): at most 1e-8 / 0.02 of 300 steps of 0.003.
        pytest.param(1e-8, 5e-7, id="default-eps"),
    ],
)
def test_untrained_scale_free_lstm_follows_torchs_adam(eps: float, tolerance: float) -> None:
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


def test_untrained_schedule_free_lstm_follows_its_two_sequences() -> None:
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


def test_log_rate_stops_at_its_bound() -> None:
    rule = randomised(ScheduleFreeLSTM(2))
    reference = as_reference(rule)
    grads = torch.ones(120, 3, dtype=torch.float64)  # agree for so long that the bound is reached
    updates, state = run(rule, grads)
    assert_close(updates, np.stack([reference.step(grad) for grad in grads.numpy()]), 1e-12)
    assert (state["log_rate"] == schedule_free_lstm.HIGHEST).all()


def test_derivative_is_zero_beyond_a_clip() -> None:
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


def test_lstm_l2l_has_the_papers_number_of_meta_parameters() -> None:
    # 4 * 20 * (2 + 20 + 1) + 4 * 20 * (20 + 20 + 1) + 20 + 1
    assert sum(parameter.numel() for parameter in LSTML2L().parameters()) == 5141


@pytest.mark.slow
@each(SCALE_FREE)
@few_examples
@given(exponent=st.floats(-6.0, 6.0), seed=st.integers(0, 1000))
def test_scale_free_rule_is_invariant_to_the_loss_scale(build: Build, exponent: float, seed: int) -> None:
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
def test_scale_free_rule_keeps_coordinates_with_zero_gradients(dtype: torch.dtype, build: Build) -> None:
    grads = normal(60, 6).to(dtype)
    pushed = torch.tensor([True, False, True, True, False, True])
    grads[:, ~pushed] = 0.0
    # Weights of order one: a hidden state of the still coordinates is far from zero.
    updates, state = run(randomised(build(), deviation=1.0).to(dtype), grads)
    assert (updates[:, ~pushed] == 0).all()
    assert (updates[:, pushed] != 0).all()
    assert "hidden" not in state or (state["hidden"][:, ~pushed] != 0).any()


def test_lstm_l2l_moves_coordinates_with_zero_gradients() -> None:
    # Faithful to the paper: its biases reach the update. The documentation warns of it.
    updates, _ = run(randomised(LSTML2L()), torch.zeros(60, 1, dtype=torch.float64))
    assert (updates != 0).all()


def test_schedule_free_lstm_observe_and_outputs_match_forward() -> None:
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
