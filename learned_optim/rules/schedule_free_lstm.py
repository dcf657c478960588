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
SLOPES = (3.0, 2.0, 2.0, 2.0, 2.0)  # of the log factors on rate, gain, recency, decay, share: weights of 1 reach bounds
LARGEST_DECAY = 0.1  # of a parameter in a step, so that no decay, however large, can overshoot
RELATIVE_RATE = 92.0  # weights of a matrix with up to 53 inputs, drawn as PyTorch draws them, have the full rate
NEARLY_ZERO = 2e-3  # of the size that PyTorch draws weights in: about there, and below, they do not show their size
LSTM_INPUTS = 9  # all of them are the same for the opposite gradients
UNIFORM_INPUTS = len(TIME_SCALES) + 2  # the same for all coordinates: time, and what is known of the length
OUTPUTS = len(SLOPES) + len(MOMENTUM_DECAYS)
PERIOD = 4  # steps from one step of the LSTM to the next


class ScheduleFreeLSTM(UpdateRule):
    """One-layer coordinatewise LSTM that steers direction, rate, averaging and decay of a schedule-free optimizer.

    The gradient over the root mean square of recent ones, ``d = g / rms``, cut at 3, is free of the loss's scale. Every
    coordinate has a log rate ``l`` that goes up while gradients agree and down while they alternate, a hypergradient
    (Almeida et al. 1999, Baydin et al. 2018). The LSTM has seven outputs. ``s`` says how far to go beyond ``l``, and
    ``u1`` and ``u2`` how much of the momenta joins the direction. The others become factors ``exp(2 output)``, within
    exp(-6) ... exp(6): ``K`` on how fast ``l`` changes, ``Q`` on how long the average remembers, ``Y`` on the decay of
    weights and ``N`` on the part of a move that is made at once. With ``bounded(v) = 6 tanh(v / 6)`` and
    ``rms_of_all`` the root mean square of all gradients since the first

        ``agreement = d * (momentum of the step before) / rms``

        ``l <- 0.998 l + 0.2 K agreement``, within -6 ... 4

        ``shrunk = min(rms / rms_of_all, 1)``

        ``f = lr * min(t / 50, 1) * exp(bounded(l + 0.5 log(shrunk) + 3 s))``

        ``move = -rate * f * (d + tanh(u1) momentum1 / rms + tanh(u2) momentum2 / rms)`` .

    Where gradients have become smaller than they were, less is left to be gained, and steps shorten with the root of
    the ratio.

    The move is that of the fast sequence z of a schedule-free optimizer (Defazio et al. 2024): with x a mean of all z
    so far, the parameter is ``y = 0.1 z + 0.9 x``. Averaging does what a falling rate does elsewhere, without knowing
    when training ends. The latest z has a share of ``w`` in the mean, a multiple of 1 / t; what is kept is
    ``displacement = z - x`` alone:

        ``w = 1 / (1 + (t - 1) exp(-0.5) Q)``, ``n = min(0.1 N, 1)``, ``a = displacement + move`` ,

        ``update = n move + (1 - n) w a - min(2e-4 Y shrunk f d^2, 0.1) p``, ``displacement <- (1 - w) a`` .

    The last term of the update is a decay of weights. It goes with the coordinate's own rate, so that what hardly moves
    is not drawn to zero, and it ends where gradients vanish; ``p`` is the parameter, for vectors zero. The move is zero
    where the gradient is, whatever the momenta are.

    In a training of known length, f falls linearly to zero over the second half, and the parameter is
    ``0.2 z + 0.8 x``. Without averaging, it is z, and decays five times as fast. With a learning rate ``lr`` below 1,
    less has been learned from what a step did: the agreement counts ``lr`` times, and l forgets as much less.

    All this is multiplied by a factor for each tensor of two or more dimensions. A step of every weight by ``rate`` in
    its own best direction changes what a unit computes in proportion to its number of inputs, so that wide layers bear
    less (Yang et al. 2022, Tensor Programs V, table 3: the rate of Adam falls as 1 / inputs). With ``initial_rms`` of
    the weights before training, ``1 / sqrt(inputs)`` or so, the factor is

        ``min(1, 92 initial_rms / sqrt(inputs))`` .

    At every fourth step the LSTM reads the absolute values of d and of the momenta over rms (decays 0.9 and 0.99, cut
    at 3), agreement, d times the slow momentum, ``log(rms / rms_of_all)``, ``l / 6``, and how far z has left x in terms
    of the rate, ``e = softsign(displacement / (rate exp(l) t))``, as ``|e|`` and ``d e``. All of these are the same for
    the opposite gradients, so that the step for the opposite gradients is the opposite step. It also reads
    ``tanh(t / time scale)``, the fraction of the training that is done, and whether that is known. The outputs stay
    until it runs again. The output layer starts at zero: the untrained rule is schedule-free RMSprop with
    hypergradients.

    Without units there is no LSTM, and the outputs are constants, the biases of the output layer. :meth:`pruned` gives
    such a rule where the output layer's weights are all zero.

    Args:
        hidden_size: units of the LSTM; 0: none.
        rate: learning rate that meta-training starts from.

    Raises:
        ValueError: ``hidden_size`` is negative, or ``rate`` not positive.
    """

    name = "schedule-free-lstm"
    recurrent_dtype = torch.bfloat16  # 40 bytes a parameter in all with 4 units
    uses_conditions = True

    def __init__(self, hidden_size: int = 4, rate: float = 0.02) -> None:
        super().__init__()
        if hidden_size < 0:
            raise ValueError(f"hidden_size must be at least 0, got {hidden_size}")
        if not 0 < rate < math.inf:
            raise ValueError(f"rate must be positive, got {rate}")
        self.hidden_size, self.rate = hidden_size, rate
        if hidden_size:
            self.cell = LSTMCell(LSTM_INPUTS, hidden_size)
            self.step_weight = nn.Parameter(torch.zeros(4 * hidden_size, UNIFORM_INPUTS))
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
        statistics = {
            "momentum": len(MOMENTUM_DECAYS),
            "second_moment": 2,  # of recent gradients, and of all
            "displacement": 1,
            "log_rate": 1,
        }
        return statistics | ({"hidden": self.hidden_size, "cell": self.hidden_size} if self.hidden_size else {})

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
        if self.hidden_size:
            self.cell.reset_parameters(generator)
            truncated_normal_(self.step_weight, UNIFORM_INPUTS**-0.5, generator)
            self.output_weight.zero_()
        self.output_bias.zero_()

    @torch.no_grad()
    def pruned(self) -> "ScheduleFreeLSTM":
        """Without units, if the output layer gives them no weight: the same updates, cheaper, and a smaller state."""
        is_plain = type(self) is ScheduleFreeLSTM  # another class may have another use for the LSTM
        if not is_plain or not self.hidden_size or self.output_weight.count_nonzero():
            return self
        rule = ScheduleFreeLSTM(0, self.rate).to(self.output_bias).requires_grad_(self.output_bias.requires_grad)
        rule.output_bias.copy_(self.output_bias)
        return rule

    def forward(
        self, grad: Tensor, state: RuleState, step: Tensor, conditions: Conditions = NO_CONDITIONS
    ) -> tuple[Tensor, RuleState]:
        """One step for every coordinate; arguments and results are those of :meth:`UpdateRule.forward`."""
        statistics = self._statistics(grad, state, step)
        outputs, lstm = per_feature(self.output_bias, grad), {}
        if self.hidden_size:
            before = [state[entry].to(grad.dtype) for entry in ("hidden", "cell")]
            uniform = uniform_inputs(statistics.step, conditions.progress)
            after = self.cell(statistics.signals, *before, context=linear(self.step_weight, uniform))
            due = step % PERIOD == 1
            hidden, cell = (torch.where(due, new, old) for new, old in zip(after, before, strict=True))
            outputs, lstm = linear(self.output_weight, hidden) + outputs, {"hidden": hidden, "cell": cell}
        update, moved = self._move(statistics, outputs, state, conditions)
        return update, moved | lstm

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

        Differentiable with respect to the weights. The outputs are those of the class, before slopes and bounds, in a
        training whose length is not known.
        """
        if not self.hidden_size:
            return self.output_bias[:, None].expand(len(signals), -1, signals.shape[2])
        steps = torch.arange(1, len(signals) + 1, PERIOD, dtype=signals.dtype, device=signals.device)
        uniform = uniform_inputs(steps, 0.0).T[..., None].expand(-1, -1, signals.shape[2])
        inputs = torch.cat([signals[::PERIOD], uniform], 1).transpose(1, 2)
        lstm = nn.LSTM(inputs.shape[2], self.hidden_size, device="meta")  # its gates are in the order of ours
        weights = {
            "weight_ih_l0": torch.cat([self.cell.weight[:, :LSTM_INPUTS], self.step_weight], 1),
            "weight_hh_l0": self.cell.weight[:, LSTM_INPUTS:],
            "bias_ih_l0": self.cell.bias,
            "bias_hh_l0": torch.zeros_like(self.cell.bias),
        }
        hidden, _ = functional_call(lstm, weights, (inputs,))
        outputs: Tensor = (hidden @ self.output_weight.T + self.output_bias).transpose(1, 2)
        return outputs.repeat_interleave(PERIOD, 0)[: len(signals)]

    def _statistics(self, grad: Tensor, state: RuleState, step: Tensor) -> "Statistics":
        """The averages after this gradient, and what follows from them."""
        grad, step = clamped_grad_and_step(grad, step)
        momentum, corrected_momentum = moving_averages(grad, state["momentum"], MOMENTUM_DECAYS, step)
        recent, corrected = moving_averages(grad.square(), state["second_moment"][:1], (RECENT,), step)
        before = state["second_moment"].to(grad.dtype)
        square = torch.where(before[:1] > 0, grad.square().minimum(OUTLIER**2 * before[:1]), grad.square())
        of_all = before[1:] + (square - before[1:]) / step
        rms, rms_of_all = (torch.cat([corrected, of_all]) + EPSILON**2).sqrt()  # inside: so the root has a derivative
        direction, first, second = (
            cut(values / rms) for values in (grad, corrected_momentum[0], corrected_momentum[1])
        )
        earlier = state["momentum"][0].to(grad.dtype) / -torch.expm1(step * math.log(MOMENTUM_DECAYS[0]))
        agreement = direction * (earlier / rms)  # in this order nothing underflows
        ratio = rms / rms_of_all
        log_rate, displacement = (state[entry][0].to(grad.dtype) for entry in ("log_rate", "displacement"))
        ahead = displacement / (self.rate * step) * (-log_rate).exp()
        ahead = ahead / (1 + ahead.abs())
        signals = [direction.abs(), first.abs(), second.abs(), agreement, direction * second]
        signals += [ratio.log(), log_rate / FACTOR_BOUND, ahead.abs(), direction * ahead]
        return Statistics(
            signals=torch.stack(signals),
            direction=direction,
            momenta=(first, second),
            agreement=agreement,
            ratio=ratio,
            momentum=momentum,
            second_moment=torch.cat([recent, of_all]),
            step=step,
        )

    def _move(
        self, statistics: "Statistics", outputs: Tensor, state: RuleState, conditions: Conditions
    ) -> tuple[Tensor, RuleState]:
        """The update, and the new state but for the LSTM's own."""
        step, direction = statistics.step, statistics.direction
        log_rate, displacement = (state[entry][0].to(direction.dtype) for entry in ("log_rate", "displacement"))
        logs = [slope * output for slope, output in zip(SLOPES, outputs[: len(SLOPES)], strict=True)]
        gain, memory, decay, share = (log.clamp(-FACTOR_BOUND, FACTOR_BOUND).exp() for log in logs[1:])
        lr = conditions.lr * annealing(conditions.progress)
        gained = clamped_to_1(conditions.lr) * GAIN * gain * statistics.agreement
        log_rate = ((1 - clamped_to_1(lr) * FORGETTING) * log_rate + gained).clamp(-FACTOR_BOUND, HIGHEST)
        shrunk = statistics.ratio.clamp(max=1.0)
        factor = bounded(log_rate + SHRINKING * shrunk.log() + logs[0]).exp()
        factor = lr * (step / WARMUP).clamp(max=1.0) * factor
        mixed = direction
        for output, momentum in zip(outputs[len(SLOPES) :], statistics.momenta, strict=True):
            mixed = mixed + output.tanh() * momentum
        move = -self.rate * factor * torch.where(direction == 0, direction, mixed)
        ahead = displacement + move
        latest = 1 / (1 + (step - 1) * math.exp(-RECENCY) * memory)  # its weight in the mean
        at_once = clamped_to_1(fast_share(conditions.progress) * share)
        averaged = (1 - at_once) * conditions.averaging
        strength = DECAY + (DECAY_OF_LATEST - DECAY) * (1 - conditions.averaging)
        # The square of the direction is 1 in the mean, and 0 where there is no gradient.
        decay = strength * decay * shrunk * factor * direction.square()
        update = (1 - averaged) * move + averaged * latest * ahead
        update = update - decay.clamp(max=LARGEST_DECAY) * conditions.parameter
        return update, {
            "momentum": statistics.momentum,
            "second_moment": statistics.second_moment,
            "displacement": ((1 - latest) * ahead)[None],
            "log_rate": log_rate[None],
        }


class Statistics(NamedTuple):
    """Statistics of the gradients of each coordinate, this step's included."""

    signals: Tensor
    """The inputs of the LSTM, ``(signals, *coordinates)``."""
    direction: Tensor
    """The gradient over its recent root mean square, cut."""
    momenta: tuple[Tensor, Tensor]
    """The averages of gradients over the same, cut."""
    agreement: Tensor
    """Direction times the average of the gradients before, over the same."""
    ratio: Tensor
    """The recent root mean square over that of all gradients."""
    momentum: Tensor
    """Averages of gradients, the new entry of the state."""
    second_moment: Tensor
    """Averages of squared gradients, the new entry of the state."""
    step: Tensor
    """The step count in the dtype of the gradient, broadcastable to it."""


def cut(values: Tensor) -> Tensor:
    """The values, cut at :data:`LARGEST_DIRECTION`."""
    return values.clamp(-LARGEST_DIRECTION, LARGEST_DIRECTION)


def uniform_inputs(step: Tensor, progress: Tensor | float) -> Tensor:
    """What the LSTM reads that is the same for all coordinates, ``(inputs, *step)``.

    ``tanh(step / time scale)``, the fraction of the training that is done, and whether its length is known.
    """
    done = progress.to(step.dtype) if isinstance(progress, Tensor) else step.new_tensor(progress)
    known = (done > 0).to(step.dtype)
    times = ((step / scale).tanh() for scale in TIME_SCALES)
    return torch.stack([*times, done.expand_as(step), known.expand_as(step)])


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
