"""Vectorised training with torch's optimizers, tuning of learning rates, and bands over seeds."""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map

from helpers.user_tasks import DropoutFamily, OverflowingFamily
from learned_optim import LearnedOptimizer
from learned_optim.meta_train.benchmark import evaluation
from learned_optim.meta_train.benchmark.evaluation import (
    BASELINES,
    LADDER,
    RATES,
    Problem,
    Tuned,
    final_loss,
    mean_and_band,
    train,
    tune,
)
from learned_optim.meta_train.common.seeds import fixed_global_state
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import QuadraticFamily, Task
from learned_optim.meta_train.tasks.mlp import MLPTask
from learned_optim.meta_train.tasks.quadratic import QuadraticTask
from learned_optim.rules import ScaleFreeLSTM

INSTANCES, STEPS, SEED = 3, 8, 5
ROUNDING = 1e-9  # relative; float64, but Adam divides by roots of small second moments

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


def baseline(name: str, rate: float) -> MakeOptimizer:
    return lambda parameters: BASELINES[name](parameters, rate, STEPS)


def tuned(problem: Problem, name: str, rates: Iterable[float]) -> Tuned:
    return tune(lambda rate: float(final_loss(problem.run(baseline(name, rate))).mean()), rates)


OPTIMIZERS: dict[str, MakeOptimizer] = {
    **{name: baseline(name, 0.05) for name in BASELINES},
    "learned": partial(LearnedOptimizer, rule=ScaleFreeLSTM(2), state_dtype=torch.float32),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perceptrons() -> Task:
    images = torch.rand(30, 4, generator=generator())
    return MLPTask((images, torch.arange(30) % 3), 6, [3], "tanh", initial="torch", gain=1.0, layer_norm=True)


def spheres(deviation: float = 1.0) -> QuadraticFamily:
    """``||x - optimum||^2`` up to a rotation: the Hessian is twice the identity, the ideal rate of SGD is 1/2."""
    return QuadraticFamily(dimensions=(4, 4), condition=(1.0, 1.0), initial_deviation=deviation)


@pytest.mark.parametrize("build", [perceptrons, partial(QuadraticTask, 4, None, 0.1, 1.0)], ids=["mlp", "quadratic"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.usefixtures("double")
def test_vectorized_training_matches_separate_modules(make: MakeOptimizer, build: Callable[[], Task]) -> None:
    task = build()
    losses = train(VectorizedTask(task, INSTANCES, SEED), make, STEPS, generator())

    with fixed_global_state(SEED):
        modules = [task.module() for _ in range(INSTANCES)]
    optimizers = [make(module.parameters()) for module in modules]
    batches, expected = generator(), np.empty((STEPS + 1, INSTANCES))
    for step in range(STEPS + 1):
        batch = task.batch(INSTANCES, batches)
        for index, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            optimizer.zero_grad()
            loss = task.loss(module, tree_map(lambda tensor, index=index: tensor[index], batch))
            loss.backward()
            expected[step, index] = float(loss.detach())
            optimizer.step()
    np.testing.assert_allclose(losses, expected, rtol=ROUNDING)
    assert losses.dtype == np.float64


def test_training_leaves_the_task_unchanged() -> None:
    task = VectorizedTask(QuadraticTask(4, None, 0.0, 1.0), INSTANCES, SEED)
    start = task.initial_parameters.clone()
    first = train(task, OPTIMIZERS["SGD"], STEPS, generator())
    assert torch.equal(task.initial_parameters, start)
    assert not task.initial_parameters.requires_grad
    assert np.array_equal(train(task, OPTIMIZERS["SGD"], STEPS, generator()), first)


def plain(name: str) -> Callable[[list[nn.Parameter]], tuple[Optimizer, LRScheduler | None]]:
    """A baseline as a user writes it, from torch.optim."""
    rate = 0.05

    def build(parameters: list[nn.Parameter]) -> tuple[Optimizer, LRScheduler | None]:
        match name:
            case "SGD":
                return torch.optim.SGD(parameters, lr=rate), None
            case "Momentum" | "NAG":
                return torch.optim.SGD(parameters, lr=rate, momentum=0.9, nesterov=name == "NAG"), None
            case "AdamW-cosine":
                optimizer = torch.optim.AdamW(parameters, lr=rate)
                return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
            case _:
                return getattr(torch.optim, name)(parameters, lr=rate), None

    return build


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.usefixtures("double")
def test_baseline_matches_torch_optim_on_the_module(name: str) -> None:
    task = perceptrons()
    losses = train(VectorizedTask(task, 1, SEED), baseline(name, 0.05), STEPS, generator())[:, 0]
    with fixed_global_state(SEED):
        module = task.module()
    optimizer, schedule = plain(name)(list(module.parameters()))
    batches, rates = generator(), []
    for step in range(STEPS + 1):
        batch = task.batch(1, batches)
        optimizer.zero_grad()
        loss = task.loss(module, tree_map(lambda tensor: tensor[0], batch))
        loss.backward()
        assert losses[step] == pytest.approx(float(loss.detach()), rel=ROUNDING)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule is not None:
            schedule.step()
    assert (rates[-1] < 1e-9) == (name == "AdamW-cosine")  # STEPS updates take the cosine to zero


@pytest.mark.usefixtures("double")
def test_tuning_finds_the_rate_that_curvature_dictates() -> None:
    problem = Problem(spheres(), seeds=3, steps=10, seed=0)
    rates = (1.0, 0.75, 0.5, 0.25, 0.01)
    found = tuned(problem, "SGD", rates)
    assert found.rate == 0.5
    start = problem.run(baseline("SGD", 0.0))[0].mean()
    for rate in rates:  # every step multiplies the distance to the optimum by 1 - 2 rate
        assert found.scores[rate] == pytest.approx(start * (1 - 2 * rate) ** 20, rel=1e-9, abs=1e-25)
    assert tuned(problem, "SGD", reversed(rates)).rate == 0.5


def test_rates_are_the_documented_grid() -> None:
    assert RATES == (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 3e-5, 1e-5)
    assert (LADDER[0], LADDER[-1]) == (1e-7, 30.0)
    assert set(RATES) < set(LADDER)
    assert list(LADDER) == sorted(LADDER)


class TestEdgeOfTheGrid:
    """Around the best rate of 1/2, scores rise on both sides."""

    @staticmethod
    def tuned(*rates: float) -> Tuned:
        return tune(lambda rate: abs(rate - 0.5), rates)

    @pytest.mark.parametrize(
        ("rates", "edge"), [((0.1, 0.4, 0.7), None), ((0.1, 0.4), "upper"), ((0.7, 0.9), "lower")], ids=str
    )
    def test_best_rate_at_an_edge_is_reported(
        self, rates: tuple[float, ...], edge: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(evaluation, "LADDER", ())
        assert self.tuned(*rates).edge == edge

    def test_grid_is_extended_upwards(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(evaluation, "LADDER", (0.1, 0.3, 0.4, 1.5, 1.7))
        found = self.tuned(0.1, 0.2)
        assert (found.rate, found.edge) == (0.4, None)
        assert set(found.scores) == {0.1, 0.2, 0.3, 0.4, 1.5}  # no further than the first that is worse

    def test_grid_is_extended_downwards(self) -> None:
        found = self.tuned(3.0, 2.0)
        assert (found.rate, found.edge) == (0.3, None)
        assert set(found.scores) == {3.0, 2.0, 1.0, 0.3, 0.1}

    def test_grid_of_one_rate_is_extended_on_both_sides(self) -> None:
        found = self.tuned(0.3)
        assert (found.rate, found.edge) == (0.3, None)
        assert set(found.scores) == {0.1, 0.3, 1.0}

    def test_grid_with_the_best_rate_inside_is_kept(self) -> None:
        assert set(self.tuned(0.1, 0.4, 0.7).scores) == {0.1, 0.4, 0.7}

    def test_grid_is_extended_until_a_rate_converges(self) -> None:
        found = tuned(Problem(spheres(), seeds=2, steps=40, seed=0), "SGD", (1e9, 1e8))
        assert (found.rate, found.edge) == (0.3, None)

    def test_lower_edge_is_reported_where_no_rate_converges(self) -> None:
        found = tune(lambda rate: np.inf, (0.1, 0.01))
        assert (found.rate, found.edge) == (1e-7, "lower")


def test_diverged_run_stays_infinite_and_is_never_chosen() -> None:
    problem = Problem(spheres(), seeds=3, steps=20, seed=0)
    losses = problem.run(baseline("SGD", 1e8))  # grows 2e8-fold a step: float32 ends at the fifth
    broken = ~np.isfinite(losses)
    assert not broken[:2].any()
    assert broken[6:].all()
    assert bool((np.diff(broken.astype(int), axis=0) >= 0).all())  # no way back
    assert not np.isnan(losses).any()
    assert np.isinf(final_loss(losses)).all()
    found = tuned(problem, "SGD", (1e8, 0.1, 0.03))
    assert found.rate == 0.1
    assert found.scores[1e8] == np.inf


def test_training_ends_when_all_instances_have_diverged() -> None:
    def steps(rate: float, instances: int, scale: Tensor | None = None) -> int:
        task = VectorizedTask(spheres().sample(np.random.default_rng(0), "test"), instances, SEED, scale=scale)
        ticks: list[None] = []
        losses = train(task, baseline("SGD", rate), 100, generator(), lambda: ticks.append(None))
        assert len(losses) == 101
        return len(ticks)

    assert steps(1e8, 2) == 20  # where the first look finds nothing finite
    assert steps(1e8, 2, torch.tensor([[1.0], [1e-30]])) == 100  # steps too small to move do not diverge
    assert steps(0.1, 2) == 100


class Idle(Optimizer):
    """Leaves the parameters alone, whatever their gradients."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        pass


def test_losses_stay_infinite_after_the_first_infinite_one() -> None:
    task = VectorizedTask(OverflowingFamily().sample(np.random.default_rng(0), "test"), INSTANCES, SEED)
    infinite = np.isinf(train(task, Idle, 30, generator()))
    assert 1 <= int(np.argmax(infinite[:, 0])) <= 25  # one batch of four overflows, on its own
    assert np.array_equal(infinite, np.maximum.accumulate(infinite))


def test_diverged_seed_has_an_infinite_final_loss() -> None:
    losses = np.ones((21, 2))
    losses[20, 1] = np.inf
    assert final_loss(losses).tolist() == [1.0, np.inf]


def test_final_loss_is_the_mean_of_the_last_tenth() -> None:
    losses = np.arange(101.0)[:, None] * np.array([1.0, 2.0])  # 100 steps: the last ten losses are 91 ... 100
    assert final_loss(losses).tolist() == [95.5, 191.0]
    assert final_loss(losses[:6]).tolist() == [5.0, 10.0]  # at least the last


def test_problem_is_the_same_for_every_optimizer_and_differs_by_seed() -> None:
    family = QuadraticFamily(dimensions=(2, 30), noise=0.5)
    still = baseline("SGD", 0.0)
    first = Problem(family, 4, STEPS, seed=1)
    adam = first.run(OPTIMIZERS["Adam"])
    again = first.run(still)
    assert np.array_equal(adam[0], again[0])
    assert np.array_equal(again, Problem(family, 4, STEPS, seed=1).run(still))
    other = Problem(family, 4, STEPS, seed=2)
    assert not np.array_equal(other.run(still), again)
    assert len(set(again[0].tolist())) == 4


def test_blocks_of_a_seed_are_different_runs() -> None:
    still = baseline("SGD", 0.0)
    first, again, second = (
        Problem(QuadraticFamily(noise=0.5), 3, STEPS, seed=1, block=block).run(still) for block in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert set(first[0].tolist()) & set(second[0].tolist()) == set()


@pytest.mark.slow
def test_problems_of_all_seeds_hold_the_same_architecture() -> None:
    """A rate that is tuned on one network and compared on another is not tuned."""
    family = QuadraticFamily(dimensions=(2, 1000), condition=(1.0, 1e4))

    def sizes(draw: int = 0) -> list[int]:
        return [Problem(family, 2, STEPS, seed, draw=draw).task.coordinates for seed in range(6)]

    assert len(set(sizes())) == 1
    assert sizes(draw=1) != sizes(draw=2)


def test_dropout_is_the_same_for_every_optimizer() -> None:
    problem = Problem(DropoutFamily(), 4, STEPS, seed=1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = problem.run(OPTIMIZERS["Adam"])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert np.array_equal(problem.run(OPTIMIZERS["Adam"]), first)


class TestBand:
    def test_band_covers_the_true_mean_at_its_confidence(self) -> None:
        """A percentile bootstrap of 20 draws covers somewhat less than 95%: between 88% and 97% of 400 times."""
        rng = np.random.default_rng(0)
        losses = rng.normal(3.0, 2.0, size=(400, 20))
        mean, low, high = mean_and_band(losses)
        np.testing.assert_allclose(mean, losses.mean(1))
        covered = float(np.mean((low <= 3.0) & (high >= 3.0)))
        assert 0.88 <= covered <= 0.97

    def test_band_narrows_with_lower_confidence_and_more_seeds(self) -> None:
        rng = np.random.default_rng(0)
        losses = rng.normal(0.0, 1.0, size=(1, 400))

        def width(values: np.ndarray, confidence: float) -> float:
            _, low, high = mean_and_band(values, confidence=confidence)
            return float((high - low)[0])

        # Normal theory: 2 * 1.96 * 1 / sqrt(seeds) for 95%, 1.645 for 90%; the resampling scatters by some percent.
        assert width(losses, 0.95) == pytest.approx(2 * 1.96 / 20, rel=0.15)
        assert width(losses, 0.90) == pytest.approx(2 * 1.645 / 20, rel=0.15)
        assert width(losses[:, :25], 0.95) > 2.5 * width(losses, 0.95)

    def test_band_of_one_seed_is_its_loss(self) -> None:
        mean, low, high = mean_and_band(np.array([[2.0], [1.0]]))
        assert mean.tolist() == low.tolist() == high.tolist() == [2.0, 1.0]

    def test_band_of_two_seeds_spans_both(self) -> None:
        mean, low, high = mean_and_band(np.array([[1.0, 3.0]]))
        assert (float(mean[0]), float(low[0]), float(high[0])) == (2.0, 1.0, 3.0)

    def test_band_with_a_diverged_seed_is_infinite_without_nan(self) -> None:
        losses = np.ones((2, 20))
        losses[1, 3] = np.inf
        mean, low, high = mean_and_band(losses)
        assert (mean[1], high[1]) == (np.inf, np.inf)
        assert low[1] == 1.0  # (19/20)^20 = 36% of the resamples miss it
        np.testing.assert_allclose((mean[0], low[0], high[0]), 1.0)
        mean, low, high = mean_and_band(np.full((1, 5), np.inf))
        assert mean[0] == low[0] == high[0] == np.inf
