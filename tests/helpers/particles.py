"""Rules, tasks and tolerances for tests of estimators with particles."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learned_optim.meta_train.estimators import (
    ES,
    PES,
    Combined,
    ESSingle,
    Estimator,
    Reparameterization,
    TruncatedBPTT,
)
from learned_optim.meta_train.inner.meta_loss import MetaLoss
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks.quadratic import QuadraticTask
from learned_optim.rules import LSTML2L, MLP, RuleState, ScaleFreeLSTM, ScheduleFreeLSTM, UpdateRule

ROUNDING = 1e-9  # relative; float64, over a few steps of an LSTM


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Particles together against one after the other


class SlowScaleFree(ScaleFreeLSTM):
    """A scale-free LSTM without a fast path for particles."""

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        return super().forward(grad, state, step)


PARTICLE_RULES: dict[str, Callable[[], UpdateRule]] = {
    "lstm-l2l": lambda: LSTML2L(hidden_size=2, layers=2, output_scale=0.3),
    "scale-free-lstm": lambda: ScaleFreeLSTM(2, momentum_decays=(0.9, 0.5), rate=0.1),
    "schedule-free-lstm": lambda: ScheduleFreeLSTM(2, rate=0.1),
    "schedule-free-lstm-no-units": lambda: ScheduleFreeLSTM(0, rate=0.1),
    "mlp": lambda: MLP(4, rate=0.1, magnitude_rate=0.5),
    "no-fast-path": lambda: SlowScaleFree(2, momentum_decays=(0.9, 0.5), rate=0.1),
}
each_rule = pytest.mark.parametrize("build_rule", list(PARTICLE_RULES.values()), ids=list(PARTICLE_RULES))


def randomised(rule: UpdateRule) -> UpdateRule:
    """Meta-parameters N(0, 0.3^2), since a weight that starts at zero would hide terms of the gradient."""
    with torch.no_grad():
        for index, parameter in enumerate(rule.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator(100 + index)))
    return rule.double()


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


ALL_ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "truncated-bptt": TruncatedBPTT,
    "reparameterization": Reparameterization,
    "es": ES,
    "combined": lambda: Combined(variance_decay=0.9),
    "pes": PES,
    "es-single": ESSingle,
}
