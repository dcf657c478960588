"""Evolution strategies that meta-train a part of a rule's weights and keep the others."""

import pytest
import torch

from helpers.small_runs import plain, run
from learned_optim.meta_train.config.load import ConfigError
from learned_optim.meta_train.estimators import ES, PES, ESSingle, TruncatedBPTT
from learned_optim.meta_train.estimators.evolution import EvolutionStrategy
from learned_optim.meta_train.inner.unroll import start
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks.quadratic import QuadraticTask
from learned_optim.meta_train.trainer.trainer import Trainer
from learned_optim.rules import ScaleFreeLSTM

PART = ("output_bias", "step_weight")

pytestmark = pytest.mark.usefixtures("double", "one_thread")
each_strategy = pytest.mark.parametrize("strategy", [ES, PES, ESSingle])


@each_strategy
def test_estimate_is_the_gradient_of_the_part_and_zero_elsewhere(strategy: type[EvolutionStrategy]) -> None:
    rule = ScaleFreeLSTM(hidden_size=1)
    with torch.no_grad():  # an output layer of zeros would hide the time features
        rule.output_weight.copy_(torch.randn(rule.output_weight.shape, generator=torch.Generator().manual_seed(1)))
    task = VectorizedTask(QuadraticTask(3, 10.0, 0.0, 1.0), 2, seed=0)
    steps = 5

    def grads(estimator: EvolutionStrategy | TruncatedBPTT) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        state = estimator.start(rule, task, start(rule, task, generator), generator)
        estimate = estimator.window(rule, task, state, steps, generator)
        return dict(zip(dict(rule.named_parameters()), estimate.grads, strict=True))

    exact = grads(TruncatedBPTT(second_derivatives=True))
    pairs = 4_000  # times two instances; 18 weights: an error of about sqrt(18 / 8,000)
    estimated = grads(strategy(sigma=1e-3, pairs=pairs, perturbed=PART))
    for name in estimated:
        if name not in PART:
            assert estimated[name].count_nonzero() == 0, name
    found, true = (torch.cat([grads[name].flatten() for name in PART]) for grads in (estimated, exact))
    assert true.norm() > 0
    assert (found - true).norm() < 0.15 * true.norm()


@each_strategy
def test_only_the_part_is_meta_trained(strategy: type[EvolutionStrategy]) -> None:
    trainer = Trainer(plain(steps=3, estimator={"name": strategy.name, "perturbed": ["output_bias"]}))
    before = {name: weights.detach().clone() for name, weights in trainer.module.named_parameters()}
    run(trainer)
    moved = {name for name, weights in trainer.module.named_parameters() if not weights.equal(before[name])}
    assert moved == {"output_bias"}


def test_unknown_perturbed_parameters_are_refused() -> None:
    message = "perturbed: the rule has no parameter 'bias'; it has .*output_bias"
    with pytest.raises(ConfigError, match=message):
        plain(estimator={"name": "es", "perturbed": ["output_bias", "bias"]})
    with pytest.raises(ConfigError, match="estimator 'combined' has no option 'perturbed'"):
        plain(estimator={"name": "combined", "perturbed": ["output_bias"]})
    with pytest.raises(ConfigError, match="perturbed names at least one"):
        plain(estimator={"name": "es", "perturbed": []})
