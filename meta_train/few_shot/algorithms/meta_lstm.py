r"""Meta-LSTM: the learner's parameters are the cell state of an LSTM (Ravi & Larochelle 2017, section 3.2).

.. math:: w_t = f_t \odot w_{t-1} - i_t \odot \nabla L_t

For every coordinate, an LSTM of 20 units reads the loss and the gradient as log and sign; its output, the coordinate
itself and the gate's own last value decide over the gates :math:`f_t` (what is kept of :math:`w`) and :math:`i_t` (its
rate). LSTM, gates and the initial cell state :math:`w_0` are learned from the query loss after the last step. Losses
and gradients count as constants (section 3.4).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from learned_optim.meta_train.few_shot.algorithms.gradient import Point
from learned_optim.meta_train.few_shot.algorithms.maml import QueryTrained
from learned_optim.meta_train.few_shot.episodes import Examples
from learned_optim.meta_train.few_shot.learner import Learner
from learned_optim.rules.base import linear
from learned_optim.rules.lstm import LSTMCell
from learned_optim.rules.lstm_l2l import log_sign

STEEPNESS = 10.0  # p of the preprocessing, as in the paper


class Gate(nn.Module):
    """``sigmoid(weight @ [signal; w; last value] + bias)`` for every coordinate.

    Args:
        signals: features of the signal.
        bias: range of the first bias, which decides where the gate starts.
        generator: source of the first weights and bias.
    """

    def __init__(self, signals: int, bias: tuple[float, float], generator: torch.Generator) -> None:
        super().__init__()
        low, high = bias
        self.weight = nn.Parameter(0.01 * torch.randn(1, signals + 2, generator=generator))
        self.bias = nn.Parameter(low + (high - low) * torch.rand((), generator=generator))

    def forward(self, signal: Tensor, parameters: Tensor, last: Tensor) -> Tensor:
        """Values for ``signal`` ``(signals, B, N)``, shaped as ``parameters`` and ``last`` ``(B, N)``."""
        inputs = torch.cat([signal, parameters[None], last[None]])
        value: Tensor = (linear(self.weight, inputs)[0] + self.bias).sigmoid()
        return value


class MetaLSTM(QueryTrained):
    """Meta-LSTM; see the module's formula.

    Args:
        initial: the first starting point, ``(N,)``.
        steps: inner steps in meta-training.
        batch_size: support examples of an inner step; None: all.
        hidden_size: units of the LSTM (paper: 20).
        forget_bias: range of the first bias of the forget gate: it starts with keeping nearly everything.
        input_bias: range of the first bias of the input gate: it starts with a small rate.
        seed: seed of the first weights.
    """

    second_derivatives = False

    def __init__(
        self,
        initial: Tensor,
        steps: int = 5,
        batch_size: int | None = None,
        *,
        hidden_size: int = 20,
        forget_bias: tuple[float, float] = (4.0, 6.0),
        input_bias: tuple[float, float] = (-5.0, -4.0),
        seed: int = 0,
    ) -> None:
        super().__init__(initial, None, steps, batch_size)  # the gates below take the optimizer's place
        generator = torch.Generator().manual_seed(seed)
        self.lstm = LSTMCell(4, hidden_size)
        self.lstm.reset_parameters(generator)
        self.forget_gate = Gate(hidden_size, forget_bias, generator)
        self.input_gate = Gate(hidden_size, input_bias, generator)

    def points(
        self, learner: Learner, batches: Iterator[Examples], count: int, steps: int, *, second_derivatives: bool = False
    ) -> Iterator[Point]:
        """The starting point of ``count`` learners, and their parameters after each step of the LSTM."""
        parameters = self.initial.expand(count, -1)
        hidden = parameters.new_zeros(self.lstm.hidden, *parameters.shape)
        cell, kept, rate = hidden, torch.zeros_like(parameters), torch.zeros_like(parameters)
        adapted = learner.with_batches(parameters, batches)
        for step in range(steps + 1):
            loss, grad = (value.detach() for value in adapted.losses_and_grads(parameters, next(batches)))
            yield Point(parameters, loss, grad)
            if step == steps:
                return
            of_loss = log_sign(loss, STEEPNESS)[:, :, None].expand(-1, -1, parameters.shape[1])
            hidden, cell = self.lstm(torch.cat([of_loss, log_sign(grad, STEEPNESS)]), hidden, cell)
            kept, rate = self.forget_gate(hidden, parameters, kept), self.input_gate(hidden, parameters, rate)
            parameters = kept * parameters - rate * grad
