"""A small LSTM that steers a schedule-free optimizer with a learning rate of each coordinate's own."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from learned_optim.rules.base import (
    NO_CONDITIONS,
    Conditions,
    RuleSettings,
    RuleState,
    UpdateRule,
    linear,
    per_feature,
    truncated_normal_,
)
from learned_optim.rules.lstm import LSTMCell
from learned_optim.rules.moments import (
    EPSILON,
    clamped_grad_and_step,
    moving_averages,
)

MOMENTUM_DECAYS = (0.9, 0.99)  # the first is that of the hypergradient too
RECENT = 0.9  # decay of the second moment that normalises: short, so that gradients may shrink quickly
TIME_SCALES = (30.0, 300.0, 3000.0)  # steps after which tanh(step / scale) saturates
LARGEST_DIRECTION = 3.0  # a gradient this many times its root mean square counts as so large
GAIN = 0.2  # change of the log rate for a gradient that agrees fully with those before, untrained
FORGETTING = 0.002  # of the log rate in a step, so that agreement by chance does not add up
HIGHEST = 4.0  # log rate: in smooth trainings agreement would let it grow until they spike
OUTLIER = 10.0  # a gradient counts at most so many times the recent root mean square in that of all
SHRINKING = 0.5  # power of the ratio of recent gradients to those of the whole training, if below 1, in the rate
DECAY = 2e-4  # of a matrix in a step whose rate has no factor
DECAY_OF_LATEST = 1e-3  # the same without averaging: where the target moves, more is to be forgotten
WARMUP = 50.0  # steps over which the rate rises to its value
RECENCY = 0.5  # log of how many times the share of the latest step in the mean exceeds 1 / t, untrained
FAST_SHARE = 0.1  # share of the fast sequence z in the parameters, 1 - beta: recommended by Defazio et al. 2024
ANNEALED_PART = 0.5  # part of the training over which the rate falls to zero, where its length is known
FAST_SHARE_OF_KNOWN_LENGTH = 0.2  # the share where the length is known: a rate that falls needs less averaging
FACTOR_BOUND = 6.0  # every learned factor stays within exp(-6) ... exp(6)
RATE_SLOPE, GAIN_SLOPE, RECENCY_SLOPE = 3.0, 2.0, 2.0  # d log(factor) / d output: the bound is reached by weights of 1
RELATIVE_RATE = 92.0  # weights of a matrix with up to 53 inputs, drawn as PyTorch draws them, have the full rate
NEARLY_ZERO = 2e-3  # of the size that PyTorch draws weights in: about there, and below, they do not show their size
OTHER_SIGNALS = 4  # agreement, ratio of root mean squares, log rate, displacement
AGREEMENT = 1 + len(MOMENTUM_DECAYS)  # place among the signals, after direction and momenta
LSTM_INPUTS = AGREEMENT + OTHER_SIGNALS  # with the direction: what the LSTM reads, but for its own state
OUTPUTS = 3


class ScheduleFreeLSTM(UpdateRule):
    """One-layer coordinatewise LSTM that mixes directions and adapts the rate of a schedule-free optimizer.

    The gradient over the root mean square of recent ones, ``d = g / rms``, cut at 3, is free of the loss's scale. Every
    coordinate has a log rate ``l`` that goes up while gradients agree and down while they alternate, a hypergradient
    (Almeida et al. 1999, Baydin et al. 2018). The LSTM's outputs ``s``, ``k`` and ``q`` say how far to go beyond it,
    how fast it changes, and how long the past is remembered. With ``bounded(v) = 6 tanh(v / 6)`` and ``rms_of_all``
    the root mean square of all gradients since the first

        ``agreement = d * (momentum of the step before) / rms``

        ``l <- 0.998 l + 0.2 exp(bounded(2 k)) agreement``, within -6 ... 4

        ``shrunk = min(rms / rms_of_all, 1)``

        ``f = lr * min(t / 50, 1) * exp(bounded(l + 0.5 log(shrunk) + 3 s))``

        ``move = -rate * f * d`` .

    Where gradients have become smaller than they were, less is left to be gained, and steps shorten with the root of
    the ratio.

    The move is that of the fast sequence z of a schedule-free optimizer (Defazio et al. 2024): with x a mean of all z
    so far, the parameter is ``y = 0.1 z + 0.9 x``. Averaging does what a falling rate does elsewhere, without knowing
    when training ends. The latest z has a share of ``w`` in the mean, a multiple of 1 / t; what is kept is
    ``displacement = z - x`` alone:

        ``w = 1 / (1 + (t - 1) exp(-0.5 - bounded(2 q)))``, ``a = displacement + move`` ,

        ``update = 0.1 move + 0.9 w a - 2e-4 shrunk f d^2 p``, ``displacement <- (1 - w) a`` .

    The last term of the update is a decay of weights. It goes with the coordinate's own rate, so that what hardly moves
    is not drawn to zero, and it ends where gradients vanish; ``p`` is the parameter, for vectors zero.

    In a training of known length, f falls linearly to zero over the second half, and the parameter is
    ``0.2 z + 0.8 x``. Without averaging, it is z, and decays five times as fast. With a learning rate ``lr`` below 1,
    less has been learned from what a step did: the agreement counts ``lr`` times, and l forgets as much less.

    All this is multiplied by a factor for each tensor of two or more dimensions. A step of every weight by ``rate`` in
    its own best direction changes what a unit computes in proportion to its number of inputs, so that wide layers bear
    less (Yang et al. 2022, Tensor Programs V, table 3: the rate of Adam falls as 1 / inputs). With ``initial_rms`` of
    the weights before training, ``1 / sqrt(inputs)`` or so, the factor is

        ``min(1, 92 initial_rms / sqrt(inputs))`` .

    The LSTM reads d, momenta over rms (decays 0.9 and 0.99), agreement, ``log(rms / rms_of_all)``, ``l / 6``, how far
    z has left x in terms of the rate, ``softsign(displacement / (rate exp(l) t))``, and ``tanh(t / time scale)``. Moves
    and decay are zero where gradients are, so a coordinate whose gradient has always been zero never moves. The output
    layer starts at zero: the untrained rule is schedule-free RMSprop with hypergradients.

    Args:
        hidden_size: units of the LSTM.
        rate: learning rate that meta-training starts from.

    Raises:
        ValueError: a size is less than 1, or ``rate`` not positive.
    """

    name = "schedule-free-lstm"
    recurrent_dtype = torch.bfloat16  # 48 bytes a parameter in all with 6 units
    uses_conditions = True

    def __init__(self, hidden_size: int = 6, rate: float = 0.02) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {hidden_size}")
        if not 0 < rate < math.inf:
            raise ValueError(f"rate must be positive, got {rate}")
        self.hidden_size, self.rate = hidden_size, rate
        self.cell = LSTMCell(LSTM_INPUTS, hidden_size)
        self.step_weight = nn.Parameter(torch.zeros(4 * hidden_size, len(TIME_SCALES)))
        self.output_weight = nn.Parameter(torch.zeros(OUTPUTS, hidden_size))
        self.output_bias = nn.Parameter(torch.zeros(OUTPUTS))
        self.reset_parameters(seed=0)

    @property
    def settings(self) -> RuleSettings:
        """Keyword arguments that build this architecture again."""
        return {"hidden_size": self.hidden_size, "rate": self.rate}

    @property
    def state_features(self) -> Mapping[str, int]:
        """Momenta, fast and slow second moment, what averaging and hypergradient need, and the LSTM's state."""
        return {
            "momentum": len(MOMENTUM_DECAYS),
            "second_moment": 2,  # of recent gradients, and of all
            "displacement": 1,
            "log_rate": 1,
            "hidden": self.hidden_size,
            "cell": self.hidden_size,
        }

    def tensor_scale(self, shape: Sequence[int], initial_rms: Tensor) -> Tensor:
        """The factor on the updates of a matrix: less than 1 for wide layers and for small weights.

        ``min(1, 92 initial_rms / sqrt(inputs))``, explained in the description of the class.

        Weights of nearly zero do not show what size they will have, and count as if :class:`torch.nn.Linear` had drawn
        them. There is no jump in between.
        """
        while len(shape) > 2 and shape[0] == 1:  # a dimension for the batch, as position embeddings have
            shape = shape[1:]
        inputs = max(1, math.prod(shape[1:]))
        as_drawn = (3 * inputs) ** -0.5
        share = initial_rms / as_drawn
        scale: Tensor = RELATIVE_RATE * inputs**-0.5 * as_drawn * (share + 1 / (1 + (share / NEARLY_ZERO) ** 4))
        return scale.clamp(max=1.0)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fresh LSTM weights; output layer zero."""
        generator = torch.Generator().manual_seed(seed)
        self.cell.reset_parameters(generator)
        truncated_normal_(self.step_weight, len(TIME_SCALES) ** -0.5, generator)
        self.output_weight.zero_()
        self.output_bias.zero_()

    def forward(
        self, grad: Tensor, state: RuleState, step: Tensor, conditions: Conditions = NO_CONDITIONS
    ) -> tuple[Tensor, RuleState]:
        """One step for every coordinate; arguments and results are those of :meth:`UpdateRule.forward`."""
        statistics = self._statistics(grad, state, step)
        hidden, cell = self.cell(
            statistics.signals,
            state["hidden"].to(grad.dtype),
            state["cell"].to(grad.dtype),
            context=linear(self.step_weight, step_features(statistics.step)),
        )
        outputs = linear(self.output_weight, hidden) + per_feature(self.output_bias, grad)
        update, moved = self._move(statistics, outputs, state, conditions)
        return update, moved | {"hidden": hidden, "cell": cell}

    def observe(
        self, grad: Tensor, state: RuleState, step: Tensor, conditions: Conditions = NO_CONDITIONS
    ) -> tuple[Tensor, RuleState]:
        """A step with outputs of zero: the signals for the LSTM, ``(signals, *coordinates)``, and the new state.

        Arguments are those of :meth:`forward`. The LSTM is not run, its own state stays.
        """
        statistics = self._statistics(grad, state, step)
        _, moved = self._move(statistics, grad.new_zeros((OUTPUTS, *[1] * grad.dim())), state, conditions)
        return statistics.signals, {**state, **moved}

    def outputs(self, signals: Tensor) -> Tensor:
        """Outputs of the LSTM for signals from the first step on: ``(T, signals, C)`` -> ``(T, outputs, C)``.

        Differentiable with respect to the weights. The outputs are s, k and q of the class, before slopes and bounds.
        """
        steps = torch.arange(1, len(signals) + 1, dtype=signals.dtype, device=signals.device)
        times = step_features(steps).T[..., None].expand(-1, -1, signals.shape[2])
        inputs = torch.cat([signals, times], 1).transpose(1, 2)
        lstm = nn.LSTM(inputs.shape[2], self.hidden_size, device="meta")  # its gates are in the order of ours
        weights = {
            "weight_ih_l0": torch.cat([self.cell.weight[:, :LSTM_INPUTS], self.step_weight], 1),
            "weight_hh_l0": self.cell.weight[:, LSTM_INPUTS:],
            "bias_ih_l0": self.cell.bias,
            "bias_hh_l0": torch.zeros_like(self.cell.bias),
        }
        hidden, _ = functional_call(lstm, weights, (inputs,))
        outputs: Tensor = (hidden @ self.output_weight.T + self.output_bias).transpose(1, 2)
        return outputs

    def _statistics(self, grad: Tensor, state: RuleState, step: Tensor) -> "Statistics":
        """The averages after this gradient, and the signals that follow from them."""
        grad, step = clamped_grad_and_step(grad, step)
        momentum, corrected_momentum = moving_averages(grad, state["momentum"], MOMENTUM_DECAYS, step)
        recent, corrected = moving_averages(grad.square(), state["second_moment"][:1], (RECENT,), step)
        before = state["second_moment"].to(grad.dtype)
        square = torch.where(before[:1] > 0, grad.square().minimum(OUTLIER**2 * before[:1]), grad.square())
        of_all = before[1:] + (square - before[1:]) / step
        rms, rms_of_all = (torch.cat([corrected, of_all]) + EPSILON**2).sqrt()  # inside: so the root has a derivative
        direction = (grad / rms).clamp(-LARGEST_DIRECTION, LARGEST_DIRECTION)
        earlier = state["momentum"][0].to(grad.dtype) / -torch.expm1(step * math.log(MOMENTUM_DECAYS[0]))
        agreement = direction * (earlier / rms)  # in this order nothing underflows
        log_rate, displacement = (state[entry][0].to(grad.dtype) for entry in ("log_rate", "displacement"))
        averaging = displacement / (self.rate * step) * (-log_rate).exp()
        others = [agreement, (rms / rms_of_all).log(), log_rate / FACTOR_BOUND, averaging / (1 + averaging.abs())]
        signals = torch.cat([direction[None], corrected_momentum / rms, torch.stack(others)])
        return Statistics(signals, momentum, torch.cat([recent, of_all]), step)

    def _move(
        self, statistics: "Statistics", outputs: Tensor, state: RuleState, conditions: Conditions
    ) -> tuple[Tensor, RuleState]:
        """The update, and the new state but for the LSTM's own."""
        step = statistics.step
        direction, agreement, log_ratio = (statistics.signals[row] for row in (0, AGREEMENT, AGREEMENT + 1))
        log_rate, displacement = (state[entry][0].to(direction.dtype) for entry in ("log_rate", "displacement"))
        scale, gain, recency = outputs
        gain = GAIN * bounded(GAIN_SLOPE * gain).exp()
        lr = conditions.lr * annealing(conditions.progress)
        gained, forgotten = clamped_to_1(conditions.lr) * gain * agreement, clamped_to_1(lr) * FORGETTING
        log_rate = ((1 - forgotten) * log_rate + gained).clamp(-FACTOR_BOUND, HIGHEST)
        shrunk = log_ratio.clamp(max=0.0)
        factor = bounded(log_rate + SHRINKING * shrunk + RATE_SLOPE * scale).exp()
        factor = lr * (step / WARMUP).clamp(max=1.0) * factor
        move = -self.rate * factor * direction
        ahead = displacement + move
        share = 1 / (1 + (step - 1) * (-RECENCY - bounded(RECENCY_SLOPE * recency)).exp())
        averaged = (1 - fast_share(conditions.progress)) * conditions.averaging
        strength = DECAY + (DECAY_OF_LATEST - DECAY) * (1 - conditions.averaging)
        # The square of the direction is 1 in the mean, and 0 where there is no gradient.
        decay = strength * shrunk.exp() * factor * direction.square()
        update = (1 - averaged) * move + averaged * share * ahead - decay * conditions.parameter
        return update, {
            "momentum": statistics.momentum,
            "second_moment": statistics.second_moment,
            "displacement": ((1 - share) * ahead)[None],
            "log_rate": log_rate[None],
        }


class Statistics(NamedTuple):
    """Statistics of the gradients of each coordinate, this step's included."""

    signals: Tensor
    """The inputs of the LSTM, ``(signals, *coordinates)``."""
    momentum: Tensor
    """Averages of gradients, the new entry of the state."""
    second_moment: Tensor
    """Averages of squared gradients, the new entry of the state."""
    step: Tensor
    """The step count in the dtype of the gradient, broadcastable to it."""


def step_features(step: Tensor) -> Tensor:
    """``tanh(step / time scale)``, ``(time scales, *step)``."""
    return torch.stack([(step / scale).tanh() for scale in TIME_SCALES])


def annealing(progress: Tensor | float) -> Tensor | float:
    """Factor on the rate: 1, then falling linearly to zero over the second half of a training of known length."""
    return clamped_to_1((1 - progress) / ANNEALED_PART)


def fast_share(progress: Tensor | float) -> Tensor | float:
    """The share of the fast sequence in the parameters; larger where the length of the training is known."""
    known = (progress > 0).to(progress.dtype) if isinstance(progress, Tensor) else float(progress > 0)
    return FAST_SHARE + (FAST_SHARE_OF_KNOWN_LENGTH - FAST_SHARE) * known


def clamped_to_1(value: Tensor | float) -> Tensor | float:
    """The smaller of the value and 1."""
    return value.clamp(max=1.0) if isinstance(value, Tensor) else min(value, 1.0)


def bounded(values: Tensor) -> Tensor:
    """A smooth bound: close to the values where they are small, and never beyond :data:`FACTOR_BOUND`."""
    return FACTOR_BOUND * (values / FACTOR_BOUND).tanh()
