"""The responses of a rule: its updates on made-up gradient histories, beside Adam's."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from learned_optim.checkpoint import load_rule
from learned_optim.meta_train.common.seeds import torch_generator
from learned_optim.rules import UpdateRule

ADAM_RATE = 1e-3  # torch.optim.Adam's default
MEAN_OF_NOISE = 0.3  # of the noisy gradient, in units of its deviation
NOISE_SAMPLES = 64  # of the noisy gradient
STOP = 100  # steps after which the gradient that stops is zero
MAGNITUDES = 10.0 ** np.arange(-6, 7)  # of the gradients whose size is varied
PAST, PRESENT = np.linspace(-2, 2, 21), np.linspace(-3, 3, 25)
"""Axes of the map of a step: mean of the past gradients, and the present gradient; in deviations of the past ones."""
MAP_STEPS = 100  # past gradients of the map
MAP_SAMPLES = 8  # histories that a point of the map is the mean of, in pairs of opposite noise

Stepper = Callable[[Tensor], Tensor]
"""Gradients ``(steps, coordinates)`` -> the updates, of the same shape."""


class Responses(NamedTuple):
    """An optimizer's steps; lengths in units of the parameter, against the gradient: positive means downhill."""

    constant: np.ndarray
    """Steps on a gradient of 1 without end, ``(steps,)``."""
    flipping: np.ndarray
    """Steps on gradients 1, -1, 1, ..., the part against the present gradient, ``(steps,)``."""
    noisy: np.ndarray
    """Steps on noise around a mean, the part against the mean, ``(steps, samples)``."""
    stopped: np.ndarray
    """Steps on a gradient of 1 that is 0 after ``STOP`` steps, ``(2 * STOP,)``."""
    magnitudes: np.ndarray
    """Root mean square of the late steps on noise of the sizes ``MAGNITUDES``, ``(sizes,)``."""
    map: np.ndarray
    """The step after noise around ``PAST`` and then the gradient ``PRESENT``, ``(past, present)``."""


@dataclass(frozen=True)
class Portrait:
    """A rule and Adam at the rate 0.001, on the same gradients.

    Args:
        name: name of the rule.
        scale: factor on all gradients.
        rule: its steps.
        adam: Adam's.
    """

    name: str
    scale: float
    rule: Responses
    adam: Responses

    def effective_rates(self) -> dict[str, np.ndarray]:
        """The rate at which Adam's step would be as long as the rule's, by the kind of gradient, ``(steps,)`` each."""
        rule, adam = _lengths(self.rule), _lengths(self.adam)
        return {kind: ADAM_RATE * rule[kind] / adam[kind] for kind in rule}


def portrait(rule: UpdateRule | str | Path, *, steps: int = 1000, scale: float = 1.0, name: str = "") -> Portrait:
    """Run a rule, and Adam, on a few made-up gradient histories; a second or so.

    Args:
        rule: a rule, or what :func:`~learned_optim.load_rule` takes.
        steps: length of the responses.
        scale: factor on all gradients; a scale-free rule does not depend on it.
        name: name of the rule; by default that of its file or its architecture.

    Raises:
        ValueError: fewer than 10 steps, or a scale that is not positive and finite; and as ``load_rule`` does.
    """
    if steps < 10:
        raise ValueError(f"steps must be at least 10, got {steps}")
    if not 0 < scale < torch.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if isinstance(rule, UpdateRule):
        name, loaded = name or rule.name, rule
    else:
        name, loaded = name or Path(rule).stem, load_rule(rule)
    steppers: tuple[Stepper, ...] = (lambda grads: updates_of(loaded, grads), adam_updates)
    return Portrait(name, scale, *(_curves(stepper, steps, scale) for stepper in steppers))


@torch.no_grad()
def updates_of(rule: UpdateRule, grads: Tensor) -> Tensor:
    """Updates of a rule on gradients ``(steps, coordinates)``, of the same shape."""
    state = rule.init_state(grads.shape[1:])
    updates = []
    for step, grad in enumerate(grads, 1):
        update, state = rule(grad, state, torch.tensor(float(step)))
        updates.append(update)
    return torch.stack(updates)


def adam_updates(grads: Tensor) -> Tensor:
    """Updates of ``torch.optim.Adam`` at its defaults on gradients ``(steps, coordinates)``, of the same shape."""
    parameter = torch.nn.Parameter(torch.zeros(grads.shape[1:], dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=ADAM_RATE)
    updates = []
    for grad in grads:
        parameter.grad = grad.double()
        optimizer.step()
        updates.append(parameter.detach().float())
        with torch.no_grad():
            parameter.zero_()  # an update is read where rounding does not hide it
    return torch.stack(updates)


def _curves(stepper: Stepper, steps: int, scale: float) -> Responses:
    length = max(steps, 2 * STOP)
    noise = torch.randn(length, NOISE_SAMPLES, generator=torch_generator(0, "responses"))
    ones = torch.ones(length, 1)
    signs = ones.clone()
    signs[1::2] = -1
    stopping = ones.clone()
    stopping[STOP:] = 0
    few = noise[:, : NOISE_SAMPLES // 4]
    sized = (few[:, None] * torch.from_numpy(MAGNITUDES).float()[:, None]).flatten(1)
    parts = [ones, signs, MEAN_OF_NOISE + noise, stopping, sized]
    updates = -stepper(scale * torch.cat(parts, 1))
    constant, flipping, noisy, stopped, of_sizes = updates.split([part.shape[1] for part in parts], 1)
    late = of_sizes[steps // 2 : steps].unflatten(1, (len(MAGNITUDES), -1))
    return Responses(
        constant=constant[:steps, 0].numpy(),
        flipping=(flipping * signs)[:steps, 0].numpy(),
        noisy=noisy[:steps].numpy(),
        stopped=stopped[: 2 * STOP, 0].numpy(),
        magnitudes=late.square().mean((0, 2)).sqrt().numpy(),
        map=-_map(stepper, scale).numpy(),
    )


def _map(stepper: Stepper, scale: float) -> Tensor:
    """The last update of each history that ``PAST`` and ``PRESENT`` describe, ``(past, present)``."""
    half = torch.randn(MAP_STEPS, MAP_SAMPLES // 2, generator=torch_generator(0, "map of responses"))
    noise = torch.cat([half, -half], 1)
    shape = len(PAST), len(PRESENT), MAP_SAMPLES
    means, lasts = torch.from_numpy(PAST).float(), torch.from_numpy(PRESENT).float()
    past = (means[:, None, None] + noise[:, None, None]).expand(MAP_STEPS, *shape)
    present = lasts[:, None].expand(1, *shape)
    last = stepper(scale * torch.cat([past, present]).flatten(1))[-1]
    return last.view(shape).mean(-1)


def _lengths(curves: Responses) -> dict[str, np.ndarray]:
    """Root mean square of the steps, by the kind of gradient, ``(steps,)`` each."""
    return {
        "constant": np.abs(curves.constant),
        "flipping": np.abs(curves.flipping),
        "noisy": np.sqrt(np.square(curves.noisy).mean(1)),
    }
