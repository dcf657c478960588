"""Estimates with particles against their formulas, and particles together against one after the other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from helpers.particles import (
    INSTANCES,
    PARTICLE_RULES,
    ROUNDING,
    STEPS,
    each_meta_loss,
    each_rule,
    generator,
    noisy_quadratics,
    options_of,
    randomised,
)
from learned_optim.meta_train.estimators import (
    ES,
    PES,
    Combined,
    ESSingle,
    Estimator,
    Reparameterization,
    TruncatedBPTT,
    truncated_bptt,
)
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
from learned_optim.meta_train.tasks.quadratic import QuadraticTask
from learned_optim.rules import ScaleFreeLSTM, UpdateRule

pytestmark = pytest.mark.usefixtures("double", "one_thread")


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
    [
        pytest.param(build, id=name, marks=[] if name == "mlp" else pytest.mark.slow)
        for name, build in PARTICLE_RULES.items()
    ],
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
    rule, task = randomised(PARTICLE_RULES["scale-free-lstm"]()), noisy_quadratics()
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


def test_particles_of_a_group_start_from_its_instances() -> None:
    rule, task = randomised(PARTICLE_RULES["scale-free-lstm"]()), noisy_quadratics()
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
    rule = randomised(PARTICLE_RULES["lstm-l2l"]())
    parts = as_meta_grads(rule, flat_meta_parameters(rule))
    assert all(torch.equal(part, parameter) for part, parameter in zip(parts, rule.parameters(), strict=True))
