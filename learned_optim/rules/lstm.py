"""A feature-major LSTM cell: every coordinate is one element of the batch."""

import torch
from torch import Tensor, nn

from learned_optim.rules.base import linear, per_feature, truncated_normal_


class LSTMCell(nn.Module):
    """LSTM (Hochreiter & Schmidhuber 1997, with forget gates) whose gates are one matrix product.

    ``gates = weight @ [inputs; hidden] + bias`` on ``(4 * hidden, coordinates)``, blocks in the order input, forget,
    candidate, output.

    Args:
        inputs: number of input features.
        hidden: number of units.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.hidden = hidden
        self.weight = nn.Parameter(torch.zeros(4 * hidden, inputs + hidden))
        self.bias = nn.Parameter(torch.zeros(4 * hidden))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Truncated normal weights of deviation 1/sqrt(fan in), as in Sonnet; forget gates start open (bias 1)."""
        deviation = (self.inputs + self.hidden) ** -0.5
        truncated_normal_(self.weight, deviation, generator)
        self.bias.zero_()
        self.bias[self.hidden : 2 * self.hidden] = 1.0

    def forward(
        self, inputs: Tensor, hidden: Tensor, cell: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step: ``inputs`` ``(inputs, *coordinates)``, ``hidden`` and ``cell`` ``(hidden, *coordinates)``.

        ``context``, if given, is added to the gates and broadcasts against ``(4 * hidden, *coordinates)``.
        """
        gates = linear(self.weight, torch.cat([inputs, hidden]))
        offset = per_feature(self.bias, inputs[0])
        gates = gates + (offset if context is None else offset + context)
        input_gate, forget_gate, candidate, output_gate = gates.chunk(4)
        cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
        return output_gate.sigmoid() * cell.tanh(), cell
