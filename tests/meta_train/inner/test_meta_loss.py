"""Meta-losses: their formulas, and the value of a loss beyond its bound."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from learned_optim.meta_train.inner.meta_loss import (
    BOUND,
    FLOOR,
    MetaLoss,
    end_of_window,
    log_ratio_of_mean,
    mean_log_ratio,
    mean_of_window,
)
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import Task
from learned_optim.meta_train.tasks.mlp import MLPTask
from learned_optim.meta_train.tasks.quadratic import QuadraticTask

pytestmark = pytest.mark.usefixtures("double")


def quadratics() -> VectorizedTask:
    return VectorizedTask(QuadraticTask(3, None, 0.0, 1.0), 2, seed=0)


def classifiers(classes: int) -> VectorizedTask:
    images = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    task: Task = MLPTask((images, torch.arange(30) % classes), 6, [], "tanh", "torch", 1.0, layer_norm=False)
    return VectorizedTask(task, 2, seed=0)


def test_reductions_match_their_formulas() -> None:
    losses = torch.tensor([[2.0, 0.5], [1.0, 8.0]])
    initial = torch.tensor([4.0, 2.0])
    assert float(mean_of_window(losses, initial)) == pytest.approx(11.5 / 4)
    assert float(end_of_window(losses, initial)) == pytest.approx(4.5)
    expected = np.log(np.array([0.5, 0.25, 0.25, 4.0]) + FLOOR).mean()
    assert float(mean_log_ratio(losses, initial)) == pytest.approx(expected, rel=1e-12)
    assert float(mean_log_ratio(torch.zeros(2, 2), initial)) == pytest.approx(np.log(FLOOR))
    expected = np.log(np.array([0.375, 2.125]) + FLOOR).mean()
    assert float(log_ratio_of_mean(losses, initial)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("wrong", [9.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    ("meta_loss", "task", "bounds"),
    [
        (MetaLoss(clamp=5.0), quadratics(), (5.0, 5.0)),
        (MetaLoss(bounded=True), quadratics(), (BOUND * 4.0, BOUND * 2.0)),
        (MetaLoss(bounded=True), classifiers(3), (1.5 * math.log(3),) * 2),
        (MetaLoss(bounded=True, clamp=4.0), quadratics(), (4.0, BOUND * 2.0)),
    ],
    ids=["clamped", "relative", "classes", "both"],
)
def test_bound_replaces_larger_and_non_finite_losses(
    meta_loss: MetaLoss, task: VectorizedTask, bounds: tuple[float, float], wrong: float
) -> None:
    losses = torch.tensor([[1.0, wrong], [wrong, 1.5]], requires_grad=True)
    value = meta_loss.reduction(task)(losses, torch.tensor([4.0, 2.0]))
    assert float(value.detach()) == pytest.approx((1.0 + bounds[1] + bounds[0] + 1.5) / 4)
    (grad,) = torch.autograd.grad(value, losses)
    assert grad.tolist() == [[0.25, 0.0], [0.0, 0.25]]


def test_unbounded_meta_loss_passes_large_and_nan_losses() -> None:
    def value(wrong: float) -> Tensor:
        return MetaLoss().reduction(quadratics())(torch.tensor([[1.0, wrong]]), torch.ones(2))

    assert float(value(100.0)) == 50.5
    assert not bool(value(math.nan).isfinite())


def test_meta_loss_is_made_from_a_name() -> None:
    assert MetaLoss.of("log") == MetaLoss("log")
    assert MetaLoss.of(MetaLoss("log", clamp=3.0)) == MetaLoss("log", clamp=3.0)


def test_speedup_meta_loss_refuses_bounds_and_gradients() -> None:
    with pytest.raises(ValueError, match="needs no bound; leave out bounded and clamp"):
        MetaLoss("speedup", bounded=True)
    with pytest.raises(ValueError, match="take the estimator 'es'"):
        MetaLoss("speedup").reduction(quadratics())
