"""Particles of an estimator see the same batches, dropout masks and other random numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from helpers.particles import INSTANCES, ROUNDING, Still, generator
from learned_optim.meta_train.common.seeds import fixed_global_state
from learned_optim.meta_train.estimators import (
    ES,
    ESTIMATORS,
    PES,
    ESSingle,
)
from learned_optim.meta_train.estimators.perturbation import (
    PerturbationEstimator,
)
from learned_optim.meta_train.inner.unroll import start
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import Batch, Task
from learned_optim.rules import ScheduleFreeLSTM

pytestmark = pytest.mark.usefixtures("double", "one_thread")


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
