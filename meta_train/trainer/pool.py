"""The inner trainings that are under way while a rule is meta-trained.

What becomes of a member follows from the run's seed, its place in the pool and counters, and from the rule at the steps
at which it advances: never from what other members do. So members may live in different processes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learned_optim.meta_train.common.seeds import derive_seed, fixed_global_state, numpy_generator, torch_generator
from learned_optim.meta_train.config.settings import Config
from learned_optim.meta_train.estimators import Estimate, Estimator, Trajectory
from learned_optim.meta_train.inner.unroll import check_positive, start, unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks.sampling import log_uniform_integer
from learned_optim.meta_train.trainer.checkpoint import below, flatten, unflatten
from learned_optim.rules import UpdateRule

DIVERGED = 10.0  # initial losses: a training that stays above is given up


@dataclass
class InnerTraining:
    """A member of the pool: B instances of one task on their way to their horizon."""

    draw: int
    """Numbers the tasks of a run; with the seed it determines the task."""
    horizon: int
    task: VectorizedTask
    state: Trajectory
    diverged: bool = False
    """Whether a loss was far above its initial one for a whole window."""

    @property
    def step(self) -> int:
        """Inner steps taken."""
        return int(self.state.step)

    @property
    def finished(self) -> bool:
        """Whether the horizon is reached, or nothing is left to learn from."""
        return self.step >= self.horizon or self.lost

    @property
    def lost(self) -> bool:
        """Whether an instance has diverged, to infinity or just far off: its meta-gradients would drown the others."""
        return self.diverged or not bool(self.state.inner.parameters.isfinite().all())

    def advance(self, state: Trajectory, losses: Tensor) -> None:
        """Go on to ``state``; ``losses`` are those of the window that led there, ``(steps, ...)``.

        ``...`` is the shape of the initial losses, particles included: one that is far off is not hidden by the others.
        """
        self.state = state
        initial_loss = state.inner.initial_loss
        far_off = ~(losses <= DIVERGED * initial_loss) & (initial_loss > 0)  # what is not a number is far off too
        self.diverged = bool(far_off.all(dim=0).any())


class Outcome(NamedTuple):
    """What the windows of a meta-step yield together: means over them."""

    grads: list[Tensor]
    """One tensor for each of the rule's parameters, in their order."""
    finite: bool
    """Whether nothing in any window's meta-loss and gradient is NaN or infinite."""
    meta_loss: float
    inner_loss: float
    """At the end of the windows."""
    truncation: float
    """Inner steps of a window."""
    report: dict[str, float]
    """What the estimator could tell: of :attr:`Estimator.reports`."""


class Pool:
    """Members, drawn when their turn comes and again when they are finished.

    Args:
        config: of the run.
        estimator: takes the windows.
        device: where inner training runs.
        rule: of the architecture that is trained.
    """

    def __init__(self, config: Config, estimator: Estimator, device: torch.device, rule: UpdateRule) -> None:
        self.config, self.estimator, self.device, self.rule = config, estimator, device, rule
        self.families = [task.build() for task in config.tasks]
        self.members: list[InnerTraining | None] = [None] * config.unroll.pool

    def places(self, meta_step: int) -> list[int]:
        """The members whose turn it is at the meta-step ``meta_step`` (from 0)."""
        windows = self.config.unroll.windows_per_step
        return [(meta_step * windows + index) % len(self.members) for index in range(windows)]

    def meta_gradient(self, rule: UpdateRule, meta_step: int, horizon: tuple[int, int]) -> Outcome:
        """Take the windows of the meta-step ``meta_step`` (from 0); new members get a length from ``horizon``."""
        windows = [self.advance(rule, place, meta_step, horizon) for place in self.places(meta_step)]
        return Outcome(
            grads=mean_grads([window.grads for window in windows]),
            finite=all(is_finite(window) for window in windows),
            meta_loss=sum(float(window.meta_loss) for window in windows) / len(windows),
            inner_loss=sum(float(window.losses[-1].mean()) for window in windows) / len(windows),
            truncation=sum(len(window.losses) for window in windows) / len(windows),
            report=mean_report([window.report for window in windows]),
        )

    def advance(self, rule: UpdateRule, index: int, meta_step: int, horizon: tuple[int, int]) -> Estimate:
        """Take one window of member ``index``, for the meta-step ``meta_step`` (from 0).

        A member whose turn comes first, or that is finished, is drawn anew with a length from ``horizon``.
        """
        seed = self.config.seed
        with fixed_global_state(derive_seed(seed, "dropout", meta_step, index), self.device):
            member = self.members[index]
            if member is None or member.finished:
                member = self.members[index] = self.draw(rule, index, horizon)
            rng = numpy_generator(seed, "truncation", member.draw, member.step)
            steps = self.config.unroll.window(meta_step, member.horizon - member.step, rng)
            generator = torch_generator(seed, "window", member.draw, member.step)
            result = self.estimator.window(rule, member.task, member.state, steps, generator)
        member.advance(result.state, result.losses)
        return result

    def draw(self, rule: UpdateRule, index: int, horizon: tuple[int, int]) -> InnerTraining:
        """What takes the place of member ``index``: a task at its start; first ones of a staggered pool are under way.

        Raises:
            ValueError: the meta-loss is a logarithm, and the task starts at a loss that is not positive.
        """
        previous = self.members[index]
        draw, length, windows = self.plan(index, None if previous is None else previous.draw, horizon)
        member = self.begin(rule, draw, length, self.build_task(draw))
        beginning = member.state
        if not self.fast_forward(rule, member, windows):
            member.state, member.diverged = beginning, False
        generator = torch_generator(self.config.seed, "estimator", draw)
        member.state = self.estimator.start(rule, member.task, member.state.inner, generator)
        return member

    def plan(self, index: int, previous: int | None, horizon: tuple[int, int]) -> tuple[int, int, int]:
        """Draw, length and windows to run ahead of what follows the draw ``previous`` in place ``index``."""
        settings, size = self.config.unroll, len(self.members)
        round_ = 0 if previous is None else (previous - 1) // size + 1
        draw = 1 + index + size * round_
        rng = numpy_generator(self.config.seed, "horizon", draw)
        if previous is None and settings.stagger and size > 1:
            # As in a pool that has run for long: log-uniform horizons, met in proportion to their length, are uniform.
            length = int(rng.integers(*horizon, endpoint=True))
            return draw, length, int(rng.integers(math.ceil(length / settings.truncation)))
        return draw, log_uniform_integer(rng, horizon), 0

    def begin(self, rule: UpdateRule, draw: int, length: int, task: VectorizedTask) -> InnerTraining:
        """A member at its start, without the estimator's memory."""
        with torch.no_grad():
            inner = start(rule, task, torch_generator(self.config.seed, "first batch", draw))
        if self.config.estimator.meta_loss == "log":
            check_positive(task, inner, 'meta_loss = "log" takes the logarithm of the loss over its initial value')
        return InnerTraining(draw, length, task, Trajectory(inner, {}))

    @torch.no_grad()
    def fast_forward(self, rule: UpdateRule, member: InnerTraining, windows: int) -> bool:
        """Take a new member to a later stage, without a meta-gradient; False if it is lost on the way."""
        generator = torch_generator(self.config.seed, "fast forward", member.draw)
        for _ in range(windows):
            ahead = unroll(rule, member.task, member.state.inner, self.config.unroll.truncation, generator)
            member.advance(Trajectory(ahead.state, {}), ahead.losses)
            if member.lost:
                return False
        return True

    def build_task(self, draw: int) -> VectorizedTask:
        """The task with this number."""
        settings = self.config.unroll
        rng = numpy_generator(self.config.seed, "task", draw)
        weights = torch.tensor([task.weight for task in self.config.tasks], dtype=torch.float64)
        entry = int(rng.choice(len(self.families), p=(weights / weights.sum()).numpy()))
        scale = None
        if rng.random() < settings.rescale:
            low, high = (math.log(bound) for bound in settings.rescale_range)
            scale = torch.from_numpy(rng.uniform(low, high, (settings.instances, 1))).exp().float()
        task = self.families[entry].sample(rng, "train")
        inner, outer = task.hold_out() if self.config.estimator.outer_split == "validation" else (task, task)
        return VectorizedTask(
            inner,
            settings.instances,
            derive_seed(self.config.seed, "instances", draw),
            device=self.device,
            scale=scale,
            random_signs=settings.random_signs,
            outer=outer,
            anchor=self.config.tasks[entry].anchor,
        ).in_steps_of(self.rule)

    # Checkpoints

    def state(self) -> tuple[list[dict[str, Any] | None], dict[str, Tensor]]:
        """What JSON can hold of each member, and tensors by dotted names."""
        entries: list[dict[str, Any] | None] = []
        tensors: dict[str, Tensor] = {}
        for index, member in enumerate(self.members):
            if member is None:
                entries.append(None)
                continue
            entries.append({"draw": member.draw, "horizon": member.horizon, "diverged": member.diverged})
            tensors |= {f"{index}.{name}": tensor for name, tensor in flatten(member.state).items()}
        return entries, tensors

    def restore(self, entries: Sequence[Mapping[str, Any] | None], tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` has given."""
        for index, entry in enumerate(entries):
            if entry is not None:
                state = unflatten(below(f"{index}.", tensors), self.device)
                self.members[index] = InnerTraining(task=self.build_task(entry["draw"]), state=state, **entry)


def mean_grads(windows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Means over windows of one gradient for each of the rule's parameters."""
    return [torch.stack(parts).mean(0) for parts in zip(*windows, strict=True)]


def mean_report(reports: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Mean of each entry, and over the windows that have it."""
    means: dict[str, float] = {}
    for name in dict.fromkeys(name for report in reports for name in report):
        values = [float(report[name].mean()) for report in reports if name in report]
        means[name] = sum(values) / len(values)
    return means


def is_finite(window: Estimate) -> bool:
    """Whether neither the meta-loss of a window nor its gradient is NaN or infinite."""
    values = (window.meta_loss, *window.grads)
    return bool(torch.stack([tensor.isfinite().all() for tensor in values]).all())
