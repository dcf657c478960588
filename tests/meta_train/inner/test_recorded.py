"""Recorded operations give what the function gives, to the bit, on whatever batch and at whatever parameters."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad
from torch.fx.experimental.proxy_tensor import make_fx

from helpers.small_families import SMALL_FAMILIES
from learned_optim.meta_train.inner import recorded, vectorize
from learned_optim.meta_train.inner.recorded import Recorded
from learned_optim.meta_train.inner.vectorize import VectorizedTask

INSTANCES, COPIES = 3, 2
FAMILIES = ["mlp", "quadratic", "valleys", "factorization", "softmax-regression", "table", "autoencoder"]


def cubes(values: Tensor) -> Tensor:
    return values.pow(3).sum()


def hyperbola(values: Tensor) -> Tensor:
    """Its derivative is computed from its result."""
    return values.tanh().sum()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., object]]:
    """Record in the first call; the functions of which that was done."""
    monkeypatch.setattr(recorded, "CALLS_BEFORE", 0)
    done: list[Callable[..., object]] = []

    def noted(function: Callable[..., object]) -> Callable[..., object]:
        done.append(function)
        return make_fx(function)

    monkeypatch.setattr(recorded, "make_fx", noted)
    return done


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("particles", [False, True], ids=["instances", "particles"])
def test_tasks_are_recorded_without_a_difference(
    family: str, particles: bool, at_once: list[Callable[..., object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = SMALL_FAMILIES[family].sample(np.random.default_rng(0), "train")
    assert task.same_operations
    instances = VectorizedTask(task, INSTANCES, seed=0)
    start = instances.initial_parameters
    points = [start + 0.1 * torch.randn(start.shape, generator=generator(seed)) for seed in range(6)]
    if particles:
        points = [torch.stack(points[first : first + COPIES]) for first in range(3)]
    batches = [instances.batch(generator(seed)) for seed in range(len(points))]
    results = [instances.losses_and_grads(*arguments) for arguments in zip(points, batches, strict=True)]
    assert len(at_once) == 1

    monkeypatch.setattr(vectorize, "Recorded", lambda function: function)
    plain = VectorizedTask(task, INSTANCES, seed=0)
    for point, batch, (losses, grads) in zip(points, batches, results, strict=True):
        expected_losses, expected_grads = plain.losses_and_grads(point, batch)
        torch.testing.assert_close(losses, expected_losses, rtol=0, atol=0)
        torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)
    assert len(at_once) == 1


def test_each_shape_and_dtype_is_recorded_after_some_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def noted(values: Tensor) -> Tensor:
        calls.append(values.shape)
        return cubes(values)

    monkeypatch.setattr(recorded, "CALLS_BEFORE", 2)
    slope = Recorded(grad(noted))
    for values in (torch.ones(2), torch.ones(3), torch.ones(3, dtype=torch.float64)):
        calls.clear()
        for factor in range(5):
            torch.testing.assert_close(slope(factor * values), 3 * factor**2 * values)
        assert len(calls) == 3  # two, and the one that is recorded


def test_derivatives_of_gradients_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "CALLS_BEFORE", 0)
    slope = Recorded(grad(hyperbola))
    slope(torch.ones(2))
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    (second,) = torch.autograd.grad(slope(values).sum(), values)
    root = values.detach().tanh()
    torch.testing.assert_close(second, -2 * root * (1 - root**2))


def test_a_part_of_the_instances_records_its_own(at_once: list[Callable[..., object]]) -> None:
    task = SMALL_FAMILIES["mlp"].sample(np.random.default_rng(0), "train")
    whole = VectorizedTask(task, INSTANCES, seed=0)
    losses, grads = whole.losses_and_grads(whole.initial_parameters, whole.batch(generator(0)))
    part = whole.part(slice(1, 3))
    own_losses, own_grads = part.losses_and_grads(part.initial_parameters, part.batch(generator(0)))
    torch.testing.assert_close(own_losses, losses[1:])
    torch.testing.assert_close(own_grads, grads[1:])
    assert len(at_once) == 2
