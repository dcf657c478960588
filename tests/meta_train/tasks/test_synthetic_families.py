"""Families on synthetic problems: valleys, factorization, softmax regression and physics-informed networks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.draws import SIGMAS, drawn, generator
from learned_optim.meta_train.tasks import FactorizationFamily
from learned_optim.meta_train.tasks.factorization import FactorizationTask, FactorProduct
from learned_optim.meta_train.tasks.physics import Field, PhysicsTask
from learned_optim.meta_train.tasks.softmax_regression import SoftmaxRegressionTask, gaussian_classes
from learned_optim.meta_train.tasks.valleys import Coordinates, ValleyTask


class TestValleys:
    @pytest.mark.usefixtures("double")
    @pytest.mark.parametrize("surface", ["rosenbrock", "rastrigin"])
    def test_minimum_is_zero_and_flat(self, surface: Any) -> None:
        task = ValleyTask(surface, 4, 30.0, rotated=True, coordinate_scale=(0.1, 10.0), initial_deviation=1.0)
        module: Coordinates = drawn(task)
        with torch.no_grad():
            module.point.copy_(module.offset / module.scale)
        loss = task.loss(module, torch.zeros(()))
        (grad,) = torch.autograd.grad(loss, module.point)
        assert abs(float(loss.detach())) < 1e-20
        assert float(grad.abs().max()) < 1e-10
        assert float(module.scale.max() / module.scale.min()) > 1.5

    def test_values_match_the_formulas(self) -> None:
        u = torch.tensor([0.5, 2.0, -1.0])
        module = Coordinates(torch.eye(3), torch.zeros(3), torch.ones(3), u - 1)
        values = [
            float(ValleyTask(surface, 3, 100.0, False, (1.0, 1.0), 1.0).loss(module, torch.zeros(())).detach())
            for surface in ("rosenbrock", "rastrigin")
        ]
        rosenbrock = 100 * (2 - 0.25) ** 2 + 0.25 + 100 * (-1 - 4) ** 2 + 1
        assert values == pytest.approx([rosenbrock, 0.25 + 1 + 4 + 100 * 2], rel=1e-5)  # half a wave: 1 - cos pi = 2


class TestFactorization:
    @pytest.mark.usefixtures("double")
    def test_target_has_rank_condition_and_size_of_entries(self) -> None:
        task = FactorizationTask([9, 4, 7], 3, condition=20.0, observed=1.0, minibatch=1.0, noise=0.0, gain=1.0)
        module: FactorProduct = drawn(task)
        values = torch.linalg.svdvals(module.target)
        assert float(values[0] / values[2]) == pytest.approx(20.0, rel=1e-8)
        assert float(values[3]) < 1e-10
        assert float(module.target.square().mean()) == pytest.approx(1.0)
        assert module().shape == (7, 9)

    def test_only_observed_and_seen_entries_count(self) -> None:
        task = FactorizationTask([10, 3, 20], 2, 1.0, observed=0.3, minibatch=0.5, noise=0.0, gain=1.0)
        module: FactorProduct = drawn(task)
        assert float(module.known.sum()) == 60
        seen = task.batch(50, generator())
        assert float(seen.mean()) == pytest.approx(0.5, abs=SIGMAS * 0.5 / math.sqrt(seen.numel()))
        errors = (module() - module.target).square()[(module.known * seen[0]).bool()]
        torch.testing.assert_close(task.loss(module, seen[0]), errors.mean())

    def test_depth_is_the_number_of_factors(self) -> None:
        tasks = [FactorizationFamily(depth=(2, 4)).sample(np.random.default_rng(seed), "train") for seed in range(20)]
        assert {len(drawn(task).factors) for task in tasks} == {2, 3, 4}


class TestSoftmaxRegression:
    def test_gaussian_classes_have_their_sizes_and_deviations(self) -> None:
        features, labels = gaussian_classes(np.random.default_rng(0), 20_000, 3, 4, separation=2.0, condition=100.0)
        assert features.shape == (20_000, 3)
        assert torch.equal(labels.bincount(), torch.full((4,), 5000))
        for label in range(4):
            deviations = features[labels == label].std(0)
            expected = torch.tensor([1.0, 10**-0.5, 0.1])
            torch.testing.assert_close(deviations, expected, rtol=SIGMAS / math.sqrt(2 * 5000), atol=0)

    def test_loss_is_the_cross_entropy_and_half_the_squared_weights(self) -> None:
        rows = torch.randn(6, 2), torch.arange(6) % 3
        task = SoftmaxRegressionTask(rows, 4, weight_decay=0.5, initial_deviation=1.0)
        module: nn.Linear = drawn(task)
        assert torch.equal(module.bias, torch.zeros(3))
        expected = nn.functional.cross_entropy(module(rows[0]), rows[1]) + 0.25 * module.weight.square().sum()
        torch.testing.assert_close(task.loss(module, rows), expected)


class TestPhysics:
    @pytest.mark.usefixtures("double")
    @pytest.mark.parametrize("activation", ["tanh", "sine"])
    def test_second_derivative_matches_autograd(self, activation: str) -> None:
        torch.manual_seed(0)
        field, x = Field([5, 4], activation, torch.ones(2)), torch.rand(6)
        values, second = field(x)
        x.requires_grad_()
        (first,) = torch.autograd.grad(field(x)[0].sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(first.sum(), x)
        torch.testing.assert_close(second, expected)
        assert values.shape == (6,)

    @pytest.mark.usefixtures("double")
    def test_loss_of_the_solution_is_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        task = PhysicsTask(3, reaction=2.0, widths=[4], activation="tanh", points=9, boundary=1.0)
        field: Field = drawn(task)

        def solved(x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.detach().requires_grad_()
            values = field.solution(x)
            (first,) = torch.autograd.grad(values.sum(), x, create_graph=True)
            return values, torch.autograd.grad(first.sum(), x)[0]

        points = task.batch(1, generator())[0]
        assert float(task.loss(field, points).detach()) > 0.1
        monkeypatch.setattr(field, "forward", solved)
        assert float(task.loss(field, points).detach()) < 1e-20
