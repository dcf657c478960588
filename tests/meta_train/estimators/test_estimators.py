"""Gradient estimators against the truth: autograd through the unroll, and finite differences of the meta-loss."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from helpers.numerical_gradients import central_difference
from helpers.particles import generator, randomised
from helpers.user_tasks import Plane
from learned_optim.meta_train.estimators import WindowGradient, truncated_bptt
from learned_optim.meta_train.estimators.truncated_bptt import sample_coordinates
from learned_optim.meta_train.inner.meta_loss import MetaLoss
from learned_optim.meta_train.inner.unroll import InnerState, start, unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import Task
from learned_optim.meta_train.tasks.mlp import MLPTask
from learned_optim.meta_train.tasks.quadratic import QuadraticTask
from learned_optim.rules import LSTML2L, RuleState, ScaleFreeLSTM, ScheduleFreeLSTM, UpdateRule

pytestmark = pytest.mark.usefixtures("double")

INSTANCES, WARM_UP, STEPS = 2, 3, 4
ROUNDING = 1e-10  # relative; float64 carries 16 digits, and the chain runs through 4 steps of an LSTM
DIFFERENCE = 1e-6  # of finite differences: rounding 1e-16 / 1e-6 and truncation 1e-12, times curvatures up to 1e4


def perceptrons() -> Task:
    images = torch.rand(30, 4, generator=generator())
    return MLPTask((images, torch.arange(30) % 3), 6, [3], "tanh", initial="torch", gain=2.0, layer_norm=True)


RULES: dict[str, Callable[[], UpdateRule]] = {
    "lstm-l2l": lambda: LSTML2L(hidden_size=2, layers=2, output_scale=0.3),
    "scale-free-lstm": lambda: ScaleFreeLSTM(2, momentum_decays=(0.9, 0.5), rate=0.1),
    "schedule-free-lstm": lambda: ScheduleFreeLSTM(2, rate=0.1),
}
TASKS: dict[str, Callable[[], Task]] = {
    "mlp": perceptrons,
    "quadratic": lambda: QuadraticTask(5, None, 0.1, 1.0),
    "linear": Plane,
}
META_LOSSES = {
    "mean": MetaLoss(),
    "log": MetaLoss("log"),
    "final": MetaLoss("final"),
    "outer-batches": MetaLoss(outer_batches=2),
    "log-of-outer-batch": MetaLoss("log", outer_batches=1),
}
each_rule = pytest.mark.parametrize("build_rule", list(RULES.values()), ids=list(RULES))
each_task = pytest.mark.parametrize("build_task", list(TASKS.values()), ids=list(TASKS))
each_meta_loss = pytest.mark.parametrize("meta_loss", list(META_LOSSES.values()), ids=list(META_LOSSES))


def under_way(
    rule: UpdateRule, task: Task, scale: Tensor | None = None
) -> tuple[UpdateRule, VectorizedTask, InnerState]:
    """Random meta-parameters, instances, and a state in the middle of an inner training: nothing in it is zero."""
    rule = randomised(rule)
    instances = VectorizedTask(task, INSTANCES, seed=0, scale=scale)
    with torch.no_grad():
        state = unroll(rule, instances, start(rule, instances, generator(1)), WARM_UP, generator(2)).state
    return rule, instances, state


def flat(result: WindowGradient) -> Tensor:
    return parameters_to_vector(result.grads)


def slopes_of_meta_loss(
    rule: UpdateRule, task: VectorizedTask, state: InnerState, meta_loss: MetaLoss, directions: Tensor
) -> Tensor:
    """Finite differences of the window's meta-loss as the meta-parameters move along each direction."""
    here = parameters_to_vector(rule.parameters()).detach().clone()

    @torch.no_grad()
    def meta_loss_at(coefficients: np.ndarray) -> float:
        vector_to_parameters(here + torch.from_numpy(coefficients) @ directions, rule.parameters())
        losses = unroll(rule, task, state, STEPS, generator(3), outer_batches=meta_loss.outer_batches).counted
        return float(meta_loss.reduction(task)(losses, state.initial_loss))

    slopes = central_difference(meta_loss_at, np.zeros(len(directions)), epsilon=1e-6)
    vector_to_parameters(here, rule.parameters())
    return torch.from_numpy(slopes)


@each_meta_loss
@each_task
@each_rule
def test_replay_equals_autograd_through_the_unroll(
    build_rule: Callable[[], UpdateRule], build_task: Callable[[], Task], meta_loss: MetaLoss
) -> None:
    rule, task, state = under_way(build_rule(), build_task(), torch.tensor([[0.5], [2.0]]))
    window = unroll(rule, task, state, STEPS, generator(3), outer_batches=meta_loss.outer_batches)
    value = meta_loss.reduction(task)(window.counted, state.initial_loss)
    expected = torch.autograd.grad(value, tuple(rule.parameters()), allow_unused=True)

    result = truncated_bptt(rule, task, state, STEPS, generator(3), meta_loss=meta_loss)
    for parameter, grad, expected_grad in zip(rule.parameters(), result.grads, expected, strict=True):
        expected_grad = torch.zeros_like(parameter) if expected_grad is None else expected_grad
        torch.testing.assert_close(grad, expected_grad, rtol=ROUNDING, atol=1e-14)
    assert float(flat(result).abs().max()) > 1e-4
    torch.testing.assert_close(result.meta_loss, value.detach(), rtol=ROUNDING, atol=0)
    torch.testing.assert_close(result.losses, window.losses.detach(), rtol=ROUNDING, atol=0)
    torch.testing.assert_close(result.state.parameters, window.state.parameters.detach(), rtol=ROUNDING, atol=0)
    assert float(result.state.step) == WARM_UP + STEPS


@pytest.mark.slow
@each_meta_loss
@each_task
@each_rule
def test_second_derivatives_give_the_gradient_of_the_meta_loss(
    build_rule: Callable[[], UpdateRule], build_task: Callable[[], Task], meta_loss: MetaLoss
) -> None:
    rule, task, state = under_way(build_rule(), build_task())
    meta_parameters = sum(parameter.numel() for parameter in rule.parameters())
    directions = torch.randn(8, meta_parameters, generator=generator(4))  # a wrong component shows in all of them
    expected = slopes_of_meta_loss(rule, task, state, meta_loss, directions)
    tolerance = DIFFERENCE * float(expected.abs().max())

    exact = truncated_bptt(rule, task, state, STEPS, generator(3), meta_loss=meta_loss, second_derivatives=True)
    torch.testing.assert_close(directions @ flat(exact), expected, rtol=0, atol=tolerance)
    first_order = truncated_bptt(rule, task, state, STEPS, generator(3), meta_loss=meta_loss)
    error = float((directions @ flat(first_order) - expected).abs().max())
    if build_task is Plane:  # its gradients are constant: nothing is neglected
        assert error <= tolerance
    else:  # lstm-l2l hardly depends on the size of a gradient, so that little is neglected there too
        assert error > 3 * tolerance


@each_task
@each_rule
def test_losses_above_the_clamp_have_no_gradient(
    build_rule: Callable[[], UpdateRule], build_task: Callable[[], Task]
) -> None:
    rule, task, state = under_way(build_rule(), build_task())
    losses = unroll(rule, task, state, STEPS, generator(3)).losses
    clamp = float(losses.detach().median())
    value = torch.where(losses < clamp, losses, clamp).mean()
    expected = torch.autograd.grad(value, tuple(rule.parameters()), allow_unused=True)
    result = truncated_bptt(rule, task, state, STEPS, generator(3), meta_loss=MetaLoss(clamp=clamp))
    torch.testing.assert_close(result.meta_loss, value.detach(), rtol=ROUNDING, atol=0)
    filled = [
        torch.zeros_like(parameter) if grad is None else grad
        for parameter, grad in zip(rule.parameters(), expected, strict=True)
    ]
    torch.testing.assert_close(flat(result), parameters_to_vector(filled), rtol=ROUNDING, atol=1e-14)
    everything = truncated_bptt(rule, task, state, STEPS, generator(3))
    assert float((flat(everything) - flat(result)).norm()) > 0.01 * float(flat(everything).norm())


def test_unroll_equals_a_written_out_loop() -> None:
    """The unroll under plain gradient descent, against the same loop written out."""
    task = VectorizedTask(QuadraticTask(5, None, 0.1, 1.0), INSTANCES, seed=0)
    steps_seen = []

    def descend(grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        steps_seen.append(float(step))
        return -0.01 * grad, state

    state = start(randomised(LSTML2L(2)), task, generator(1))
    batches, first_batch = generator(3), generator(1)
    _, grad = task.losses_and_grads(task.initial_parameters, task.batch(first_batch))
    torch.testing.assert_close(state.initial_loss, task.losses(task.initial_parameters, task.batch(generator(1))))
    parameters, losses, grads = task.initial_parameters, [], [grad]
    for _ in range(STEPS):
        parameters = parameters - 0.01 * grad
        loss, grad = task.losses_and_grads(parameters, task.batch(batches))
        losses.append(loss)
        grads.append(grad)
    window = unroll(descend, task, state, STEPS, generator(3), record_grads=True)
    assert window.grads is not None
    torch.testing.assert_close(window.losses, torch.stack(losses), rtol=0, atol=0)
    torch.testing.assert_close(list(window.grads), grads, rtol=0, atol=0)
    torch.testing.assert_close(window.state.parameters, parameters, rtol=0, atol=0)
    assert steps_seen == [1, 2, 3, 4]
    assert unroll(descend, task, state, STEPS, generator(3)).grads is None


@each_rule
def test_two_windows_equal_one_long_window(build_rule: Callable[[], UpdateRule]) -> None:
    rule = randomised(build_rule())
    task = VectorizedTask(perceptrons(), INSTANCES, seed=0)
    state = start(rule, task, generator(1))
    batches = generator(3)
    first = truncated_bptt(rule, task, state, 3, batches)
    second = truncated_bptt(rule, task, first.state, 2, batches)
    with torch.no_grad():
        whole = unroll(rule, task, state, 5, generator(3))
    torch.testing.assert_close(torch.cat([first.losses, second.losses]), whole.losses, rtol=0, atol=0)
    for entry, tensor in whole.state.rule_state.items():
        torch.testing.assert_close(second.state.rule_state[entry], tensor, rtol=0, atol=0)
    assert float(second.state.step) == 5


@pytest.mark.slow
@each_meta_loss
@each_rule
def test_sampled_coordinates_are_unbiased(build_rule: Callable[[], UpdateRule], meta_loss: MetaLoss) -> None:
    """200 estimates from 6 of 20 coordinates: no component's mean is more than 5 standard errors off."""
    # No noise: all windows are the same.
    rule, task, state = under_way(build_rule(), QuadraticTask(10, 50.0, 0.0, 1.0))
    estimate = partial(truncated_bptt, rule, task, state, STEPS, meta_loss=meta_loss)
    full = flat(estimate(generator(0)))
    estimates = torch.stack([flat(estimate(generator(seed), replay_coordinates=6)) for seed in range(200)])
    error = estimates.mean(0) - full
    standard_error = estimates.std(0) / len(estimates) ** 0.5
    assert bool((error.abs() <= 5 * standard_error + 1e-15).all())
    assert float(standard_error.norm()) < 0.1 * float(full.norm())  # so that a bias of a half would be seen
    assert float(estimates.std(0).norm()) > 0.01 * float(full.norm())  # they are estimates


@pytest.mark.parametrize("count", [20, 21, 1000])
def test_replaying_all_coordinates_is_exact(count: int) -> None:
    rule, task, state = under_way(ScaleFreeLSTM(2), QuadraticTask(10, None, 0.0, 1.0))
    full = truncated_bptt(rule, task, state, STEPS, generator())
    result = truncated_bptt(rule, task, state, STEPS, generator(), replay_coordinates=count)
    assert torch.equal(flat(result), flat(full))


def test_coordinates_are_drawn_in_proportion_to_their_gradient_to_go() -> None:
    grads_to_go = torch.tensor([[3.0, 0.0, 0.0, 1.0], [4.0, 0.0, 2.0, 0.0]])
    norms = torch.tensor([5.0, 0.0, 2.0, 1.0])
    chosen, factors = sample_coordinates(grads_to_go, 8000, generator())
    torch.testing.assert_close(factors, norms.sum() / (8000 * norms[chosen]), rtol=1e-12, atol=0)
    shares = torch.bincount(chosen, minlength=4) / 8000
    # Five standard deviations of a share of 8000 draws are at most 5 sqrt(.25 / 8000) = 0.028.
    torch.testing.assert_close(shares, norms / norms.sum(), rtol=0, atol=0.028)
    assert shares[1] == 0


def test_draw_from_many_coordinates_reaches_the_tail() -> None:
    coordinates, tail = 400_000, 4_000
    grads_to_go = torch.ones(1, coordinates, dtype=torch.float32)
    grads_to_go[:, -tail:] = 0.1  # together a thousandth; sums in float32 lose it
    chosen, _ = sample_coordinates(grads_to_go, 1_000_000, generator())
    expected = 1_000_000 * 0.1 * tail / (coordinates - tail + 0.1 * tail)
    assert abs(int((chosen >= coordinates - tail).sum()) - expected) < 5 * expected**0.5


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_draw_is_uniform_for_zero_or_non_finite_gradients(value: float) -> None:
    grads_to_go = torch.ones(3, 5)
    grads_to_go[:, 2 if value else slice(None)] = value
    chosen, factors = sample_coordinates(grads_to_go, 1000, generator())
    assert set(chosen.tolist()) == set(range(5))
    torch.testing.assert_close(factors, torch.full((1000,), 5 / 1000))


def test_infinite_inner_gradient_makes_the_sampled_estimate_nan() -> None:
    task = VectorizedTask(perceptrons(), INSTANCES, seed=0)
    rule = randomised(ScaleFreeLSTM(2))
    state = start(rule, task, generator())
    losses_and_grads = task.losses_and_grads
    calls: list[None] = []

    def with_infinity(*arguments: object, **options: object) -> tuple[Tensor, Tensor]:
        losses, grads = losses_and_grads(*arguments, **options)  # type: ignore[arg-type]
        calls.append(None)
        if len(calls) == 2:
            grads = grads.index_fill(1, torch.tensor([3]), torch.inf)
        return losses, grads

    task.losses_and_grads = with_infinity  # type: ignore[method-assign]
    result = truncated_bptt(rule, task, state, STEPS, generator(), replay_coordinates=1)
    assert all(grad.isnan().all() for grad in result.grads)


def test_sampled_replay_of_second_derivatives_is_refused() -> None:
    rule = randomised(ScaleFreeLSTM(2))
    task = VectorizedTask(Plane(), INSTANCES, seed=0)
    state = start(rule, task, generator())
    with pytest.raises(ValueError, match="replay_coordinates needs constant inner gradients"):
        truncated_bptt(rule, task, state, 2, generator(), second_derivatives=True, replay_coordinates=3)


@pytest.mark.parametrize(
    "options",
    [{}, {"replay_coordinates": 3}, {"second_derivatives": True}],
    ids=["replay", "sampled-replay", "second-derivatives"],
)
@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad-mode", "no-grad-mode"])
@each_rule
def test_estimate_leaves_rule_state_and_random_numbers_unchanged(
    build_rule: Callable[[], UpdateRule], grad_mode: bool, options: dict[str, int]
) -> None:
    rule, task, state = under_way(build_rule(), perceptrons())
    copy = [tensor.clone() for tensor in tensors(state)]
    for index, parameter in enumerate(rule.parameters()):
        parameter.grad = torch.full_like(parameter, index)
    weights = parameters_to_vector(rule.parameters()).detach().clone()
    random_state = torch.get_rng_state()

    with torch.set_grad_enabled(grad_mode):
        result = truncated_bptt(rule, task, state, STEPS, generator(3), **options)  # type: ignore[arg-type]
    for index, parameter in enumerate(rule.parameters()):
        assert parameter.requires_grad
        assert parameter.grad is not None
        assert bool((parameter.grad == index).all())
    assert torch.equal(parameters_to_vector(rule.parameters()), weights)
    assert all(torch.equal(tensor, before) for tensor, before in zip(tensors(state), copy, strict=True))
    assert torch.equal(random_state, torch.get_rng_state())
    left = [*tensors(result.state), *result.grads, result.meta_loss, result.losses]
    assert [tensor.requires_grad for tensor in left] == [False] * len(left)
    if grad_mode:
        expected = truncated_bptt(rule, task, state, STEPS, generator(3), **options)  # type: ignore[arg-type]
        assert torch.equal(flat(result), flat(expected))


def tensors(state: InnerState) -> list[Tensor]:
    return [state.parameters, state.grad, *state.rule_state.values(), state.step, state.initial_loss]
