"""The quadratic family: its spectra, minima, noise and scales, as documented."""

import math

import numpy as np
import pytest
import torch

from helpers.draws import SIGMAS, assert_normal, drawn, generator
from learned_optim.meta_train.common.seeds import fixed_global_state
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import QuadraticFamily
from learned_optim.meta_train.tasks.quadratic import Quadratic, QuadraticTask, conditioned_matrix


def quadratics(family: QuadraticFamily, instances: int) -> list[Quadratic]:
    task = family.sample(np.random.default_rng(0), "train")
    with fixed_global_state(0):
        modules = [task.module() for _ in range(instances)]
    return [module for module in modules if isinstance(module, Quadratic)]


class TestQuadratic:
    @pytest.mark.parametrize("condition", [1.0, 30.0, 1e4])
    @pytest.mark.usefixtures("double")
    def test_hessian_has_the_given_condition_number(self, condition: float) -> None:
        for module in quadratics(QuadraticFamily((6, 6), (condition, condition)), instances=3):
            eigenvalues = torch.linalg.eigvalsh(module.matrix.T @ module.matrix)
            assert float(eigenvalues[-1]) == pytest.approx(1.0, rel=1e-10)  # float64 at condition 1e4 loses 4 digits
            assert float(eigenvalues[0]) == pytest.approx(1 / condition, rel=1e-10)
            ratios = eigenvalues[1:] / eigenvalues[:-1]
            assert float(ratios.max() / ratios.min()) == pytest.approx(1.0, rel=1e-9)  # geometric

    @pytest.mark.usefixtures("double")
    def test_conditioned_minimum_is_zero_at_a_standard_normal_point(self) -> None:
        modules = quadratics(QuadraticFamily((8, 8), (10.0, 10.0)), instances=300)
        optima = torch.stack([torch.linalg.solve(module.matrix, module.target) for module in modules])
        assert_normal(optima, 1.0)
        task = QuadraticTask(8, 10.0, noise=0.0, initial_deviation=1.0)
        with torch.no_grad():
            modules[0].point.copy_(optima[0])
        assert float(task.loss(modules[0], (torch.zeros(1), torch.zeros(1))).detach()) < 1e-20

    def test_default_quadratic_is_that_of_the_paper(self) -> None:
        family = QuadraticFamily()
        modules = quadratics(family, instances=300)
        assert modules[0].matrix.shape == (10, 10)
        assert modules[0].target.shape == modules[0].point.shape == (10,)
        assert_normal(torch.stack([module.matrix for module in modules]), 1.0)
        assert_normal(torch.stack([module.target for module in modules]), 1.0)
        assert_normal(torch.stack([module.point.detach() for module in modules]), 0.01)

    @pytest.mark.usefixtures("double")
    def test_loss_is_the_squared_norm_of_the_residual(self) -> None:
        (module,) = quadratics(QuadraticFamily((3, 3)), instances=1)
        matrix, target, point = (tensor.detach().numpy() for tensor in (module.matrix, module.target, module.point))
        noise = np.array([0.5, -1.0, 2.0])
        expected = float(np.square(matrix @ point - target + noise).sum())
        loss = QuadraticTask(3, None, 1.0, 0.01).loss(module, (torch.from_numpy(noise), torch.zeros(1)))
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-14)

    def test_noise_has_its_deviation_and_is_fresh_at_every_step(self) -> None:
        task = QuadraticTask(50, None, noise=0.3, initial_deviation=0.01)
        source = generator()
        (first, _), (second, _) = task.batch(20, source), task.batch(20, source)
        assert_normal(first, 0.3)
        assert not torch.equal(first, second)
        assert not torch.equal(first[0], first[1])

    def test_dimensions_and_conditions_fill_their_ranges(self) -> None:
        rng = np.random.default_rng(0)
        tasks = [QuadraticFamily((2, 4), (10.0, 1000.0)).sample(rng, "train") for _ in range(200)]
        drawn = [(task.dimension, task.condition) for task in tasks if isinstance(task, QuadraticTask)]
        assert {dimension for dimension, _ in drawn} == {2, 3, 4}
        logarithms = [math.log10(condition) for _, condition in drawn if condition is not None]
        assert 1 <= min(logarithms) < 1.1
        assert 2.9 < max(logarithms) <= 3


class TestQuadraticVariants:
    @pytest.mark.usefixtures("double")
    def test_random_spectrum_keeps_its_extremes_and_differs_between_draws(self) -> None:
        spectra = [torch.linalg.svdvals(conditioned_matrix(6, 100.0, "random", True)).square() for _ in range(2)]
        for spectrum in spectra:
            assert float(spectrum.max()) == pytest.approx(1.0, rel=1e-10)
            assert float(spectrum.min()) == pytest.approx(0.01, rel=1e-10)
        assert not torch.allclose(*spectra)

    def test_unrotated_axes_give_a_diagonal_matrix(self) -> None:
        matrix = conditioned_matrix(4, 100.0, "geometric", rotated=False)
        assert torch.equal(matrix, matrix.diag().diag())

    @pytest.mark.usefixtures("double")
    def test_coordinate_scale_keeps_loss_and_minimum(self) -> None:
        plain = drawn(QuadraticTask(5, 10.0, 0.0, 1.0))
        scaled_task = QuadraticTask(5, 10.0, 0.0, 1.0, coordinate_scale=(0.01, 100.0))
        scaled = drawn(scaled_task)
        torch.testing.assert_close(scaled(), plain())
        ratio = scaled.matrix[0] / plain.matrix[0]
        torch.testing.assert_close(scaled.matrix, plain.matrix * ratio)
        torch.testing.assert_close(scaled.point * ratio, plain.point)
        assert float(ratio.max() / ratio.min()) > 10

    def test_gradient_noise_has_its_deviation_and_keeps_the_loss(self) -> None:
        task = VectorizedTask(QuadraticTask(40, None, 0.0, 1.0, gradient_noise=0.5), 50, seed=0)
        quiet = VectorizedTask(QuadraticTask(40, None, 0.0, 1.0), 50, seed=0)
        points = task.initial_parameters
        losses, grads = task.losses_and_grads(points, task.batch(generator()))
        true_losses, true_grads = quiet.losses_and_grads(points, quiet.batch(generator()))
        torch.testing.assert_close(losses, true_losses)
        noise = grads - true_grads
        assert float(noise.std()) == pytest.approx(0.5, rel=SIGMAS / math.sqrt(2 * noise.numel()))
        assert abs(float(noise.mean())) < SIGMAS * 0.5 / math.sqrt(noise.numel())

    def test_gradient_noise_and_residual_noise_are_drawn_apart(self) -> None:
        residual, gradient = QuadraticTask(3, None, 0.1, 1.0, gradient_noise=0.5).batch(2, generator())
        assert residual.shape == gradient.shape == (2, 3)
        assert not torch.equal(residual, gradient)
        assert isinstance(drawn(QuadraticTask(3, None, 0.1, 1.0)), Quadratic)
