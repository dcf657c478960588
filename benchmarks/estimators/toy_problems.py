"""Problems with few meta-parameters from the literature on truncation bias, as rules and tasks.

The rules are no optimizers: they turn a dynamical system or a schedule into something that the estimators can unroll.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from learned_optim.meta_train.tasks import Batch, Task
from learned_optim.rules import RuleState, UpdateRule


class InfluenceBalancing(UpdateRule):
    """Influence balancing (Tallec & Ollivier 2017, section 5.1; Vicol et al. 2021, section 5.1).

    ``s <- A s + w c`` with ``A = I / 2 + (upper shift) / 2`` on 23 coordinates, ``c`` 1 on the first 10 and -1 on the
    others. The loss is ``(s_1 - 1)^2 / 2``. The first units' influence comes soon and points up, that of the others
    comes later, points down and weighs more: whoever looks at fewer than some tens of steps goes the wrong way.
    """

    name = "influence-balancing"
    units, positive = 23, 10

    def __init__(self, start: float = 0.5) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.full((1,), start))

    @property
    def settings(self) -> Mapping[str, float]:
        return {"start": self.start}

    @property
    def state_features(self) -> Mapping[str, int]:
        return {"started": 1, "system": 1}

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        """``grad`` ``(..., 23)`` has no influence; the first system is all ones, as the task's parameters are.

        No rule for an optimizer: its coordinates depend on each other. Those that fill up a block stay at zero.
        """
        signs = torch.zeros_like(grad)
        signs[..., : self.positive], signs[..., self.positive : self.units] = 1.0, -1.0
        system = torch.where(state["started"] == 0, signs.abs(), state["system"])
        shifted = torch.cat([system[..., 1:], torch.zeros_like(system[..., :1])], -1)
        new = 0.5 * system + 0.5 * shifted + self.weight * signs
        return (new - system)[0], {"started": torch.ones_like(system), "system": new}

    def reset_parameters(self, seed: int) -> None:
        nn.init.constant_(self.weight, self.start)

    def expected_first_unit(self, steps: int) -> tuple[Tensor, Tensor]:
        """The first unit after 1, ..., ``steps``: its part without the weight, and its derivative by the weight."""
        system = torch.ones(self.units, dtype=torch.float64)
        signs = torch.ones(self.units, dtype=torch.float64)
        signs[self.positive :] = -1.0
        matrix = 0.5 * (torch.eye(self.units) + torch.diag(torch.ones(self.units - 1), 1)).double()
        slope = torch.zeros_like(system)
        free, slopes = [], []
        for _ in range(steps):
            system, slope = matrix @ system, matrix @ slope + signs
            free.append(system[0])
            slopes.append(slope[0])
        return torch.stack(free), torch.stack(slopes)


class FirstUnit(Task):
    """``(s_1 - 1)^2 / 2`` of 23 coordinates that start at 1."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coordinates = nn.Parameter(torch.ones(InfluenceBalancing.units))

        def forward(self) -> Tensor:
            return self.coordinates

    def module(self) -> nn.Module:
        return self.Point()

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        return torch.zeros(instances, 1)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        point: Tensor = module()
        return 0.5 * (point[0] - 1).square()


class RateSchedule(UpdateRule):
    """Gradient descent with the rate ``(1 - t / T) e^{w_0} + (t / T) e^{w_1}`` (Vicol et al. 2021, section 5.2)."""

    name = "rate-schedule"

    def __init__(self, horizon: int = 100, start: float = -4.0) -> None:
        super().__init__()
        self.horizon, self.start = horizon, start
        self.weights = nn.Parameter(torch.full((2,), start))

    @property
    def settings(self) -> Mapping[str, int | float]:
        return {"horizon": self.horizon, "start": self.start}

    @property
    def state_features(self) -> Mapping[str, int]:
        return {}

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        fraction = (step - 1) / self.horizon
        first, last = self.weights.exp().unbind(-1)
        return -((1 - fraction) * first + fraction * last) * grad, {}

    def reset_parameters(self, seed: int) -> None:
        nn.init.constant_(self.weights, self.start)


class RuggedPlane(Task):
    """``sqrt(x^2 + 5) - sqrt(5) + sin(y)^2 exp(-5 x^2) + |y - 100| / 4`` from (1, 1): the paper's toy regression."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coordinates = nn.Parameter(torch.ones(2))

        def forward(self) -> Tensor:
            return self.coordinates

    def module(self) -> nn.Module:
        return self.Point()

    def batch(self, instances: int, generator: torch.Generator) -> Batch:
        return torch.zeros(instances, 1)

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        x, y = module().unbind()
        hollow = (x.square() + 5).sqrt() - math.sqrt(5)
        loss: Tensor = hollow + y.sin().square() * (-5 * x.square()).exp() + 0.25 * (y - 100).abs()
        return loss
