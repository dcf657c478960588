"""The coordinatewise LSTM of Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent"."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from learned_optim.rules.base import RuleSettings, RuleState, UpdateRule, linear, per_feature, truncated_normal_
from learned_optim.rules.lstm import LSTMCell


def log_sign(grad: Tensor, p: float) -> Tensor:
    """Gradient as magnitude and direction, ``(2, *coordinates)`` (appendix A of the paper).

    ``(log|g| / p, sign g)`` where ``|g| >= exp(-p)``, else ``(-1, exp(p) g)``. Continuous in ``g``.
    """
    magnitude = grad.abs().clamp(min=math.exp(-p)).log() / p
    direction = (grad * math.exp(p)).clamp(-1.0, 1.0)
    return torch.stack([magnitude, direction])


class LSTML2L(UpdateRule):
    """Two-layer coordinatewise LSTM over log-and-sign gradients, faithful to the 2016 paper.

    ``update = output_scale * (output_weight @ hidden_2 + output_bias)``; 5,141 meta-parameters at the paper's size.

    Kept as the field's point of reference. *When not to use it:* it moves coordinates whose gradient is zero (its
    biases reach the update), its state is 320 bytes a parameter, and it serves the kind of problem that it was
    meta-trained on. For training models use the default rule.

    Args:
        hidden_size: units of each layer (paper: 20).
        layers: number of LSTM layers (paper: 2).
        p: steepness of the log-and-sign preprocessing (paper: 10).
        output_scale: factor on the network's output (0.1 in the re-implementations of the paper).

    Raises:
        ValueError: a size is less than 1, ``p`` not in (0, 80], or ``output_scale`` not positive.
    """

    name = "lstm-l2l"

    def __init__(self, hidden_size: int = 20, layers: int = 2, p: float = 10.0, output_scale: float = 0.1) -> None:
        super().__init__()
        if hidden_size < 1 or layers < 1:
            raise ValueError(f"hidden_size and layers must be at least 1, got {hidden_size} and {layers}")
        if not (0 < p <= 80 and 0 < output_scale < math.inf):  # exp(80) is still a float32
            raise ValueError(f"p must lie in (0, 80] and output_scale be positive, got {p} and {output_scale}")
        self.hidden_size, self.layers, self.p, self.output_scale = hidden_size, layers, p, output_scale
        self.cells = nn.ModuleList(LSTMCell(2 if layer == 0 else hidden_size, hidden_size) for layer in range(layers))
        self.output_weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.output_bias = nn.Parameter(torch.zeros(1))
        self.reset_parameters(seed=0)

    @property
    def settings(self) -> RuleSettings:
        """Keyword arguments that build this architecture again."""
        return {
            "hidden_size": self.hidden_size,
            "layers": self.layers,
            "p": self.p,
            "output_scale": self.output_scale,
        }

    @property
    def state_features(self) -> Mapping[str, int]:
        """Hidden and cell state of all layers, layer by layer."""
        return {"hidden": self.layers * self.hidden_size, "cell": self.layers * self.hidden_size}

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fresh LSTM weights; the output starts small, so that the first updates are near zero."""
        generator = torch.Generator().manual_seed(seed)
        for cell in self.cells:
            assert isinstance(cell, LSTMCell)  # for the type checker
            cell.reset_parameters(generator)
        deviation = self.hidden_size**-0.5
        truncated_normal_(self.output_weight, deviation, generator)
        self.output_bias.zero_()

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        """One step for every coordinate, as :meth:`UpdateRule.forward`. The result does not depend on ``step``."""
        signal = log_sign(grad, self.p)
        hidden_layers, cell_layers = [], []
        previous = zip(
            self.cells,
            state["hidden"].to(grad.dtype).split(self.hidden_size),
            state["cell"].to(grad.dtype).split(self.hidden_size),
            strict=True,
        )
        for lstm, hidden, cell in previous:
            signal, cell = lstm(signal, hidden, cell)
            hidden_layers.append(signal)
            cell_layers.append(cell)
        output = linear(self.output_weight, signal) + per_feature(self.output_bias, grad)
        update = self.output_scale * output[0]
        return update, {"hidden": torch.cat(hidden_layers), "cell": torch.cat(cell_layers)}
