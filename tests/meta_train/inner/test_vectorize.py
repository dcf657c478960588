"""Vectorised tasks against a plain loop over separate modules with autograd."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils._pytree import tree_map

from helpers.numerical_gradients import central_difference
from helpers.small_families import BUILDERS
from helpers.user_tasks import INPUTS, Reconstruction, Regression
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import Batch, Task
from learned_optim.meta_train.tasks.conv_net import ConvNetTask
from learned_optim.meta_train.tasks.mlp import MLPTask
from learned_optim.meta_train.tasks.quadratic import QuadraticTask

pytestmark = pytest.mark.usefixtures("double", "neural_art")

INSTANCES, SEED = 3, 7
ROUNDING = 1e-12  # relative; float64 carries 16 digits, and batched sums may run in another order


def perceptrons(layer_norm: bool) -> Task:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 6, generator=generator)
    labels = torch.arange(40) % 4
    return MLPTask((images, labels), 8, [5, 3], "tanh", initial="torch", gain=2.0, layer_norm=layer_norm)


def conv_nets(norm: str, activation: str) -> Task:
    images = torch.rand(40, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    return ConvNetTask((images, labels), 3, 6, [3, 2], 3, hidden=4, activation=activation, norm=norm, gain=1.5)


class Tied(nn.Module):
    """One matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, INPUTS)
        self.second = nn.Linear(INPUTS, INPUTS)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.second(self.first(inputs).tanh())
        return outputs.sum(-1)


TASKS: dict[str, Callable[[], Task]] = {
    **{f"family-{name}": build for name, build in BUILDERS.items()},
    "mlp": partial(perceptrons, layer_norm=False),
    "mlp-layer-norm": partial(perceptrons, layer_norm=True),
    "conv-net": partial(conv_nets, "none", "relu"),
    "conv-net-batch-norm": partial(conv_nets, "batch", "gelu"),
    "conv-net-layer-norm": partial(conv_nets, "layer", "tanh"),
    "quadratic": partial(QuadraticTask, 4, None, 0.0, 1.0),
    "quadratic-noise-condition": partial(QuadraticTask, 4, 100.0, 0.3, 1.0),
    "buffer-and-sub-modules": Reconstruction,
    "batch-norm": lambda: Regression(lambda: nn.Sequential(nn.Linear(INPUTS, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))),
    "tied-weights": lambda: Regression(Tied),
}
each_task = pytest.mark.parametrize("build", list(TASKS.values()), ids=list(TASKS))


def modules(task: Task, seed: int = SEED) -> list[nn.Module]:
    """The modules that the vectorised task stacks, drawn one after the other from one seed."""
    torch.manual_seed(seed)
    return [task.module() for _ in range(INSTANCES)]


def starting_points(separate: list[nn.Module]) -> Tensor:
    return torch.stack([parameters_to_vector(module.parameters()).detach() for module in separate])


def losses_and_grads_in_a_loop(
    task: Task, separate: list[nn.Module], points: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    losses, grads = [], []
    for index, module in enumerate(separate):
        vector_to_parameters(points[index].clone(), module.parameters())
        own_batch = tree_map(lambda tensor, index=index: tensor[index], batch)
        loss = task.loss(module, own_batch)
        grads.append(parameters_to_vector(torch.autograd.grad(loss, list(module.parameters()))))
        losses.append(loss.detach())
    return torch.stack(losses), torch.stack(grads)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@each_task
def test_losses_and_grads_match_separate_modules(build: Callable[[], Task]) -> None:
    task = build()
    separate = modules(task)
    vectorized = VectorizedTask(task, INSTANCES, SEED)
    start = starting_points(separate)
    torch.testing.assert_close(vectorized.initial_parameters, start, rtol=0, atol=0)
    assert vectorized.coordinates == start.shape[1]
    moved = start + 0.1 * torch.randn(start.shape, generator=generator(1))
    for points in (start, moved):
        batch = vectorized.batch(generator(2))
        expected_losses, expected_grads = losses_and_grads_in_a_loop(task, separate, points, batch)
        losses, grads = vectorized.losses_and_grads(points, batch)
        torch.testing.assert_close(losses, expected_losses, rtol=ROUNDING, atol=ROUNDING)
        torch.testing.assert_close(grads, expected_grads, rtol=ROUNDING, atol=ROUNDING)
        torch.testing.assert_close(vectorized.losses(points, batch), expected_losses, rtol=ROUNDING, atol=ROUNDING)
        assert expected_grads.abs().amax(1).min() > 1e-3  # every instance has something to compare


@each_task
def test_instances_differ_in_starting_point_and_batch(build: Callable[[], Task]) -> None:
    vectorized = VectorizedTask(build(), INSTANCES, SEED)
    start = vectorized.initial_parameters
    assert all(not torch.equal(start[0], other) for other in start[1:])
    assert len(set(vectorized.losses(start, vectorized.batch(generator())).tolist())) == INSTANCES


def test_scale_keeps_the_initial_loss_and_differentiates_stored_parameters() -> None:
    task = perceptrons(layer_norm=False)
    plain = VectorizedTask(task, INSTANCES, SEED)
    scale = torch.tensor([[0.1], [1.0], [10.0]])
    scaled = VectorizedTask(task, INSTANCES, SEED, scale=scale)
    batch = plain.batch(generator())
    stored = scaled.initial_parameters
    torch.testing.assert_close(stored * scale, plain.initial_parameters, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(
        scaled.losses(stored, batch), plain.losses(plain.initial_parameters, batch), rtol=ROUNDING, atol=0
    )

    def total_loss(parameters: np.ndarray) -> float:
        return float(scaled.losses(torch.from_numpy(parameters), batch).sum())

    _, grads = scaled.losses_and_grads(stored, batch)
    # Differences over 1e-5: rounding 1e-16 / 1e-5 and truncation (1e-5 * scale 10)^2 are both below 1e-7.
    expected = torch.from_numpy(central_difference(total_loss, stored.numpy(), epsilon=1e-5))
    torch.testing.assert_close(grads, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [None, torch.tensor([[0.1], [1.0], [10.0]])], ids=["alone", "with-scale"])
def test_random_signs_keep_the_losses_and_flip_half_of_the_gradients(scale: torch.Tensor | None) -> None:
    task = perceptrons(layer_norm=False)
    plain = VectorizedTask(task, INSTANCES, SEED, scale=scale)
    signed = VectorizedTask(task, INSTANCES, SEED, scale=scale, random_signs=True)
    batch = plain.batch(generator())
    signs = (signed.initial_parameters / plain.initial_parameters).round()
    assert (signs.abs() == 1).all()
    # Fair coins: their mean lies within five deviations of zero, and instances have their own.
    assert abs(float(signs.mean())) < 5 / signs.numel() ** 0.5
    assert not torch.equal(signs[0], signs[1])
    plain_losses, plain_grads = plain.losses_and_grads(plain.initial_parameters, batch)
    signed_losses, signed_grads = signed.losses_and_grads(signed.initial_parameters, batch)
    torch.testing.assert_close(signed_losses, plain_losses, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(signed_grads, plain_grads * signs, rtol=ROUNDING, atol=ROUNDING)
    again = VectorizedTask(task, INSTANCES, SEED, scale=scale, random_signs=True)
    assert torch.equal(again.initial_parameters, signed.initial_parameters)


@each_task
def test_differentiable_grads_have_the_right_derivatives(build: Callable[[], Task]) -> None:
    vectorized = VectorizedTask(build(), INSTANCES, SEED, scale=torch.tensor([[0.5], [1.0], [2.0]]))
    batch = vectorized.batch(generator())
    point = vectorized.initial_parameters.clone().requires_grad_()
    losses, grads = vectorized.losses_and_grads(point, batch, differentiable=True)
    constant_losses, constant_grads = vectorized.losses_and_grads(point.detach(), batch)
    torch.testing.assert_close(losses.detach(), constant_losses, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(grads.detach(), constant_grads, rtol=ROUNDING, atol=ROUNDING)

    direction = torch.randn(grads.shape, generator=generator(1))
    (product,) = torch.autograd.grad((grads * direction).sum(), point)
    above, below = (vectorized.losses_and_grads(point.detach() + sign * 1e-6 * direction, batch)[1] for sign in (1, -1))
    # Differences over 1e-6: rounding 1e-16 / 1e-6 and truncation 1e-12 times a fourth derivative, which batch norm
    # of five rows can make large.
    torch.testing.assert_close(product, (above - below) / 2e-6, rtol=1e-6, atol=1e-7)
    assert product.abs().max() > 0.01


def test_dropout_masks_differ_between_instances_and_loss_and_grad_share_one() -> None:
    class Sum(Regression):
        def loss(self, module: nn.Module, batch: Batch) -> Tensor:
            dropout, linear = module.children()
            weight = linear.weight
            assert isinstance(weight, Tensor)
            dropped: Tensor = dropout(weight)
            return dropped.sum()

    task = Sum(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1, bias=False)))
    vectorized = VectorizedTask(task, INSTANCES, SEED)
    points = vectorized.initial_parameters
    torch.manual_seed(0)
    losses, grads = vectorized.losses_and_grads(points, vectorized.batch(generator()))
    assert set(grads.unique().tolist()) == {0.0, 2.0}  # the mask over the probability of staying
    assert not torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[1], grads[2])
    torch.testing.assert_close(losses, (grads * points).sum(1), rtol=ROUNDING, atol=ROUNDING)


def test_frozen_parameters_are_not_coordinates() -> None:
    def build() -> nn.Module:
        module = nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, 1))
        module[0].requires_grad_(False)
        return module

    task = Regression(build)
    separate = modules(task)
    vectorized = VectorizedTask(task, INSTANCES, SEED)
    assert vectorized.coordinates == 4 + 1
    batch = vectorized.batch(generator())
    expected = [
        task.loss(module, tree_map(lambda tensor, index=index: tensor[index], batch))
        for index, module in enumerate(separate)
    ]
    losses = vectorized.losses(vectorized.initial_parameters, batch)
    torch.testing.assert_close(losses, torch.stack(expected).detach(), rtol=ROUNDING, atol=0)


@each_task
def test_global_random_state_is_unchanged(build: Callable[[], Task]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    vectorized = VectorizedTask(build(), INSTANCES, SEED)
    vectorized.losses_and_grads(vectorized.initial_parameters, vectorized.batch(generator()))
    assert torch.equal(before, torch.get_rng_state())


@each_task
def test_same_seed_gives_the_same_tasks_and_another_seed_others(build: Callable[[], Task]) -> None:
    torch.manual_seed(11)
    first = VectorizedTask(build(), INSTANCES, SEED)
    torch.manual_seed(12)  # must not matter
    second, other = VectorizedTask(build(), INSTANCES, SEED), VectorizedTask(build(), INSTANCES, SEED + 1)
    assert torch.equal(first.initial_parameters, second.initial_parameters)
    assert all(torch.equal(first.buffers[name], second.buffers[name]) for name in first.buffers)
    assert not torch.equal(first.initial_parameters, other.initial_parameters)
