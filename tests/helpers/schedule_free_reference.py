"""The oracle of the schedule-free LSTM and of the points of a schedule-free optimizer, in NumPy float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from helpers.reference import Array, affine, float64, lstm_step


class ScheduleFreeLSTMReference:
    """RMSprop with hypergradients inside a schedule-free optimizer, all three steered by one LSTM layer.

    For one coordinate with gradient g at step t = 1, 2, ...

        m_k    <- b_k m_k + (1 - b_k) g         b = .9, .99; mbefore is m_.9 before this line
        v      <- .9 v + .1 g^2
        V      <- V + (min(g^2, 100 v) - V) / t     v before the line above, if positive; the mean of all so far
        fast    = sqrt(v / (1 - .9^t) + eps^2),  all = sqrt(V + eps^2),  eps = 1e-12
        d       = cut(g / fast, 3),  e_k = cut(m_k / (1 - b_k^t) / fast, 3)
        A       = d mbefore / (1 - .9^t) / fast
        E       = D / (rate t exp(l)),  F = E / (1 + |E|)
        x       = [|d|, |e_1|, |e_2|, A, d e_2, log(fast / all), l / 6, |F|, d F]
        s       = [tanh(t / 30), tanh(t / 300), tanh(t / 3000), progress, 1 if progress > 0 else 0]
        h, c    = LSTM(W [x; h] + b + W_step s)      in steps 1, 5, 9, ...; in others they stay
        [z, k, q, r, n, u_1, u_2] = V h + b_out
        factors   K, Q, Y, N = exp(cut(2 k, 6)), exp(cut(2 q, 6)), exp(cut(2 r, 6)), exp(cut(2 n, 6))
        R       = lr min((1 - progress) / .5, 1)
        l      <- min(max((1 - .002 min(R, 1)) l + min(lr, 1) .2 K A, -6), 4)
        S       = min(fast / all, 1)
        f       = R min(t / 50, 1) exp(6 tanh((l + .5 log S + 3 z) / 6))
        move    = -rate f (d + tanh(u_1) e_1 + tanh(u_2) e_2), zero where d is
        w       = 1 / (1 + (t - 1) exp(-.5) Q)
        b       = 1 without averaging, else min(N (.2 where progress > 0, .1 elsewhere), 1)
        update  = b move + (1 - b) w (D + move) - min(2e-4 Y S f d^2, .1) p      without averaging 1e-3
        D      <- (1 - w) (D + move)

    where cut(x, y) is the number of [-y, y] that is nearest to x. D = z - x and l are the displacement between the two
    sequences of Defazio et al. (2024) and the logarithm of the coordinate's factor on the rate.

    Args:
        weight: (4H, 9 + H), columns [x; h], blocks of H rows: input, forget, candidate, output.
        bias: (4H,).
        step_weight: (4H, 5).
        output_weight: (7, H).
        output_bias: (7,).
        rate: learning rate of the untrained rule.

    Attributes:
        momentum: (2, *coordinates).
        second_moment: (2, *coordinates), of recent gradients, then of all.
        displacement, log_rate: (1, *coordinates).
        hidden, cell: (H, *coordinates).
        All are zero before the first step.
    """

    MOMENTUM_DECAYS = (0.9, 0.99)
    RECENT = 0.9
    TIME_SCALES = (30.0, 300.0, 3000.0)
    EPS = 1e-12
    LARGEST_DIRECTION = 3.0
    GAIN = 0.2
    FORGETTING = 0.002
    HIGHEST = 4.0
    OUTLIER = 10.0
    SHRINKING = 0.5
    DECAY = 2e-4
    DECAY_OF_LATEST = 1e-3
    WARMUP = 50
    RECENCY = 0.5
    FAST_SHARE = 0.1
    FALL = 0.5
    FAST_SHARE_OF_KNOWN_LENGTH = 0.2
    BOUND = 6.0
    RATE_SLOPE = 3.0
    SLOPE = 2.0
    LARGEST_DECAY = 0.1
    PERIOD = 4

    def __init__(
        self,
        weight: ArrayLike,
        bias: ArrayLike,
        step_weight: ArrayLike,
        output_weight: ArrayLike,
        output_bias: ArrayLike,
        rate: float = 0.02,
    ) -> None:
        self.weight = float64(weight)
        self.bias = float64(bias)
        self.step_weight = float64(step_weight)
        self.output_weight = float64(output_weight)
        self.output_bias = float64(output_bias)
        self.rate = rate
        self.steps_taken = 0
        self.momentum: Array = np.zeros(0)
        self.second_moment: Array = np.zeros(0)
        self.displacement: Array = np.zeros(0)
        self.log_rate: Array = np.zeros(0)
        self.hidden: Array = np.zeros(0)
        self.cell: Array = np.zeros(0)

    def step(
        self,
        grad: ArrayLike,
        parameter: ArrayLike = 0.0,
        lr: float = 1.0,
        progress: float = 0.0,
        averaging: float = 1.0,
    ) -> Array:
        """The update, to be added to the parameter, of its shape. The arguments are those of the rule's conditions."""
        grad = float64(grad)
        if self.steps_taken == 0:
            self.begin(grad.shape)
        self.steps_taken += 1
        t = self.steps_taken

        before = self.momentum[0]
        self.momentum = np.stack(
            [b * m + (1.0 - b) * grad for b, m in zip(self.MOMENTUM_DECAYS, self.momentum, strict=True)]
        )
        recent, of_all = self.second_moment
        square = np.where(recent > 0.0, np.minimum(grad**2, self.OUTLIER**2 * recent), grad**2)
        of_all = of_all + (square - of_all) / t
        recent = self.RECENT * recent + (1.0 - self.RECENT) * grad**2
        self.second_moment = np.stack([recent, of_all])
        fast = np.sqrt(recent / (1.0 - self.RECENT**t) + self.EPS**2)
        rms_of_all = np.sqrt(of_all + self.EPS**2)
        cut = self.LARGEST_DIRECTION
        direction = np.clip(grad / fast, -cut, cut)
        averaged = [
            np.clip(m / (1.0 - b**t) / fast, -cut, cut)
            for b, m in zip(self.MOMENTUM_DECAYS, self.momentum, strict=True)
        ]
        agreement = direction * before / (1.0 - self.MOMENTUM_DECAYS[0] ** t) / fast
        displacement, log_rate = self.displacement[0], self.log_rate[0]
        relative = displacement / (self.rate * t * np.exp(log_rate))
        relative = relative / (1.0 + np.abs(relative))

        signals = [np.abs(direction), *map(np.abs, averaged), agreement, direction * averaged[1]]
        signals += [np.log(fast / rms_of_all), log_rate / self.BOUND, np.abs(relative), direction * relative]
        scale, *factors, first, second = self.network(np.stack(signals), t, progress)
        gain, memory, decay, share = (np.exp(np.clip(self.SLOPE * out, -self.BOUND, self.BOUND)) for out in factors)

        rate = lr * min((1.0 - progress) / self.FALL, 1.0)
        log_rate = (1.0 - min(rate, 1.0) * self.FORGETTING) * log_rate + min(lr, 1.0) * self.GAIN * gain * agreement
        log_rate = np.clip(log_rate, -self.BOUND, self.HIGHEST)
        shrunk = np.minimum(fast / rms_of_all, 1.0)
        log_factor = self.bounded(log_rate + self.SHRINKING * np.log(shrunk) + self.RATE_SLOPE * scale)
        factor = rate * min(t / self.WARMUP, 1.0) * np.exp(log_factor)
        mixed = direction + np.tanh(first) * averaged[0] + np.tanh(second) * averaged[1]
        move = -self.rate * factor * np.where(direction == 0.0, 0.0, mixed)
        latest = 1.0 / (1.0 + (t - 1) * np.exp(-self.RECENCY) * memory)
        at_once = share * (self.FAST_SHARE_OF_KNOWN_LENGTH if progress > 0.0 else self.FAST_SHARE)
        at_once = np.minimum(at_once, 1.0) if averaging else 1.0
        update: Array = at_once * move + (1.0 - at_once) * latest * (displacement + move)
        strength = self.DECAY if averaging else self.DECAY_OF_LATEST
        decay = np.minimum(strength * decay * shrunk * factor * direction**2, self.LARGEST_DECAY)
        update = update - decay * float64(parameter)
        self.displacement = ((1.0 - latest) * (displacement + move))[np.newaxis]
        self.log_rate = log_rate[np.newaxis]
        return update

    def begin(self, coordinates: tuple[int, ...]) -> None:
        """The state before the first step."""
        units = self.output_weight.shape[1]
        self.momentum, self.second_moment = np.zeros((2, *coordinates)), np.zeros((2, *coordinates))
        self.displacement, self.log_rate = np.zeros((1, *coordinates)), np.zeros((1, *coordinates))
        self.hidden, self.cell = np.zeros((units, *coordinates)), np.zeros((units, *coordinates))

    def network(self, signals: Array, t: int, progress: float) -> Array:
        """The LSTM's outputs at step ``t``, ``(7, *coordinates)``, from its signals ``(signals, *coordinates)``."""
        coordinates = signals.shape[1:]
        if self.hidden.shape[1:] != coordinates:  # the state is that of a rule without units
            self.hidden = self.cell = np.zeros((self.output_weight.shape[1], *coordinates))
        if t % self.PERIOD == 1:
            uniform = np.array([*(np.tanh(t / scale) for scale in self.TIME_SCALES), progress, float(progress > 0.0)])
            inputs = np.concatenate([signals, self.hidden], axis=0)
            gates = affine(self.weight, inputs, self.bias + self.step_weight @ uniform)
            self.hidden, self.cell = lstm_step(gates, self.cell)
        return affine(self.output_weight, self.hidden, self.output_bias)

    def bounded(self, values: Array) -> Array:
        """A smooth bound: near ``values`` where these are small, never beyond ``BOUND``."""
        result: Array = self.BOUND * np.tanh(values / self.BOUND)
        return result


def schedule_free_points(
    gradient: Callable[[Array], Array],
    start: ArrayLike,
    moves: Callable[[Array, int], Array],
    steps: int,
    interpolation: float,
    share: Callable[[int], float],
) -> Array:
    """The points y at which gradients are taken, ``(steps + 1, *coordinates)`` (Defazio et al. 2024, equations 3-5).

        y_t = (1 - beta) z_t + beta x_t,  z_t+1 = z_t + move(gradient(y_t), t),  x_t+1 = (1 - w_t) x_t + w_t z_t+1

    ``moves`` takes the gradient and t = 1, 2 ...; ``share`` is w. In the paper it is 1 / t, and x the mean of z_2 to
    z_t+1.
    """
    fast = mean = float64(start)
    points = [fast]
    for t in range(1, steps + 1):
        fast = fast + moves(gradient(points[-1]), t)
        mean = (1.0 - share(t)) * mean + share(t) * fast
        points.append((1.0 - interpolation) * fast + interpolation * mean)
    return np.stack(points)
