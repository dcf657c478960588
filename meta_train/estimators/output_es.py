r"""Evolution strategies on the outputs of a rule, and supervised learning of which coordinate should have which.

ES on the weights of an LSTM has too high a variance for the few trainings that can be afforded. The gradient with
respect to the rule's *outputs* is cheaper: they are set to a few numbers, constant over all coordinates and over each
phase of a training, :math:`\varepsilon \sim N(0, \sigma^2 I)`. From the log speed-ups :math:`S` of K antithetic pairs
follows the *output gradient* of the task, at outputs of zero,

.. math:: a = \frac 1 K \sum_k \frac{S(\varepsilon_k) - S(-\varepsilon_k)}{2 \sigma^2}\, \varepsilon_k .

A training with outputs of zero records what the rule sees meanwhile. The weights :math:`w` then climb, over all tasks
so far, by backpropagation through what was seen, which does not depend on them,

.. math:: J(w) = \mathrm{mean} \left( \langle a, \bar o_w \rangle - \frac \lambda 2\, \overline{o_w^2} \right) ,

where :math:`o_w` are the outputs along the training and bars are means over coordinates and phases, or steps. To first
order that is the log speed-up over outputs of zero; :math:`\lambda`, the caution, keeps it where first order counts.
The output gradient of a task that is an *anchor* counts as zero: there the rule learns to leave its outputs at zero.
"""

import copy
import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from learned_optim.meta_train.common.seeds import torch_generator
from learned_optim.meta_train.common.strict import Count, Positive
from learned_optim.meta_train.estimators.base import Combination, Directions, Estimator, Part, WindowShare
from learned_optim.meta_train.estimators.perturbation import as_particles
from learned_optim.meta_train.inner.particles import ParticleRule, as_meta_grads, flat_meta_parameters
from learned_optim.meta_train.inner.speedups import log_slowdowns
from learned_optim.meta_train.inner.unroll import InnerState, unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.rules import ScheduleFreeLSTM, UpdateRule

PHASES = (0, 100, 500)  # steps at which they begin
RECORDED = 1000  # steps of a training that signals are kept of
COORDINATES = 8  # that they are kept of
REPLAYED = 32  # tasks that a meta-gradient is the mean of
ANCHORED = 10.0  # times the caution where a task is an anchor
LARGEST_SIGNAL = 10.0  # signal that is kept; gates are saturated there
CHUNK = 50  # steps whose gradients are held at a time


class Experience(NamedTuple):
    """The record of a task on which the rule has been trained."""

    signals: Tensor
    """Along a training with outputs of zero, ``(steps, signals, coordinates)``, float16."""
    output_gradient: Tensor
    """Gradient of the log speed-up with respect to the outputs in each phase, ``(phases, outputs)``."""
    anchor: Tensor
    """Whether the task is one, 0-d."""


@dataclass(frozen=True)
class OutputES(Estimator):
    """ES on outputs, with replay. Every window is a whole inner training.

    It learns an :class:`Experience` of every task. Reports ``predicted_log_speedup`` and the root mean square of the
    ``outputs``.

    Args:
        sigma: standard deviation of the perturbations of outputs.
        pairs: antithetic pairs that each task is trained with, K.
        caution: weight of the squared outputs, lambda.
        meta_loss: ``"speedup"``, no other.

    Raises:
        ValueError: a number is out of range, or another meta-loss.
    """

    sigma: Positive = 0.1
    pairs: Count = 8
    caution: Positive = 8.0
    meta_loss: Literal["speedup"] = field(default="speedup", kw_only=True)

    name = "output-es"
    reports: ClassVar[tuple[str, ...]] = ("predicted_log_speedup", "outputs")
    compares_particles = True
    divisible = False

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and self.pairs >= 1 and self.caution > 0):
            numbers = f"{self.sigma}, {self.pairs} and {self.caution}"
            raise ValueError(f"sigma, pairs and caution must be positive, got {numbers}")
        if self.meta_loss != "speedup":
            raise ValueError(f'output-es maximises speed-ups: set meta_loss = "speedup", got {self.meta_loss!r}')
        super().__post_init__()

    def check(self, rule: UpdateRule) -> None:
        """Raise ``ValueError`` for a rule that has no outputs."""
        require_schedule_free(rule)

    def sums_length(self, meta_parameters: int, pieces: int) -> int:
        """The gradient and two figures to report."""
        return meta_parameters + 2

    def train_share(
        self, rule: UpdateRule, window: WindowShare, directions: Directions, learned: dict[str, Tensor]
    ) -> Part:
        """Train on a whole task, add it to the experience, and replay a sample of that.

        The meta-loss is minus the objective J over the sample.

        Raises:
            ValueError: the training has already begun, or the rule has no outputs.
        """
        lstm = require_schedule_free(rule)
        task, inner, steps, generator, _ = window
        if inner.step > 0:
            raise ValueError('output-es takes whole inner trainings: set unroll.truncation = "whole"')
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        output_gradient = lstm.output_bias.new_zeros(len(PHASES), len(lstm.output_bias), device=task.device)
        if not task.anchor:
            output_gradient = self.output_gradient(lstm, task, inner, steps, seed, generator)
        signals, losses, end = observed(lstm, task, inner, steps, seed, generator)
        experience = Experience(signals.half(), output_gradient, torch.tensor(task.anchor, device=task.device))
        learned.update(named(experience, len(experiences(learned))))
        with torch.enable_grad():
            gain, size = self.replay(lstm, experiences(learned), generator)
            meta_loss = self.caution / 2 * size - gain
            grads = torch.autograd.grad(meta_loss, list(rule.parameters()))
        report = torch.stack([gain.detach(), size.detach().sqrt()])
        sums = torch.cat([*(grad.flatten() for grad in grads), report]).double()
        return Part(sums, meta_loss.detach(), losses, end)

    def combine(
        self, rule: UpdateRule, directions: Directions, sums: Tensor, learned: dict[str, Tensor]
    ) -> Combination:
        """The gradient, and the figures behind it."""
        grads = as_meta_grads(rule, sums[:-2])
        return Combination(grads, dict(zip(self.reports, sums[-2:].to(grads[0].dtype), strict=True)))

    @torch.no_grad()
    def output_gradient(
        self,
        rule: ScheduleFreeLSTM,
        task: VectorizedTask,
        inner: InnerState,
        steps: int,
        seed: int,
        generator: torch.Generator,
    ) -> Tensor:
        """The output gradient of the task, ``(phases, outputs)``, from whole trainings of 2 K particles."""
        shape = (self.pairs, len(PHASES), len(rule.output_bias))
        noise = self.sigma * torch.randn(shape, generator=generator, device=generator.device).to(task.device)
        batches = torch_generator(seed, "batches")
        particles, losses = as_particles(inner, 1, 2 * self.pairs), []
        for phase, length in enumerate(phase_lengths(steps)):
            if length == 0:
                noise[:, phase] = 0.0
                continue
            given = with_outputs(rule, torch.cat([noise[:, phase], -noise[:, phase]]))
            window = unroll(given, task, particles, length, batches)
            particles = window.state
            losses.append(window.losses)
        slowdowns = log_slowdowns(torch.cat(losses), particles.initial_loss, 2 * self.pairs)
        above, below = slowdowns.chunk(2)
        return torch.einsum("k,kpo->po", below - above, noise) / (2 * self.sigma**2 * self.pairs)

    def replay(
        self, rule: ScheduleFreeLSTM, experience: list[Experience], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Means over a sample of the experience, 0-d: predicted log speed-up, and squared outputs.

        Outputs of anchors count :data:`ANCHORED` times.
        """
        order = torch.randperm(len(experience), generator=generator, device=generator.device)
        tasks = [experience[index] for index in order[:REPLAYED].tolist()]
        longest = max(len(task.signals) for task in tasks)
        signals = torch.cat([padded(task.signals.to(rule.output_bias.dtype), longest) for task in tasks], 2)
        credit = torch.stack(
            [padded(per_step_gradient(task.output_gradient, len(task.signals)), longest) for task in tasks]
        )
        weights = torch.stack(
            [padded(credit.new_full((len(task.signals),), 1 / len(task.signals)), longest) for task in tasks]
        )
        weights = weights * torch.stack([1 + (ANCHORED - 1) * task.anchor for task in tasks])[:, None]
        outputs = rule.outputs(signals).unflatten(2, (len(tasks), -1))
        gain = torch.einsum("tonc,nto->", outputs, credit)
        size = torch.einsum("tonc,nt->", outputs.square(), weights)
        return gain / signals.shape[2], size / signals.shape[2]

    def check_learned(self, names: Collection[str]) -> None:
        """Raise ``ValueError`` unless these are the tensors of whole experiences."""
        count = len(names) // len(Experience._fields)
        expected = {f"{index}.{name}" for index in range(count) for name in Experience._fields}
        if expected != set(names):
            raise ValueError(f"not an experience of output-es: {', '.join(sorted(expected ^ set(names)))}")


def named(experience: Experience, index: int) -> dict[str, Tensor]:
    """Tensors of the experience with this number, by the names in ``learned``."""
    return {f"{index}.{name}": tensor for name, tensor in experience._asdict().items()}


def experiences(learned: Mapping[str, Tensor]) -> list[Experience]:
    """All experiences in ``learned``, the first one first."""
    count = len(learned) // len(Experience._fields)
    return [Experience(*(learned[f"{index}.{name}"] for name in Experience._fields)) for index in range(count)]


def require_schedule_free(rule: UpdateRule) -> ScheduleFreeLSTM:
    """The rule, if it is steered by outputs; else ``ValueError``."""
    if not isinstance(rule, ScheduleFreeLSTM):
        raise ValueError(f"output-es needs a rule that is steered by outputs: schedule-free-lstm, got {rule.name}")
    return rule


@torch.no_grad()
def with_outputs(rule: ScheduleFreeLSTM, outputs: Tensor) -> ParticleRule:
    """The rule as particles with these constant outputs, ``(P, outputs)``."""
    unsteered = without_outputs(rule)
    particles = []
    for row in outputs:
        unsteered.output_bias.copy_(row)
        particles.append(flat_meta_parameters(unsteered))
    return ParticleRule(rule, torch.stack(particles))


@torch.no_grad()
def without_outputs(rule: ScheduleFreeLSTM) -> ScheduleFreeLSTM:
    """A copy whose outputs are zero."""
    unsteered = copy.deepcopy(rule)
    for name, parameter in unsteered.named_parameters():
        if name.startswith("output_"):  # without units there are biases alone
            parameter.zero_()
    return unsteered


@torch.no_grad()
def observed(
    rule: ScheduleFreeLSTM, task: VectorizedTask, inner: InnerState, steps: int, seed: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, InnerState]:
    """A training with outputs of zero: signals of some coordinates, losses ``(steps, B)``, and its end."""
    unsteered = without_outputs(rule)
    index = some_coordinates(task, generator)
    memory = rule.init_state((COORDINATES,), device=task.device, dtype=inner.parameters.dtype)
    batches = torch_generator(seed, "batches")
    signals, losses = [], []
    for first in range(0, steps, CHUNK):
        window = unroll(unsteered, task, inner, min(CHUNK, steps - first), batches, record_grads=first < RECORDED)
        inner = window.state
        losses.append(window.losses)
        for step, grad in enumerate((window.grads or ())[:-1], first + 1):
            count = torch.tensor(float(step), device=task.device)
            seen, memory = rule.observe(grad.flatten()[index], memory, count)
            signals.append(seen)
    return torch.stack(signals).clamp(-LARGEST_SIGNAL, LARGEST_SIGNAL), torch.cat(losses), inner


def some_coordinates(task: VectorizedTask, generator: torch.Generator) -> Tensor:
    """Places among all coordinates of all instances, ``(COORDINATES,)``; small tensors have as many as large ones."""
    sizes = torch.tensor([shape.numel() for shape in task.shapes.values()])
    draws = torch.rand((3, COORDINATES), generator=generator, device=generator.device).cpu()
    tensor = (draws[0] * len(sizes)).long()
    place = (sizes.cumsum(0) - sizes)[tensor] + (draws[1] * sizes[tensor]).long()
    instance = (draws[2] * task.instances).long()
    return (instance * task.coordinates + place).to(task.device)


def per_step_gradient(output_gradient: Tensor, steps: int) -> Tensor:
    """The output gradient of each phase divided among its steps, ``(steps, outputs)``."""
    parts = zip(output_gradient, phase_lengths(steps), strict=True)
    return torch.cat([row.expand(length, -1) / max(1, length) for row, length in parts])


def phase_lengths(steps: int) -> list[int]:
    """Steps of each phase in a training of so many; 0 for those that it does not reach."""
    bounds = [min(start, steps) for start in (*PHASES, steps)]
    return [end - start for start, end in itertools.pairwise(bounds)]


def padded(values: Tensor, length: int) -> Tensor:
    """Zeros appended to the first axis."""
    return pad(values, (0, 0) * (values.dim() - 1) + (0, length - len(values)))
