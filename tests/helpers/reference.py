"""The oracle: learned optimizers in NumPy float64, written from their equations and not from the package.

Clarity decides here, not speed. Each equation reads as it would for one coordinate, with its quantities (features,
hidden units) along the leading axis; NumPy carries the coordinates along the trailing axes, where nothing mixes them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def _float64(values: ArrayLike) -> Array:
    return np.array(values, dtype=np.float64)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), through tanh so that no exponential overflows."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def affine(weight: Array, x: Array, bias: Array) -> Array:
    """W x + b for each coordinate: (rows, features), (features, *coordinates) and (rows,) give (rows, *coordinates)."""
    product = np.tensordot(weight, x, axes=(1, 0))
    return product + bias.reshape(-1, *([1] * (x.ndim - 1)))


def lstm_step(gates: Array, cell: Array) -> tuple[Array, Array]:
    """Hidden and cell state after one LSTM step.

    Args:
        gates: pre-activations, (4H, *coordinates), in blocks of H: input, forget, candidate, output.
        cell: cell state before the step, (H, *coordinates).
    """
    input_gate, forget_gate, candidate, output_gate = np.split(gates, 4, axis=0)
    cell = sigmoid(forget_gate) * cell + sigmoid(input_gate) * np.tanh(candidate)
    hidden = sigmoid(output_gate) * np.tanh(cell)
    return hidden, cell


def log_and_sign(grad: Array, p: float) -> Array:
    """The two features of a gradient in Andrychowicz et al. (2016), appendix A: (2, *coordinates).

    (log|g| / p, sign g) where |g| >= exp(-p), and (-1, exp(p) g) below.
    """
    features = np.empty((2, *grad.shape))
    for index in np.ndindex(grad.shape):
        g = grad[index]
        if abs(g) >= np.exp(-p):
            features[(0, *index)] = np.log(abs(g)) / p
            features[(1, *index)] = np.sign(g)
        else:
            features[(0, *index)] = -1.0
            features[(1, *index)] = np.exp(p) * g
    return features


class LSTML2LReference:
    """Andrychowicz et al. (2016), section 2.1 and appendix A: a stack of LSTM layers on the preprocessed gradient.

    Args:
        cells: weight (4H, F + H) and bias (4H,) of each layer, bottom first; the weight's columns are [input; hidden].
        output_weight: (1, H).
        output_bias: (1,).
        p: the threshold exp(-p) of the preprocessing.
        output_scale: factor of the network's output.

    Attributes:
        hidden, cell: (layers * H, *coordinates), layer by layer; zero before the first step.
    """

    def __init__(
        self,
        cells: Sequence[tuple[ArrayLike, ArrayLike]],
        output_weight: ArrayLike,
        output_bias: ArrayLike,
        p: float = 10.0,
        output_scale: float = 0.1,
    ) -> None:
        self.cells = [(_float64(weight), _float64(bias)) for weight, bias in cells]
        self.output_weight = _float64(output_weight)
        self.output_bias = _float64(output_bias)
        self.p = p
        self.output_scale = output_scale
        self.steps_taken = 0
        self.hidden: Array = np.zeros(0)
        self.cell: Array = np.zeros(0)

    def step(self, grad: ArrayLike) -> Array:
        """The update, to be added to the parameter, of its shape: output_scale * (w_out . h_top + b_out)."""
        grad = _float64(grad)
        layers = len(self.cells)
        if self.steps_taken == 0:
            units = self.output_weight.shape[1]
            self.hidden = np.zeros((layers * units, *grad.shape))
            self.cell = np.zeros((layers * units, *grad.shape))
        self.steps_taken += 1

        signal = log_and_sign(grad, self.p)
        hiddens, new_cells = [], []
        for (weight, bias), hidden, cell in zip(
            self.cells, np.split(self.hidden, layers, axis=0), np.split(self.cell, layers, axis=0), strict=True
        ):
            gates = affine(weight, np.concatenate([signal, hidden], axis=0), bias)
            signal, cell = lstm_step(gates, cell)
            hiddens.append(signal)
            new_cells.append(cell)
        self.hidden = np.concatenate(hiddens, axis=0)
        self.cell = np.concatenate(new_cells, axis=0)
        output: Array = affine(self.output_weight, signal, self.output_bias)[0]
        return self.output_scale * output


class ScaleFreeLSTMReference:
    """One LSTM layer that mixes five normalised directions and scales the result, around Adam's direction.

    For one coordinate with gradient g at step t = 1, 2, ...

        m_k    <- b_k m_k + (1 - b_k) g         b = .5, .9, .99, .999
        v_j    <- a_j v_j + (1 - a_j) g^2       a = .95 (fast), .999 (slow)
        mhat_k  = m_k / (1 - b_k^t),  vhat_j = v_j / (1 - a_j^t)
        fast    = sqrt(vhat_fast + eps^2),  slow = sqrt(vhat_slow + eps^2),  eps = 1e-12
        d       = [mhat / slow (4), g / fast]
        x       = [d, log(fast / slow)]
        s       = [tanh(t / 30), tanh(t / 300), tanh(t / 3000)]
        h, c    = LSTM(W [x; h] + b + W_step s)
        [c_1 .. c_5, z] = V h + b_out
        update  = -rate exp(6 tanh(3 z / 6)) (d_.9 + sum_k c_k d_k)

    Args:
        weight: (4H, 6 + H), columns [x; h], blocks of H rows: input, forget, candidate, output.
        bias: (4H,).
        step_weight: (4H, 3).
        output_weight: (6, H).
        output_bias: (6,).
        momentum_decays: b; they include 0.9, the decay of Adam's momentum.
        rate: learning rate of the untrained rule.

    Attributes:
        momentum: (4, *coordinates).
        second_moment: (2, *coordinates), fast then slow.
        hidden, cell: (H, *coordinates).
        All are zero before the first step.
    """

    SECOND_MOMENT_DECAYS = (0.95, 0.999)
    TIME_SCALES = (30.0, 300.0, 3000.0)
    EPS = 1e-12

    def __init__(
        self,
        weight: ArrayLike,
        bias: ArrayLike,
        step_weight: ArrayLike,
        output_weight: ArrayLike,
        output_bias: ArrayLike,
        momentum_decays: Sequence[float] = (0.5, 0.9, 0.99, 0.999),
        rate: float = 3e-3,
    ) -> None:
        self.weight = _float64(weight)
        self.bias = _float64(bias)
        self.step_weight = _float64(step_weight)
        self.output_weight = _float64(output_weight)
        self.output_bias = _float64(output_bias)
        self.momentum_decays = tuple(momentum_decays)
        self.rate = rate
        self.steps_taken = 0
        self.momentum: Array = np.zeros(0)
        self.second_moment: Array = np.zeros(0)
        self.hidden: Array = np.zeros(0)
        self.cell: Array = np.zeros(0)

    def step(self, grad: ArrayLike) -> Array:
        """The update, to be added to the parameter, of its shape."""
        grad = _float64(grad)
        if self.steps_taken == 0:
            units = self.output_weight.shape[1]
            self.momentum = np.zeros((len(self.momentum_decays), *grad.shape))
            self.second_moment = np.zeros((len(self.SECOND_MOMENT_DECAYS), *grad.shape))
            self.hidden = np.zeros((units, *grad.shape))
            self.cell = np.zeros((units, *grad.shape))
        self.steps_taken += 1
        t = self.steps_taken

        self.momentum = np.stack(
            [b * m + (1.0 - b) * grad for b, m in zip(self.momentum_decays, self.momentum, strict=True)]
        )
        self.second_moment = np.stack(
            [a * v + (1.0 - a) * grad**2 for a, v in zip(self.SECOND_MOMENT_DECAYS, self.second_moment, strict=True)]
        )
        fast, slow = (
            np.sqrt(v / (1.0 - a**t) + self.EPS**2)
            for a, v in zip(self.SECOND_MOMENT_DECAYS, self.second_moment, strict=True)
        )
        averaged = [m / (1.0 - b**t) / slow for b, m in zip(self.momentum_decays, self.momentum, strict=True)]
        directions = np.stack([*averaged, grad / fast])

        inputs = np.concatenate([directions, np.log(fast / slow)[np.newaxis], self.hidden], axis=0)
        clock = np.array([np.tanh(t / scale) for scale in self.TIME_SCALES])
        gates = affine(self.weight, inputs, self.bias + self.step_weight @ clock)
        self.hidden, self.cell = lstm_step(gates, self.cell)

        *coefficients, scale_output = affine(self.output_weight, self.hidden, self.output_bias)
        direction = directions[self.momentum_decays.index(0.9)]
        for coefficient, d in zip(coefficients, directions, strict=True):
            direction = direction + coefficient * d
        log_scale = 6.0 * np.tanh(scale_output * 3.0 / 6.0)
        update: Array = -self.rate * np.exp(log_scale) * direction
        return update


class ScheduleFreeLSTMReference:
    """RMSprop with hypergradients inside a schedule-free optimizer, all three steered by one LSTM layer.

    For one coordinate with gradient g at step t = 1, 2, ...

        m_k    <- b_k m_k + (1 - b_k) g         b = .9, .99; mbefore is m_.9 before this line
        v      <- .9 v + .1 g^2
        V      <- V + (min(g^2, 100 v) - V) / t     v before the line above, if positive; the mean of all so far
        fast    = sqrt(v / (1 - .9^t) + eps^2),  all = sqrt(V + eps^2),  eps = 1e-12
        d       = cut(g / fast, 3)
        A       = d mbefore / (1 - .9^t) / fast
        E       = D / (rate t exp(l))
        x       = [d, m_k / (1 - b_k^t) / fast (2), A, log(fast / all), l / 6, E / (1 + |E|)]
        s       = [tanh(t / 30), tanh(t / 300), tanh(t / 3000)]
        h, c    = LSTM(W [x; h] + b + W_step s)
        [z, k, q] = V h + b_out
        R       = lr min((1 - progress) / .5, 1)
        l      <- min(max((1 - .002 min(R, 1)) l + min(lr, 1) .2 exp(6 tanh(2 k / 6)) A, -6), 4)
        S       = min(fast / all, 1)
        f       = R min(t / 50, 1) exp(6 tanh((l + .5 log S + 3 z) / 6))
        move    = -rate f d
        w       = 1 / (1 + (t - 1) exp(-.5 - 6 tanh(2 q / 6)))
        b       = 1 without averaging, .2 where progress > 0, .1 elsewhere
        update  = b move + (1 - b) w (D + move) - 2e-4 S f d^2 p      without averaging 1e-3
        D      <- (1 - w) (D + move)

    where cut(x, y) is the number of [-y, y] that is nearest to x. D = z - x and l are the displacement between the two
    sequences of Defazio et al. (2024) and the logarithm of the coordinate's factor on the rate.

    Args:
        weight: (4H, 7 + H), columns [x; h], blocks of H rows: input, forget, candidate, output.
        bias: (4H,).
        step_weight: (4H, 3).
        output_weight: (3, H).
        output_bias: (3,).
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
    GAIN_SLOPE = 2.0
    RECENCY_SLOPE = 2.0

    def __init__(
        self,
        weight: ArrayLike,
        bias: ArrayLike,
        step_weight: ArrayLike,
        output_weight: ArrayLike,
        output_bias: ArrayLike,
        rate: float = 0.02,
    ) -> None:
        self.weight = _float64(weight)
        self.bias = _float64(bias)
        self.step_weight = _float64(step_weight)
        self.output_weight = _float64(output_weight)
        self.output_bias = _float64(output_bias)
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
        grad = _float64(grad)
        if self.steps_taken == 0:
            units = self.output_weight.shape[1]
            self.momentum, self.second_moment = np.zeros((2, *grad.shape)), np.zeros((2, *grad.shape))
            self.displacement, self.log_rate = np.zeros((1, *grad.shape)), np.zeros((1, *grad.shape))
            self.hidden, self.cell = np.zeros((units, *grad.shape)), np.zeros((units, *grad.shape))
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
        direction = np.clip(grad / fast, -self.LARGEST_DIRECTION, self.LARGEST_DIRECTION)
        averaged = [m / (1.0 - b**t) / fast for b, m in zip(self.MOMENTUM_DECAYS, self.momentum, strict=True)]
        agreement = direction * before / (1.0 - self.MOMENTUM_DECAYS[0] ** t) / fast
        displacement, log_rate = self.displacement[0], self.log_rate[0]
        relative = displacement / (self.rate * t * np.exp(log_rate))

        signals = [direction, *averaged, agreement, np.log(fast / rms_of_all), log_rate / self.BOUND]
        signals.append(relative / (1.0 + np.abs(relative)))
        clock = np.array([np.tanh(t / scale) for scale in self.TIME_SCALES])
        inputs = np.concatenate([np.stack(signals), self.hidden], axis=0)
        gates = affine(self.weight, inputs, self.bias + self.step_weight @ clock)
        self.hidden, self.cell = lstm_step(gates, self.cell)
        scale, gain, recency = affine(self.output_weight, self.hidden, self.output_bias)

        def bounded(values: Array) -> Array:
            result: Array = self.BOUND * np.tanh(values / self.BOUND)
            return result

        rate = lr * min((1.0 - progress) / self.FALL, 1.0)
        gain = min(lr, 1.0) * self.GAIN * np.exp(bounded(self.GAIN_SLOPE * gain))
        log_rate = (1.0 - min(rate, 1.0) * self.FORGETTING) * log_rate + gain * agreement
        log_rate = np.clip(log_rate, -self.BOUND, self.HIGHEST)
        shrunk = np.minimum(fast / rms_of_all, 1.0)
        log_factor = bounded(log_rate + self.SHRINKING * np.log(shrunk) + self.RATE_SLOPE * scale)
        factor = rate * min(t / self.WARMUP, 1.0) * np.exp(log_factor)
        move = -self.rate * factor * direction
        share = 1.0 / (1.0 + (t - 1) * np.exp(-self.RECENCY - bounded(self.RECENCY_SLOPE * recency)))
        fast_share = self.FAST_SHARE_OF_KNOWN_LENGTH if progress > 0.0 else self.FAST_SHARE
        fast_share = fast_share if averaging else 1.0
        update: Array = fast_share * move + (1.0 - fast_share) * share * (displacement + move)
        decay = self.DECAY if averaging else self.DECAY_OF_LATEST
        update = update - decay * shrunk * factor * direction**2 * _float64(parameter)
        self.displacement = ((1.0 - share) * (displacement + move))[np.newaxis]
        self.log_rate = log_rate[np.newaxis]
        return update


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
    fast = mean = _float64(start)
    points = [fast]
    for t in range(1, steps + 1):
        fast = fast + moves(gradient(points[-1]), t)
        mean = (1.0 - share(t)) * mean + share(t) * fast
        points.append((1.0 - interpolation) * fast + interpolation * mean)
    return np.stack(points)


class MLPReference:
    """The per-parameter MLP of Metz et al. (2019) on coordinatewise inputs.

    For one coordinate with gradient g at step t = 1, 2, ...

        m_k    <- b_k m_k + (1 - b_k) g         b = .5, .9, .99, .999, .9999
        v_k    <- b_k v_k + (1 - b_k) g^2
        rms_k   = sqrt(v_k / (1 - b_k^t) + eps^2),  eps = 1e-12
        d       = [m_k / (1 - b_k^t) / rms_k (5), g / rms_.99]
        x       = [d, log(rms_k / rms_k+1) (4)]
        s       = tanh(t / tau - 1)             tau = 3, 10, 30, 100, 300, 1000, 3000, 10000, 300000
        h       = max(0, W x + W_step s + b)
        [c (6), a] = V h + b_out
        update  = -rate exp(magnitude_rate a) (d_.9 + sum_k c_k d_k)

    Args:
        hidden_weight: (H, 10), its columns are x.
        step_weight: (H, 9).
        hidden_bias: (H,).
        output_weight: (7, H).
        output_bias: (7,).
        rate: length of a step.
        magnitude_rate: factor in the exponent.

    Attributes:
        momentum, second_moment: (5, *coordinates), zero before the first step.
    """

    DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)
    TIME_SCALES = (3, 10, 30, 100, 300, 1000, 3000, 10_000, 300_000)
    EPS = 1e-12

    def __init__(
        self,
        hidden_weight: ArrayLike,
        step_weight: ArrayLike,
        hidden_bias: ArrayLike,
        output_weight: ArrayLike,
        output_bias: ArrayLike,
        rate: float = 1e-3,
        magnitude_rate: float = 1e-3,
    ) -> None:
        self.hidden_weight = _float64(hidden_weight)
        self.step_weight = _float64(step_weight)
        self.hidden_bias = _float64(hidden_bias)
        self.output_weight = _float64(output_weight)
        self.output_bias = _float64(output_bias)
        self.rate = rate
        self.magnitude_rate = magnitude_rate
        self.steps_taken = 0
        self.momentum: Array = np.zeros(0)
        self.second_moment: Array = np.zeros(0)

    def step(self, grad: ArrayLike) -> Array:
        """The update, to be added to the parameter, of its shape."""
        grad = _float64(grad)
        if self.steps_taken == 0:
            self.momentum = np.zeros((len(self.DECAYS), *grad.shape))
            self.second_moment = np.zeros((len(self.DECAYS), *grad.shape))
        self.steps_taken += 1
        t = self.steps_taken

        scales = list(zip(self.DECAYS, self.momentum, self.second_moment, strict=True))
        self.momentum = np.stack([b * m + (1.0 - b) * grad for b, m, _ in scales])
        self.second_moment = np.stack([b * v + (1.0 - b) * grad**2 for b, _, v in scales])
        unbiased = [1.0 - b**t for b in self.DECAYS]
        rms = [np.sqrt(v / u + self.EPS**2) for v, u in zip(self.second_moment, unbiased, strict=True)]
        directions = [m / u / r for m, u, r in zip(self.momentum, unbiased, rms, strict=True)]
        directions.append(grad / rms[2])
        log_ratios = [np.log(fast / slow) for fast, slow in itertools.pairwise(rms)]

        clock = np.array([np.tanh(t / scale - 1.0) for scale in self.TIME_SCALES])
        inputs = np.stack([*directions, *log_ratios])
        hidden = np.maximum(0.0, affine(self.hidden_weight, inputs, self.hidden_bias + self.step_weight @ clock))
        *coefficients, magnitude = affine(self.output_weight, hidden, self.output_bias)
        direction = directions[1]
        for coefficient, d in zip(coefficients, directions, strict=True):
            direction = direction + coefficient * d
        update: Array = -self.rate * np.exp(self.magnitude_rate * magnitude) * direction
        return update


def adam_updates(grads: ArrayLike, lr: float, betas: tuple[float, float], eps: float) -> Array:
    """The updates of Adam (Kingma & Ba 2015, algorithm 1) for the gradients (steps, *coordinates), in their shape."""
    grads = _float64(grads)
    first_decay, second_decay = betas
    first_moment = np.zeros(grads.shape[1:])
    second_moment = np.zeros(grads.shape[1:])
    updates = np.empty_like(grads)
    for index, grad in enumerate(grads):
        t = index + 1
        first_moment = first_decay * first_moment + (1.0 - first_decay) * grad
        second_moment = second_decay * second_moment + (1.0 - second_decay) * grad**2
        first_unbiased = first_moment / (1.0 - first_decay**t)
        second_unbiased = second_moment / (1.0 - second_decay**t)
        updates[index] = -lr * first_unbiased / (np.sqrt(second_unbiased) + eps)
    return updates


def central_difference(function: Callable[[Array], float], point: ArrayLike, epsilon: float) -> Array:
    """Gradient of a scalar function by (f(x + e) - f(x - e)) / (2 e) in each coordinate, error O(epsilon^2)."""
    point = _float64(point)
    gradient = np.empty_like(point)
    for index in np.ndindex(point.shape):
        above, below = point.copy(), point.copy()
        above[index] += epsilon
        below[index] -= epsilon
        gradient[index] = (function(above) - function(below)) / (2.0 * epsilon)
    return gradient


def gaussian_gradient(function: Callable[[Array], Array], point: ArrayLike, sigma: float, nodes: int) -> Array:
    """Gradient at ``point`` ``(n,)`` of E f(point + e), e ~ N(0, sigma^2 I): E f(point + e) e / sigma^2.

    By Gauss-Hermite quadrature on a grid of ``nodes ** n`` points, exact if f times a coordinate is a polynomial of
    degree below ``2 nodes`` in each coordinate. ``function`` maps ``(n, *grid)`` to ``(*grid)``.
    """
    point = _float64(point)
    abscissae, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    axes = [abscissae] * len(point)
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    density = functools.reduce(np.multiply.outer, [weights] * len(point))
    values = function(point.reshape(-1, *[1] * len(point)) + sigma * grid)
    return np.array([(density * values * coordinate).sum() / sigma for coordinate in grid])
