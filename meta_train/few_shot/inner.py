"""Usual optimizers as differentiable functions, for the inner loop of a few-shot algorithm."""

import torch
from torch import Tensor, nn

from learned_optim.rules import NO_CONDITIONS, Conditions, RuleState, UpdateRule


class ScaledRule:
    """A rule whose updates are multiplied by the scales of a learner's tensors.

    Args:
        rule: any.
        scales: :meth:`VectorizedTask.scales` of a learner, ``(1, N)``.
    """

    def __init__(self, rule: UpdateRule, scales: Tensor) -> None:
        self.rule, self.scales = rule, scales
        self.init_state, self.uses_conditions = rule.init_state, rule.uses_conditions

    def __call__(
        self, grad: Tensor, state: RuleState, step: Tensor, conditions: Conditions = NO_CONDITIONS
    ) -> tuple[Tensor, RuleState]:
        """The rule's update for gradients ``(B, N)``, times the scales, and its new state."""
        conditions = conditions._replace(parameter=conditions.parameter / self.scales)
        update, state = self.rule.forward_under(conditions, grad, state, step)
        return self.scales * update, state


class SGD(nn.Module):
    """Gradient descent: ``update = -lr * grad``."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr

    def init_state(
        self, coordinates: tuple[int, ...], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> RuleState:
        """No state."""
        return {}

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        """The update for gradients of any shape, and no state."""
        return -self.lr * grad, {}


class LearnedRates(SGD):
    """Gradient descent with a learned rate for each coordinate of the learner (Meta-SGD, Li et al. 2017, section 3.2).

    The rates may become negative.

    Args:
        coordinates: number of the learner's coordinates, N.
        lr: initial value of all rates.
    """

    def __init__(self, coordinates: int, lr: float) -> None:
        super().__init__(lr)
        self.rates = nn.Parameter(torch.full((coordinates,), lr))

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        """The update for gradients ``(B, N)``, and no state."""
        return -self.rates * grad, {}


class Adam(nn.Module):
    """Adam (Kingma & Ba 2015), with ``eps`` under the root, where its derivative exists for a gradient of zero."""

    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-16) -> None:
        super().__init__()
        self.lr, self.betas, self.eps = lr, betas, eps

    def init_state(
        self, coordinates: tuple[int, ...], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> RuleState:
        """Both moments, ``(1, *coordinates)``, at zero."""
        return {name: torch.zeros((1, *coordinates), device=device, dtype=dtype) for name in ("first", "second")}

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        """The update for gradients of any shape, and the new moments."""
        decay, decay_of_square = self.betas
        first = torch.lerp(grad, state["first"][0], decay)
        second = torch.lerp(grad.square(), state["second"][0], decay_of_square)
        corrected = second / (1 - decay_of_square**step)
        update = -self.lr / (1 - decay**step) * first * (corrected + self.eps).rsqrt()
        return update, {"first": first[None], "second": second[None]}
