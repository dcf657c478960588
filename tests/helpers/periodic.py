"""A rule whose LSTM runs at some steps only: its kernels have a branch for each outcome of the condition."""

import torch
from torch import Tensor, nn

from learned_optim.rules import RuleState, UpdateRule
from learned_optim.rules.base import linear, truncated_normal_
from learned_optim.rules.lstm import LSTMCell


class Periodic(UpdateRule):
    """A momentum, and an LSTM that runs at steps 1, 1 + period, ...: between them its state stays as it is.

    Args:
        hidden_size: units of the LSTM.
        period: steps from one run to the next.
    """

    name = "periodic"

    def __init__(self, hidden_size: int = 2, period: int = 3) -> None:
        super().__init__()
        self.hidden_size, self.period = hidden_size, period
        self.cell = LSTMCell(2, hidden_size)
        self.output_weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.reset_parameters(seed=0)

    @property
    def settings(self) -> dict[str, int]:
        return {"hidden_size": self.hidden_size, "period": self.period}

    @property
    def state_features(self) -> dict[str, int]:
        return {"momentum": 1, "hidden": self.hidden_size, "cell": self.hidden_size}

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.cell.reset_parameters(generator)
        truncated_normal_(self.output_weight, 1.0, generator)

    def condition(self, step: Tensor) -> Tensor:
        """Whether the LSTM runs."""
        return step % self.period == 1

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        momentum = 0.9 * state["momentum"] + 0.1 * grad
        old = state["hidden"].to(grad.dtype), state["cell"].to(grad.dtype)
        new = self.cell(torch.stack([grad, momentum[0]]).clamp(-2, 2), *old)
        due = self.condition(step)
        hidden, cell = (torch.where(due, after, before) for after, before in zip(new, old, strict=True))
        update = -0.1 * (linear(self.output_weight, hidden)[0] + 0.1 * momentum[0])
        return update, {"momentum": momentum, "hidden": hidden, "cell": cell}
