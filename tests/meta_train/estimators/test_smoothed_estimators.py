"""Estimators of the smoothed meta-loss against its exact gradient, and particles together against one by one."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.estimators.toy_problems import FirstUnit, InfluenceBalancing, RateSchedule, RuggedPlane
from helpers.reference import Array, gaussian_gradient
from learned_optim.meta_train.common.seeds import fixed_global_state
from learned_optim.meta_train.estimators import (
    ES,
    ESTIMATORS,
    PES,
    Combined,
    ESSingle,
    Estimator,
    Reparameterization,
    TruncatedBPTT,
    truncated_bptt,
)
from learned_optim.meta_train.estimators.combined import PairMoments
from learned_optim.meta_train.estimators.perturbation import (
    PerturbationEstimator,
    antithetic,
    antithetic_rule,
    as_particles,
)
from learned_optim.meta_train.inner.meta_loss import MetaLoss
from learned_optim.meta_train.inner.particles import ParticleRule, as_meta_grads, flat_meta_parameters
from learned_optim.meta_train.inner.speedups import log_slowdowns
from learned_optim.meta_train.inner.unroll import InnerState, start, unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import Batch, Task
from learned_optim.meta_train.tasks.quadratic import QuadraticTask
from learned_optim.rules import LSTML2L, MLP, RuleState, ScaleFreeLSTM, ScheduleFreeLSTM, UpdateRule

ROUNDING = 1e-9  # relative; float64, over a few steps of an LSTM
SIGMA = 0.1
REPEATS = 100
QUANTILE = 3.39  # two-sided 99.9% of Student's t with 99 degrees of freedom
CURVATURES, START = np.array([1.0, 0.5]), np.array([1.0, -0.8])
WEIGHTS = np.array([0.5, 0.5])


pytestmark = pytest.mark.usefixtures("double", "one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# A problem whose smoothed meta-loss is a polynomial, integrated exactly by Gauss-Hermite quadrature


class PolynomialDescent(UpdateRule):
    """``update = -a^3 grad - a b^2 (previous gradient)`` with the meta-parameters a and b."""

    name = "polynomial"

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(WEIGHTS))

    @property
    def settings(self) -> Mapping[str, int]:
        return {}

    @property
    def state_features(self) -> Mapping[str, int]:
        return {"previous": 1}

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        a, b = self.weights.unbind(-1)
        return -(a**3) * grad - a * b**2 * state["previous"][0], {"previous": grad[None]}

    def reset_parameters(self, seed: int) -> None:
        pass


class Bowl(Task):
    """``sum_i h_i x_i^2 / 2``, or with ``linear`` its gradient at the start times x; no noise."""

    def __init__(self, linear: bool = False) -> None:
        self.linear = linear

    def module(self) -> nn.Module:
        module = nn.Module()
        module.point = nn.Parameter(torch.tensor(START))
        return module

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        return torch.zeros(instances, 1)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(module.point, Tensor)
        if self.linear:
            return (torch.tensor(CURVATURES * START) * module.point).sum()
        return (0.5 * torch.tensor(CURVATURES) * module.point.square()).sum()


def losses_of(weights: Array, steps: int, linear: bool = False) -> Array:
    """Losses after each step, ``(windows, steps, *grid)``, with the weights ``(windows, 2, *grid)`` of each window."""
    windows, _, *grid = weights.shape
    shape = (2, *[1] * len(grid))
    point = np.broadcast_to(START.reshape(shape), (2, *grid))
    curvatures, slopes = CURVATURES.reshape(shape), (CURVATURES * START).reshape(shape)
    previous = np.zeros(())
    losses = np.empty((windows, steps, *grid))
    for window in range(windows):
        a, b = weights[window]
        for step in range(steps):
            grad = slopes if linear else curvatures * point
            point = point - a**3 * grad - a * b**2 * previous
            previous = grad
            losses[window, step] = ((slopes * point) if linear else 0.5 * curvatures * point**2).sum(0)
    return losses


def exact_gradient(windows: int, steps: int, counted: Callable[[Array], Array], linear: bool = False) -> Array:
    """Gradient ``(windows, 2)`` of the smoothed ``counted(mean losses (windows, *grid))``, fresh noise each window."""

    def value(flat: Array) -> Array:  # (2 windows, *grid)
        return counted(losses_of(flat.reshape(windows, 2, *flat.shape[1:]), steps, linear).mean(1))

    # At most 4 steps x 3 factors, squared, and one of the noise: 13 nodes are exact up to degree 25.
    return gaussian_gradient(value, np.tile(WEIGHTS, windows), SIGMA, nodes=13).reshape(windows, 2)


def sums_of_grads(estimator: Estimator, task: Task, windows: int, steps: int, repeats: int = REPEATS) -> Tensor:
    """Sum over the windows of an inner training, repeated with other random numbers: ``(repeats, M)``."""
    rule = PolynomialDescent()
    vectorized = VectorizedTask(task, 1, seed=0)
    inner = start(rule, vectorized, generator())
    sums = []
    for repeat in range(repeats):
        random = generator(1000 + repeat)
        state = estimator.start(rule, vectorized, inner, random)
        total = torch.zeros(2)
        for _ in range(windows):
            estimate = estimator.window(rule, vectorized, state, steps, random)
            state = estimate.state
            total += parameters_to_vector(estimate.grads)
        sums.append(total)
    return torch.stack(sums)


def assert_mean_is(samples: Tensor, exact: Array) -> None:
    """Each mean lies in its 99.9% interval, which is so narrow that it would not if it were off by 5%."""
    bound = QUANTILE * samples.std(0) / len(samples) ** 0.5
    expected = torch.from_numpy(exact)
    assert bool((2 * bound <= 0.05 * expected.abs()).all()), "take more samples"
    assert bool(((samples.mean(0) - expected).abs() <= bound).all())


PAIRS = 5000  # of a window; with 100 repeats the intervals are narrow enough, which is asserted
SMOOTHED: dict[str, Callable[[bool], Estimator]] = {
    "reparameterization": lambda second: Reparameterization(SIGMA, PAIRS, second_derivatives=second),
    "es": lambda second: ES(SIGMA, PAIRS),
    "combined": lambda second: Combined(SIGMA, PAIRS, second_derivatives=second),
    "combined-running": lambda second: Combined(SIGMA, PAIRS, variance_decay=0.9, second_derivatives=second),
    "pes": lambda second: PES(SIGMA, PAIRS),
    "es-single": lambda second: ESSingle(SIGMA, PAIRS),
}


@pytest.mark.slow
@pytest.mark.parametrize("linear", [False, True], ids=["second-derivatives", "constant-gradients"])
@pytest.mark.parametrize("build", list(SMOOTHED.values()), ids=list(SMOOTHED))
def test_estimate_is_the_gradient_of_the_smoothed_meta_loss(build: Callable[[bool], Estimator], linear: bool) -> None:
    (exact,) = exact_gradient(1, 4, lambda losses: losses[0], linear)
    assert_mean_is(sums_of_grads(build(not linear), Bowl(linear), 1, 4), exact)


@pytest.mark.slow
def test_pes_removes_the_bias_of_truncation() -> None:
    """Over two windows, PES has the whole gradient; ES lacks that of the second loss by the first weights."""
    exact = exact_gradient(2, 2, lambda losses: losses.sum(0)).sum(0)
    assert_mean_is(sums_of_grads(PES(SIGMA, 4 * PAIRS), Bowl(), 2, 2), exact)

    first = exact_gradient(2, 2, lambda losses: losses[0])[0]
    second = exact_gradient(2, 2, lambda losses: losses[1])[1]
    truncated = sums_of_grads(ES(SIGMA, PAIRS), Bowl(), 2, 2)
    bound = QUANTILE * truncated.std(0) / REPEATS**0.5  # wide: all pairs of a second window start from one state
    assert bool(((truncated.mean(0) - torch.from_numpy(first + second)).abs() <= bound).all())
    assert bool(((truncated.mean(0) - torch.from_numpy(exact)).abs() > 5 * bound).all())


@pytest.mark.slow
def test_es_single_equals_es_over_the_whole_horizon() -> None:
    (exact,) = exact_gradient(1, 4, lambda losses: 2 * losses[0])  # two windows' means add up to twice the mean
    assert_mean_is(sums_of_grads(ESSingle(SIGMA, PAIRS), Bowl(), 2, 2), exact)
    full = sums_of_grads(ES(SIGMA, PAIRS), Bowl(), 1, 4, repeats=2)
    single = sums_of_grads(ESSingle(SIGMA, PAIRS), Bowl(), 2, 2, repeats=2)
    torch.testing.assert_close(single, 2 * full, rtol=ROUNDING, atol=0)  # the same noise: both draw it first


@pytest.mark.slow
def test_pes_descends_on_influence_balancing_where_truncation_ascends() -> None:
    """At weight 0.5 the sum of 150 losses falls to the left: PES has its slope inside a 99.9% interval."""
    steps, repeats = 150, 12
    rule = InfluenceBalancing().double()
    task = VectorizedTask(FirstUnit(), 1, seed=0)
    inner = start(rule, task, generator())
    free, slopes = rule.expected_first_unit(steps)
    exact = float(((free + 0.5 * slopes - 1) * slopes).sum())
    assert exact > 0

    def total(estimator: Estimator, seed: int, window: int = 1) -> float:
        random = generator(seed)
        state = estimator.start(rule, task, inner, random)
        result = 0.0
        for _ in range(steps // window):
            estimate = estimator.window(rule, task, state, window, random)
            state = estimate.state
            result += window * float(estimate.grads[0])
        return result

    sums = torch.tensor([total(PES(sigma=0.1, pairs=250), seed) for seed in range(repeats)])
    bound = 4.44 * float(sums.std()) / repeats**0.5  # 11 degrees of freedom
    assert bound < 0.25 * exact
    assert abs(float(sums.mean()) - exact) < bound
    assert total(TruncatedBPTT(), 0) < 0
    assert total(ES(sigma=0.1, pairs=250), 0) < 0
    assert total(TruncatedBPTT(), 0, window=steps) == pytest.approx(exact, rel=1e-10)


# Particles together against one after the other


class SlowScaleFree(ScaleFreeLSTM):
    """Without a fast path for particles."""

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        return super().forward(grad, state, step)


RULES: dict[str, Callable[[], UpdateRule]] = {
    "lstm-l2l": lambda: LSTML2L(hidden_size=2, layers=2, output_scale=0.3),
    "scale-free-lstm": lambda: ScaleFreeLSTM(2, momentum_decays=(0.9, 0.5), rate=0.1),
    "schedule-free-lstm": lambda: ScheduleFreeLSTM(2, rate=0.1),
    "mlp": lambda: MLP(4, rate=0.1, magnitude_rate=0.5),
    "no-fast-path": lambda: SlowScaleFree(2, momentum_decays=(0.9, 0.5), rate=0.1),
}
each_rule = pytest.mark.parametrize("build_rule", list(RULES.values()), ids=list(RULES))


def randomised(rule: UpdateRule) -> UpdateRule:
    with torch.no_grad():
        for index, parameter in enumerate(rule.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator(100 + index)))
    return rule.double()


@each_rule
def test_batched_particles_match_single_particles(build_rule: Callable[[], UpdateRule]) -> None:
    rule = randomised(build_rule())
    particles, instances, coordinates, steps = 3, 2, 7, 3
    weights = flat_meta_parameters(rule) + 0.1 * torch.randn(
        particles, len(flat_meta_parameters(rule)), generator=generator(1)
    )
    together = ParticleRule(rule, weights)
    shape = (instances, coordinates)
    states = {name: torch.zeros(particles, count, *shape) for name, count in rule.state_features.items()}
    single = [{name: tensor[particle].clone() for name, tensor in states.items()} for particle in range(particles)]
    for step in range(1, steps + 1):
        grads = torch.randn(particles, *shape, generator=generator(10 + step))
        update, states = together(grads, states, torch.tensor(float(step)))
        for particle in range(particles):
            vector_to_parameters(weights[particle], rule.parameters())
            expected, single[particle] = rule(grads[particle], single[particle], torch.tensor(float(step)))
            torch.testing.assert_close(update[particle], expected, rtol=ROUNDING, atol=1e-13)
            for name, tensor in single[particle].items():
                torch.testing.assert_close(states[name][particle], tensor, rtol=ROUNDING, atol=1e-13)


INSTANCES, STEPS = 4, 3


def noisy_quadratics(random_scale: bool = True) -> VectorizedTask:
    scale = torch.tensor([[0.5], [1.0], [2.0], [1.0]]) if random_scale else None
    return VectorizedTask(QuadraticTask(3, None, 0.5, 1.0), INSTANCES, seed=0, scale=scale)


each_meta_loss = pytest.mark.parametrize(
    "meta_loss",
    [MetaLoss("log"), MetaLoss("final", outer_batches=2), MetaLoss(bounded=True)],
    ids=["log", "outer-batches", "bounded"],
)


def options_of(meta_loss: MetaLoss) -> dict[str, Any]:
    """The options of an estimator with this meta-loss."""
    return {"meta_loss": meta_loss.name, "bounded": meta_loss.bounded, "outer_batches": meta_loss.outer_batches}


def looped(
    rule: UpdateRule,
    task: VectorizedTask,
    inner: list[InnerState],
    weights: Tensor,
    random: torch.Generator,
    groups: int,
    meta_loss: MetaLoss,
) -> tuple[Tensor, list[InnerState]]:
    """Meta-loss of each particle on its group, and all instances' states: one particle at a time, batches alike."""
    batches = random.get_state()
    here = parameters_to_vector(rule.parameters()).detach().clone()
    meta_losses, states = [], []
    size = INSTANCES // groups
    for particle, vector in enumerate(weights):
        random.set_state(batches)
        vector_to_parameters(vector, rule.parameters())
        with torch.no_grad():
            window = unroll(rule, task, inner[particle], STEPS, random, outer_batches=meta_loss.outer_batches)
        group = slice(particle % groups * size, (particle % groups + 1) * size)
        meta_losses.append(meta_loss.reduction(task)(window.counted[:, group], window.state.initial_loss[group]))
        states.append(window.state)
    vector_to_parameters(here, rule.parameters())
    return torch.stack(meta_losses), states


@pytest.mark.parametrize(  # of three rules, one runs in the fast tests
    "build_rule",
    [pytest.param(build, id=name, marks=[] if name == "mlp" else pytest.mark.slow) for name, build in RULES.items()],
)
@pytest.mark.parametrize("groups", [None, 1, 2])
@pytest.mark.parametrize("build", [ES, PES, ESSingle])
@each_meta_loss
def test_estimate_matches_its_formula_particle_by_particle(
    meta_loss: MetaLoss,
    build: type[PerturbationEstimator],
    groups: int | None,
    build_rule: Callable[[], UpdateRule],
) -> None:
    rule, task = randomised(build_rule()), noisy_quadratics()
    estimator = build(sigma=0.05, pairs=2, groups=groups, **options_of(meta_loss))
    inner = start(rule, task, generator(1))
    count = INSTANCES if groups is None else groups
    random, again = generator(2), generator(2)
    trajectory = estimator.start(rule, task, inner, random)
    noise = (
        estimator.perturbations(rule, estimator.pieces(task.instances), again) if build is ESSingle else torch.zeros(())
    )
    total: Tensor | float = 0.0
    states = [inner] * (4 * count)
    for _ in range(2):
        estimate = estimator.window(rule, task, trajectory, STEPS, random)
        trajectory = estimate.state
        if build is not ESSingle:
            noise = estimator.perturbations(rule, estimator.pieces(task.instances), again)
        total = total + noise if build is PES else noise
        meta_losses, ends = looped(rule, task, states, antithetic(rule, noise), again, count, meta_loss)
        size = INSTANCES // count
        if build is ES:  # all go on from the first particle of each group
            parts = [slice(group * size, (group + 1) * size) for group in range(count)]
            joined = torch.cat([ends[group].parameters[part] for group, part in enumerate(parts)])
            torch.testing.assert_close(trajectory.inner.parameters, joined, rtol=ROUNDING, atol=1e-13)
            states = [trajectory.inner] * (4 * count)
        else:
            states = ends
        above, below = meta_losses.chunk(2)
        samples = (above - below)[:, None] * total / (2 * 0.05**2)
        expected = samples.mean(0)
        variance = samples.var(0).sum() / len(samples)
        torch.testing.assert_close(estimate.report["variance"], variance, rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(parameters_to_vector(estimate.grads), expected, rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(estimate.meta_loss, meta_losses.mean(), rtol=ROUNDING, atol=0)
        assert estimate.losses.shape == (STEPS, *estimate.state.inner.initial_loss.shape)


@pytest.mark.parametrize("groups", [1, 2])
def test_es_on_speedups_matches_its_formula(groups: int) -> None:
    rule = randomised(ScaleFreeLSTM(hidden_size=2))
    task = VectorizedTask(QuadraticTask(3, None, 0.0, 1.0), INSTANCES, seed=0)
    estimator = ES(sigma=0.3, pairs=3, groups=groups, meta_loss="speedup")
    inner, random = start(rule, task, generator(1)), generator(2)
    estimate = estimator.window(rule, task, estimator.start(rule, task, inner, random), 60, generator(2))

    again = generator(2)
    noise = estimator.perturbations(rule, groups, again)
    with torch.no_grad():
        particles = as_particles(inner, groups, 6)
        losses = unroll(antithetic_rule(rule, noise), task, particles, 60, again).losses
    slowdowns = log_slowdowns(losses, particles.initial_loss, 6)
    assert float(slowdowns.min()) < 0 < float(slowdowns.max())
    above, below = slowdowns.view(2, -1)
    expected = ((above - below)[:, None] * noise / (2 * 0.3**2)).mean(0)
    torch.testing.assert_close(parameters_to_vector(estimate.grads), expected)


@pytest.mark.parametrize("build", [PES, ESSingle, Reparameterization, Combined, TruncatedBPTT])
def test_speedup_meta_loss_is_refused_by_other_estimators(build: type[Estimator]) -> None:
    with pytest.raises(ValueError, match=f"take the estimator 'es' or 'output-es', got {build.name!r}"):
        build(meta_loss="speedup")


@pytest.mark.slow
@each_rule
@pytest.mark.parametrize("options", [{}, {"second_derivatives": True}], ids=["replay", "second-derivatives"])
@each_meta_loss
def test_reparameterization_is_the_mean_of_bptt_at_the_perturbed_weights(
    meta_loss: MetaLoss, options: dict[str, Any], build_rule: Callable[[], UpdateRule]
) -> None:
    rule, task = randomised(build_rule()), noisy_quadratics()
    estimator = Reparameterization(sigma=0.05, pairs=3, groups=1, **options_of(meta_loss), **options)
    inner = start(rule, task, generator(1))
    estimate = estimator.window(rule, task, estimator.start(rule, task, inner, generator()), STEPS, generator(2))
    again = generator(2)
    noise = estimator.perturbations(rule, estimator.pieces(task.instances), again)
    batches = again.get_state()
    grads = []
    here = parameters_to_vector(rule.parameters()).detach().clone()
    for vector in antithetic(rule, noise):
        again.set_state(batches)
        vector_to_parameters(vector, rule.parameters())
        result = truncated_bptt(rule, task, inner, STEPS, again, meta_loss=meta_loss, **options)
        grads.append(parameters_to_vector(result.grads))
    vector_to_parameters(here, rule.parameters())
    expected = torch.stack(grads).mean(0)
    torch.testing.assert_close(parameters_to_vector(estimate.grads), expected, rtol=1e-7, atol=1e-12)


@pytest.mark.slow
def test_sampled_replay_is_unbiased_for_particles(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, task = randomised(RULES["scale-free-lstm"]()), noisy_quadratics()
    inner = start(rule, task, generator(1))

    def grads(count: int | None, seed: int) -> Tensor:
        estimator = Reparameterization(0.05, pairs=2, groups=2, replay_coordinates=count)
        monkeypatch.setattr(Reparameterization, "perturbations", lambda *_: noise)
        monkeypatch.setattr(task, "batch", lambda _: batch)
        state = estimator.start(rule, task, inner, generator())
        return parameters_to_vector(estimator.window(rule, task, state, STEPS, generator(seed)).grads)

    noise = 0.05 * torch.randn(4, len(flat_meta_parameters(rule)), generator=generator(3))
    batch = task.batch(generator(4))
    full = grads(None, 0)
    samples = torch.stack([grads(3, seed) for seed in range(200)])
    standard_error = samples.std(0) / 200**0.5
    assert bool(((samples.mean(0) - full).abs() <= 5 * standard_error + 1e-15).all())
    assert float(standard_error.norm()) < 0.1 * float(full.norm())
    assert float(samples.std(0).norm()) > 0.05 * float(full.norm())


# Common random numbers


class FusedAttention(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = scaled_dot_product_attention(inputs[None], inputs[None], inputs[None], dropout_p=0.5)
        return outputs[0]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.attention(inputs, inputs, inputs, need_weights=False)[0]
        return outputs


class Bernoulli(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * inputs.sigmoid().bernoulli()


NOISY: dict[str, Callable[[], nn.Module]] = {  # 8 features to 8
    "dropout": lambda: nn.Dropout(0.5),
    "fused-attention": FusedAttention,
    "multi-head-attention": SelfAttention,
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 8),
    "random-numbers-from-a-batched-tensor": Bernoulli,
}


class Noise(Task):
    """Dropout and noise in the batch, but no influence of the rule once the updates are nothing."""

    def __init__(self, kind: str = "dropout") -> None:
        self.kind = kind

    def module(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), NOISY[self.kind](), nn.Linear(8, 1))

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        return torch.randn(instances, 5, 3, generator=generator)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = module(batch).square().mean()
        return loss


class Still(UpdateRule):
    """Reads its weight, moves nothing."""

    name = "still"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    @property
    def settings(self) -> Mapping[str, int]:
        return {}

    @property
    def state_features(self) -> Mapping[str, int]:
        return {}

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        return 0.0 * self.weight * grad, {}

    def reset_parameters(self, seed: int) -> None:
        pass


@pytest.mark.parametrize("kind", NOISY)
@pytest.mark.parametrize("groups", [None, 1, 2])
@pytest.mark.parametrize("build", [ES, PES, ESSingle])
def test_antithetic_pairs_see_the_same_batches_and_dropout(
    build: type[PerturbationEstimator], groups: int | None, kind: str
) -> None:
    rule, task = Still(), VectorizedTask(Noise(kind), INSTANCES, seed=0)
    estimator = build(sigma=0.1, pairs=3, groups=groups)
    torch.manual_seed(0)
    random = generator()
    state = estimator.start(rule, task, start(rule, task, random), random)
    estimates = []
    for _ in range(2):
        estimates.append(estimator.window(rule, task, state, 2, random))
        state = estimates[-1].state
    assert [float(estimate.grads[0]) for estimate in estimates] == [0.0, 0.0]
    steps = torch.cat([estimate.losses.flatten(1) for estimate in estimates])  # (steps, copies * instances)
    assert all(len(losses.unique()) == INSTANCES for losses in steps)  # all copies alike, but not two instances
    assert len(steps.unique()) == len(steps) * INSTANCES


@pytest.mark.parametrize("kind", NOISY)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_is_reproducible_on_stochastic_losses(name: str, kind: str) -> None:
    rule = ScheduleFreeLSTM(hidden_size=2)
    task = VectorizedTask(Noise(kind), INSTANCES, seed=0)
    estimator, estimates = ESTIMATORS[name](), []
    for _ in range(2):
        random = generator()
        with fixed_global_state(0), torch.no_grad():
            state = estimator.start(rule, task, start(rule, task, random), random)
            estimates.append(estimator.window(rule, task, state, 2, random))
    first, second = estimates
    assert bool(first.losses.isfinite().all())
    assert torch.equal(first.losses, second.losses)
    assert all(map(torch.equal, first.grads, second.grads))


@pytest.mark.parametrize("kind", NOISY)
def test_particles_share_the_random_numbers_of_instances(kind: str) -> None:
    task = VectorizedTask(Noise(kind), INSTANCES, seed=0)
    parameters, batch, states = task.initial_parameters, task.batch(generator()), []
    results = []
    for values in (parameters, parameters.repeat(2, 1, 1)):
        with fixed_global_state(0):
            results.append((*task.losses_and_grads(values, batch), task.losses(values, batch)))
            states.append(torch.get_rng_state())
    for alone, particles in zip(*results, strict=True):
        torch.testing.assert_close(particles, torch.stack([alone, alone]), rtol=ROUNDING, atol=ROUNDING)
    assert torch.equal(*states)


class Recurrent(Noise):
    """Torch's recurrent layers can be vectorised with a gradient alone."""

    def module(self) -> nn.Module:
        return nn.LSTM(3, 2, 2, dropout=0.5, batch_first=True)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = module(batch[None])[0].square().mean()
        return loss


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_recurrent_layers_with_dropout_train_under_particles() -> None:
    task = VectorizedTask(Recurrent(), INSTANCES, seed=0)
    losses, _ = task.losses_and_grads(task.initial_parameters.repeat(2, 1, 1), task.batch(generator()))
    assert torch.equal(*losses)


# Variance and weights of the combination


class Watched(Combined):
    """Keeps the moments of its last window, the gradients of both parents among them."""

    seen: ClassVar[list[PairMoments]] = []

    def es_weight(self, moments: PairMoments, learned: dict[str, Tensor]) -> Tensor:
        self.seen[:] = [moments]
        return super().es_weight(moments, learned)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sigma", "log_rate", "steps"),
    [(0.3, 0.0, 5), (0.1, 0.0, 20), (0.3, -1.0, 10)],
    ids=["neither-is-much-better", "each-is-better-at-one", "backpropagation-is-better"],
)
def test_combination_has_no_more_variance_than_either_parent(sigma: float, log_rate: float, steps: int) -> None:
    """Variance over 120 windows from one state, of both meta-parameters and in sum, on a rugged loss.

    The weights come from the moments of 60 windows before. Where one parent is much better, the combination is about
    that parent: a tenth, and 2% in the sum, are allowed for the sampling errors of the weights.
    """
    rule, task = RateSchedule(100, log_rate).double(), VectorizedTask(RuggedPlane(), 1, seed=0)
    state = ES().start(rule, task, start(rule, task, generator()), generator())
    combined = Watched(sigma, pairs=16, variance_decay=0.98, second_derivatives=True)
    before: dict[str, Tensor] = {}
    for seed in range(60):
        combined.window(rule, task, state, steps, generator(10_000 + seed), before)
    samples: dict[str, list[Tensor]] = {"es": [], "reparameterization": [], "combined": []}
    for seed in range(120):
        estimate = combined.window(rule, task, state, steps, generator(seed), dict(before))
        (seen,) = combined.seen
        of_parents = {"es": seen.es_mean, "reparameterization": seen.rp_mean}
        for name, grads in {**of_parents, "combined": parameters_to_vector(estimate.grads)}.items():
            samples[name].append(grads)
        if seed < 3:  # the parents by themselves
            parents = (ES(sigma, pairs=16), Reparameterization(sigma, pairs=16, second_derivatives=True))
            for parent in parents:
                alone = parent.window(rule, task, state, steps, generator(seed)).grads
                torch.testing.assert_close(parameters_to_vector(alone), of_parents[parent.name])
    es, rp, both = (torch.stack(rows).var(0) for rows in samples.values())
    assert float(both.sum()) <= 1.02 * min(float(es.sum()), float(rp.sum()))
    assert bool((both <= 1.1 * torch.minimum(es, rp)).all())
    if steps == 5:
        assert float(both[0]) < 0.85 * min(float(es[0]), float(rp[0]))  # two alike: half, if they are independent
    if steps == 20:
        assert float(es[0]) < 0.5 * float(rp[0])
        assert float(rp[1]) < 0.5 * float(es[1])


def test_weights_are_inverse_variances() -> None:
    es = torch.tensor([[1.0, 2.0, 1.0, 0.0], [3.0, 2.0, 5.0, 0.0]])  # variances 2, 0, 8, 0
    rp = torch.tensor([[1.0, 1.0, math.inf, 0.0], [2.0, 5.0, 1.0, 0.0]])  # 0.5, 8, none, 0
    weight = Combined(covariance=False).es_weight(PairMoments.of(es, rp), {})
    torch.testing.assert_close(weight, torch.tensor([0.2, 1.0, 1.0, 0.5]))


def test_running_variances_weigh_the_next_window() -> None:
    estimator = Combined(covariance=False, variance_decay=0.75)
    learned: dict[str, Tensor] = {}

    def weight(es: list[list[float]], rp: list[list[float]]) -> float:
        return float(estimator.es_weight(PairMoments.of(torch.tensor(es), torch.tensor(rp)), learned))

    assert weight([[0.0], [2.0]], [[0.0], [4.0]]) == pytest.approx(0.8)  # variances 2 and 8; nothing is known yet
    assert weight([[0.0], [4.0]], [[0.0], [math.nan]]) == 1.0  # what is not finite has no weight, and is not remembered
    assert {name: float(value) for name, value in learned.items()} == {"es": 2.0, "rp": 8.0, "covariance": 4.0}
    weight([[0.0], [4.0]], [[0.0], [0.0]])  # variances 8 and 0
    assert weight([[0.0], [4.0]], [[0.0], [4.0]]) == pytest.approx(6.0 / (3.5 + 6.0))


def test_weights_take_the_covariance_into_account() -> None:
    """Against the minimum of the variance of the combined samples over a grid of weights."""
    rp = torch.randn(50, 3, generator=generator())
    es = torch.stack([2.0 * rp[:, 0], 0.3 * rp[:, 1] + torch.randn(50, generator=generator(1)), -0.5 * rp[:, 2]], 1)
    grid = torch.linspace(0, 1, 1001)[:, None, None]
    best = grid[(grid * es + (1 - grid) * rp).var(1).argmin(0)][:, 0, 0]
    torch.testing.assert_close(Combined().es_weight(PairMoments.of(es, rp), {}), best, rtol=0, atol=0.0006)
    assert best[0] == 0.0
    assert 0.2 < best[1] < 0.6
    assert best[2] > 0.6


def test_combination_is_the_reported_weighted_mean() -> None:
    rule, task = randomised(RULES["lstm-l2l"]()), noisy_quadratics()
    state = ES().start(rule, task, start(rule, task, generator(1)), generator())
    results = {
        estimator.name: estimator.window(rule, task, state, STEPS, generator(2))
        for estimator in (ES(0.05), Reparameterization(0.05), Combined(0.05, covariance=False))
    }
    weight = results["combined"].report["es_weight"]
    assert weight.shape == flat_meta_parameters(rule).shape
    es, rp, combined = (parameters_to_vector(results[name].grads) for name in ("es", "reparameterization", "combined"))
    torch.testing.assert_close(combined, weight * es + (1 - weight) * rp, rtol=ROUNDING, atol=1e-14)
    assert 0 < float(weight.min()) < float(weight.max()) < 1


def test_non_finite_backpropagation_gives_all_weight_to_es() -> None:
    class Explosive(Still):
        """Weight 1 gives finite updates with an infinite derivative."""

        def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
            return -0.1 * grad * (self.weight + (self.weight * 0).abs().sqrt()), {}

    rule, task = Explosive(), noisy_quadratics()
    state = ES().start(rule, task, start(rule, task, generator(1)), generator())
    assert not bool(Reparameterization().window(rule, task, state, 2, generator(2)).grads[0].isfinite())
    combined = Combined().window(rule, task, state, 2, generator(2))
    assert combined.grads[0] == ES().window(rule, task, state, 2, generator(2)).grads[0]
    assert bool(combined.grads[0].isfinite())
    assert combined.report["es_weight"].tolist() == [1.0]


# Memory, state and refusals


class LiveBytes(TorchDispatchMode):
    """Peak of the memory of all tensors made inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.storages[reference.cdata] = (reference, storage.nbytes())
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


ALL: dict[str, Callable[[], Estimator]] = {
    "truncated-bptt": TruncatedBPTT,
    "reparameterization": Reparameterization,
    "es": ES,
    "combined": lambda: Combined(variance_decay=0.9),
    "pes": PES,
    "es-single": ESSingle,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["es", "pes", "es-single", "truncated-bptt"])
def test_memory_is_constant_in_the_window_except_for_backpropagation(name: str) -> None:
    rule = randomised(ScaleFreeLSTM(2))
    task = VectorizedTask(QuadraticTask(20, None, 0.1, 1.0), 2, seed=0)
    estimator = ALL[name]()
    state = estimator.start(rule, task, start(rule, task, generator()), generator())
    peaks = []
    for steps in (5, 5, 50):  # the first one warms up: caches
        with LiveBytes() as live:
            estimator.window(rule, task, state, steps, generator())
        peaks.append(live.peak)
    growth = peaks[2] - peaks[1]
    if name == "truncated-bptt":
        assert growth > 45 * 8 * task.instances * task.coordinates
    else:
        assert growth <= 45 * 8 * 2 * task.instances * 3  # the losses of the particles, listed, stacked and averaged


@pytest.mark.parametrize("build", list(ALL.values()), ids=list(ALL))
def test_state_has_constant_size_and_determines_the_next_window(build: Callable[[], Estimator]) -> None:
    rule, task = randomised(RULES["scale-free-lstm"]()), noisy_quadratics()
    estimator = build()
    state = estimator.start(rule, task, start(rule, task, generator(1)), generator(2))
    learned: dict[str, Tensor] = {}

    def size() -> int:
        return sum(tensor.numel() for tensor in tree_leaves([state, learned]))

    sizes = []
    for seed in range(3):
        before = [tensor.clone() for tensor in tree_leaves(state)]
        last, learned_before = state, dict(learned)
        estimate = estimator.window(rule, task, state, STEPS, generator(seed), learned)
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(state), before, strict=True))
        state = estimate.state
        assert not any(tensor.requires_grad for tensor in tree_leaves([state, estimate.grads, estimate.losses]))
        sizes.append(size())
    assert len(set(sizes)) == 1
    estimator.check_learned(learned)
    repeated = build().window(rule, task, last, STEPS, generator(2), learned_before)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(repeated), tree_leaves(estimate), strict=True))


def test_particles_of_a_group_start_from_its_instances() -> None:
    rule, task = randomised(RULES["scale-free-lstm"]()), noisy_quadratics()
    with torch.no_grad():
        inner = unroll(rule, task, start(rule, task, generator(1)), 2, generator(2)).state
    particles = as_particles(inner, groups=2, copies=3)
    assert particles.parameters.shape == (6, 2, task.coordinates)
    for particle in range(6):
        part = slice(particle % 2 * 2, particle % 2 * 2 + 2)
        assert torch.equal(particles.parameters[particle], inner.parameters[part])
        assert torch.equal(particles.grad[particle], inner.grad[part])
        assert torch.equal(particles.initial_loss[particle], inner.initial_loss[part])
        for name, tensor in inner.rule_state.items():
            assert torch.equal(particles.rule_state[name][particle], tensor[:, part])


def test_flat_meta_parameters_and_meta_gradients_share_one_order() -> None:
    rule = randomised(RULES["lstm-l2l"]())
    parts = as_meta_grads(rule, flat_meta_parameters(rule))
    assert all(torch.equal(part, parameter) for part, parameter in zip(parts, rule.parameters(), strict=True))


def test_invalid_settings_are_refused() -> None:
    rule, task = randomised(RULES["lstm-l2l"]()), noisy_quadratics()
    inner = start(rule, task, generator())
    for options, message in [
        ({"sigma": 0.0}, "sigma must be positive, got 0"),
        ({"pairs": 0}, "pairs and groups must be at least 1, got 0 and None"),
        ({"groups": 0}, "pairs and groups must be at least 1, got 1 and 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ES(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="groups must divide the 4 instances, got 3"):
        PES(groups=3).start(rule, task, inner, generator())
    with pytest.raises(ValueError, match="needs two pairs or more"):
        Combined(groups=1).window(rule, task, Combined().start(rule, task, inner, generator()), 2, generator())
    with pytest.raises(ValueError, match=r"variance_decay must lie in \[0, 1\), got 1"):
        Combined(variance_decay=1.0)
    with pytest.raises(ValueError, match="replay_coordinates needs constant inner gradients"):
        Reparameterization(second_derivatives=True, replay_coordinates=3)
    with pytest.raises(ValueError, match="pes keeps no state of its own, got es"):
        PES().check_learned({"es"})
    with pytest.raises(ValueError, match="combined keeps es, rp and covariance, got es"):
        Combined().check_learned({"es"})
