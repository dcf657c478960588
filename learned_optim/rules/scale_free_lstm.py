"""A small LSTM over scale-free gradient statistics that starts meta-training at Adam."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from learned_optim.rules.base import RuleSettings, RuleState, UpdateRule, linear, per_feature
from learned_optim.rules.lstm import LSTMCell
from learned_optim.rules.moments import (
    EPSILON,
    clamped_grad_and_step,
    moving_averages,
)

SECOND_MOMENT_DECAYS = (0.95, 0.999)  # fast and slow; Adam's is the slow one
TIME_SCALES = (30.0, 300.0, 3000.0)  # steps after which tanh(step / scale) saturates
ADAM_MOMENTUM = 0.9  # the momentum whose direction the untrained rule follows
LOG_SCALE_BOUND = 6.0  # the learned factor on the rate stays within exp(-6) ... exp(6)
LOG_SCALE_SLOPE = 3.0  # d log(factor) / d output at zero: reaches the bound with weights of order one


class ScaleFreeLSTM(UpdateRule):
    """One-layer coordinatewise LSTM that steers a mixture of momenta.

    Momenta ``m_k`` at several time scales and two second moments ``v``, all bias-corrected as in Adam, give the
    *directions* ``d_k = m_k / sqrt(v_slow + eps^2)`` and ``d_g = grad / sqrt(v_fast + eps^2)``: invariant to the scale
    of the loss. The LSTM reads the directions, ``log sqrt(v_fast / v_slow)`` and ``tanh(step / time scale)``; from its
    outputs ``c`` and ``s``

        ``update = -rate * exp(bounded(s)) * (d_adam + sum_k c_k d_k)``.

    Every term is proportional to a direction, so a coordinate whose gradient has always been zero never moves. The
    output layer starts at zero: the untrained rule *is* Adam with learning rate ``rate``.

    Args:
        hidden_size: units of the LSTM.
        momentum_decays: decay rates of the momenta; one of them must be 0.9.
        rate: learning rate of the Adam that meta-training starts from.

    Raises:
        ValueError: a size is less than 1, a decay outside [0, 1), 0.9 missing, or ``rate`` not positive.
    """

    name = "scale-free-lstm"
    recurrent_dtype = torch.bfloat16  # 48 bytes a parameter in all with 6 units and 4 momenta

    def __init__(
        self,
        hidden_size: int = 6,
        momentum_decays: tuple[float, ...] = (0.5, 0.9, 0.99, 0.999),
        rate: float = 3e-3,
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {hidden_size}")
        if not all(0 <= decay < 1 for decay in momentum_decays) or ADAM_MOMENTUM not in momentum_decays:
            raise ValueError(f"momentum_decays must lie in [0, 1) and contain {ADAM_MOMENTUM}, got {momentum_decays}")
        if not 0 < rate < math.inf:
            raise ValueError(f"rate must be positive, got {rate}")
        self.hidden_size, self.momentum_decays, self.rate = hidden_size, tuple(momentum_decays), rate
        directions = len(momentum_decays) + 1
        self.cell = LSTMCell(directions + 1, hidden_size)
        self.step_weight = nn.Parameter(torch.zeros(4 * hidden_size, len(TIME_SCALES)))
        self.output_weight = nn.Parameter(torch.zeros(directions + 1, hidden_size))
        self.output_bias = nn.Parameter(torch.zeros(directions + 1))
        self.reset_parameters(seed=0)

    @property
    def settings(self) -> RuleSettings:
        """Keyword arguments that build this architecture again."""
        return {"hidden_size": self.hidden_size, "momentum_decays": self.momentum_decays, "rate": self.rate}

    @property
    def state_features(self) -> Mapping[str, int]:
        """Momenta, fast and slow second moment, and the LSTM's state."""
        return {
            "momentum": len(self.momentum_decays),
            "second_moment": len(SECOND_MOMENT_DECAYS),
            "hidden": self.hidden_size,
            "cell": self.hidden_size,
        }

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fresh LSTM weights; output layer zero, which makes the rule Adam."""
        generator = torch.Generator().manual_seed(seed)
        self.cell.reset_parameters(generator)
        for parameter in (self.step_weight, self.output_weight, self.output_bias):
            parameter.zero_()

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        """One step for every coordinate; arguments and results are those of :meth:`UpdateRule.forward`."""
        grad, step = clamped_grad_and_step(grad, step)
        momentum, corrected_momentum = moving_averages(grad, state["momentum"], self.momentum_decays, step)
        second_moment, corrected_second_moment = moving_averages(
            grad.square(), state["second_moment"], SECOND_MOMENT_DECAYS, step
        )
        fast_rms, slow_rms = (corrected_second_moment + EPSILON**2).sqrt()  # inside, so that the root has a derivative
        directions = torch.cat([corrected_momentum / slow_rms, (grad / fast_rms)[None]])
        rms_ratio = (fast_rms / slow_rms).log()[None]
        step_features = torch.stack([(step / scale).tanh() for scale in TIME_SCALES])
        hidden, cell = self.cell(
            torch.cat([directions, rms_ratio]),
            state["hidden"].to(grad.dtype),
            state["cell"].to(grad.dtype),
            context=linear(self.step_weight, step_features),
        )
        output = linear(self.output_weight, hidden) + per_feature(self.output_bias, grad)
        coefficients, scale = output[:-1], output[-1]
        direction = directions[self.momentum_decays.index(ADAM_MOMENTUM)] + (coefficients * directions).sum(0)
        log_scale = LOG_SCALE_BOUND * (scale * (LOG_SCALE_SLOPE / LOG_SCALE_BOUND)).tanh()
        update = -self.rate * log_scale.exp() * direction
        return update, {"momentum": momentum, "second_moment": second_moment, "hidden": hidden, "cell": cell}
