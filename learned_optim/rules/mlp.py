"""The per-parameter MLP of Metz et al. 2019, on coordinatewise inputs.

"Understanding and correcting pathologies in the training of learned optimizers".
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from learned_optim.rules.base import RuleSettings, RuleState, UpdateRule, linear, per_feature, truncated_normal_
from learned_optim.rules.moments import EPSILON, clamped_grad_and_step, moving_averages

DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)  # of the momenta and of the second moments, as in the authors' code
TIME_SCALES = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0, 300_000.0)  # steps; as in the authors' code
GRADIENT_DECAY = DECAYS.index(0.99)  # the second moment that normalises the gradient: its ratio stays within 10
UNTRAINED_MOMENTUM = DECAYS.index(0.9)  # the momentum whose direction the untrained rule follows
DIRECTIONS = len(DECAYS) + 1
FEATURES = DIRECTIONS + len(DECAYS) - 1


class MLP(UpdateRule):
    """One hidden layer on momenta over the roots of second moments, at five time scales.

    Momenta ``m_k`` and second moments ``v_k`` of decays .5, .9, .99, .999, .9999, both bias-corrected, give the
    *directions* ``x_k = m_k / sqrt(v_k + eps^2)``, which lie in [-1, 1], and ``x_g = grad / sqrt(v_.99 + eps^2)``.
    A hidden layer of rectified linear units reads them, the log ratios of the root mean squares at neighbouring time
    scales, and ``tanh(step / time scale - 1)`` at nine time scales. Its outputs are coefficients ``c`` and a magnitude
    ``a``, which make a direction ``d`` and

        ``update = -rate * exp(magnitude_rate * a) * d,   d = x_.9 + sum_k c_k x_k + c_g x_g``.

    Architecture, inputs, time scales and step are those of the paper and of its authors' code but for what follows.

    - The paper divides each input by its root mean square over the tensor. Here every input is free of scale by itself:
      momenta are read over the root of their second moment only (which the paper has too), the gradient likewise, and
      root mean squares and their inverses as log ratios. So the rule stays coordinatewise: no reduction over tensors,
      and sharding changes nothing. It cannot see how large a coordinate's gradient is beside those of its neighbours.
    - The paper's ``d`` is an output of its own. Here outputs weigh directions: any smooth function that vanishes with
      the directions can be written so. A coordinate whose gradient has always been zero never moves.
    - The value of the parameter is no input: an update depends on the coordinate's own history alone.
    - Averages are bias-corrected, and the output layer starts at zero: the untrained rule is Adam with both decays 0.9
      and learning rate ``rate``. The paper's starts at random weights.

    State: 40 bytes a parameter. *When not to use it:* no weights are shipped. Those of the experiment in
    ``docs/meta-training.md`` serve one small convolutional network; for training models use the default rule.

    Args:
        hidden_size: units of the hidden layer (paper: 32).
        rate: length of a step along a direction of 1 (paper: 0.001).
        magnitude_rate: factor on the magnitude in the exponent (paper: 0.001).

    Raises:
        ValueError: ``hidden_size`` is less than 1, or a rate is not positive.
    """

    name = "mlp"
    recurrent_state = frozenset()

    def __init__(self, hidden_size: int = 32, rate: float = 1e-3, magnitude_rate: float = 1e-3) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {hidden_size}")
        if not (0 < rate < math.inf and 0 < magnitude_rate < math.inf):
            raise ValueError(f"rate and magnitude_rate must be positive, got {rate} and {magnitude_rate}")
        self.hidden_size, self.rate, self.magnitude_rate = hidden_size, rate, magnitude_rate
        self.hidden_weight = nn.Parameter(torch.zeros(hidden_size, FEATURES))
        self.step_weight = nn.Parameter(torch.zeros(hidden_size, len(TIME_SCALES)))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden_size))
        self.output_weight = nn.Parameter(torch.zeros(DIRECTIONS + 1, hidden_size))
        self.output_bias = nn.Parameter(torch.zeros(DIRECTIONS + 1))
        self.reset_parameters(seed=0)

    @property
    def settings(self) -> RuleSettings:
        """Keyword arguments that build this architecture again."""
        return {"hidden_size": self.hidden_size, "rate": self.rate, "magnitude_rate": self.magnitude_rate}

    @property
    def state_features(self) -> Mapping[str, int]:
        """Momenta and second moments, one of each for each decay."""
        return {"momentum": len(DECAYS), "second_moment": len(DECAYS)}

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fresh hidden layer; output layer zero, which makes the rule Adam."""
        generator = torch.Generator().manual_seed(seed)
        deviation = (FEATURES + len(TIME_SCALES)) ** -0.5
        truncated_normal_(self.hidden_weight, deviation, generator)
        truncated_normal_(self.step_weight, deviation, generator)
        for parameter in (self.hidden_bias, self.output_weight, self.output_bias):
            parameter.zero_()

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        """One step for every coordinate; arguments and results are those of :meth:`UpdateRule.forward`."""
        grad, step = clamped_grad_and_step(grad, step)
        momentum, corrected_momentum = moving_averages(grad, state["momentum"], DECAYS, step)
        second_moment, corrected_second_moment = moving_averages(grad.square(), state["second_moment"], DECAYS, step)
        rms = (corrected_second_moment + EPSILON**2).sqrt()  # inside, so that the root has a derivative
        directions = torch.cat([corrected_momentum / rms, (grad / rms[GRADIENT_DECAY])[None]])
        signals = torch.cat([directions, (rms[:-1] / rms[1:]).log()])
        step_features = torch.stack([(step / scale - 1).tanh() for scale in TIME_SCALES])
        offset = per_feature(self.hidden_bias, grad) + linear(self.step_weight, step_features)
        hidden = (linear(self.hidden_weight, signals) + offset).relu()
        output = linear(self.output_weight, hidden) + per_feature(self.output_bias, grad)
        direction = directions[UNTRAINED_MOMENTUM] + (output[:-1] * directions).sum(0)
        update = -self.rate * (self.magnitude_rate * output[-1]).exp() * direction
        return update, {"momentum": momentum, "second_moment": second_moment}
