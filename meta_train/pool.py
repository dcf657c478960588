"""The inner trainings that are under way while a rule is meta-trained.

What becomes of a member follows from the run's seed, its place in the pool and counters, and from the rule at the steps
at which it advances: never from what other members do. So members may live in different processes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learned_optim.meta_train.estimators import Estimate, Estimator, Trajectory
from learned_optim.meta_train.run_checkpoint import below, flatten, unflatten
from learned_optim.meta_train.seeds import derive_seed, fixed_global_state, numpy_generator, torch_generator
from learned_optim.meta_train.settings import Config
from learned_optim.meta_train.tasks.sampling import log_uniform_integer
from learned_optim.meta_train.unroll import check_positive, start, unroll
from learned_optim.meta_train.vectorize import VectorizedTask
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


class Pool:
    """Members, drawn when their turn comes and again when they are finished.

    Args:
        config: of the run.
        estimator: takes the windows.
        device: where inner training runs.
    """

    def __init__(self, config: Config, estimator: Estimator, device: torch.device) -> None:
        self.config, self.estimator, self.device = config, estimator, device
        self.families = [task.build() for task in config.tasks]
        self.members: list[InnerTraining | None] = [None] * config.unroll.pool

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
        settings, size = self.config.unroll, len(self.members)
        previous = self.members[index]
        round_ = 0 if previous is None else (previous.draw - 1) // size + 1
        draw = 1 + index + size * round_
        rng = numpy_generator(self.config.seed, "horizon", draw)
        task = self.build_task(draw)
        with torch.no_grad():
            inner = start(rule, task, torch_generator(self.config.seed, "first batch", draw))
        if self.config.estimator.meta_loss == "log":
            check_positive(task, inner, 'meta_loss = "log" takes the logarithm of the loss over its initial value')
        if previous is None and settings.stagger and size > 1:
            # As in a pool that has run for long: log-uniform horizons, met in proportion to their length, are uniform.
            length = int(rng.integers(*horizon, endpoint=True))
            windows = int(rng.integers(math.ceil(length / settings.truncation)))
        else:
            length, windows = log_uniform_integer(rng, horizon), 0
        member = InnerTraining(draw, length, task, Trajectory(inner, {}))
        self._fast_forward(rule, member, windows)
        generator = torch_generator(self.config.seed, "estimator", draw)
        member.state = self.estimator.start(rule, task, member.state.inner, generator)
        return member

    @torch.no_grad()
    def _fast_forward(self, rule: UpdateRule, member: InnerTraining, windows: int) -> None:
        """Take a new member to a later stage, without a meta-gradient; back to its start if it is lost on the way."""
        beginning = member.state
        generator = torch_generator(self.config.seed, "fast forward", member.draw)
        for _ in range(windows):
            ahead = unroll(rule, member.task, member.state.inner, self.config.unroll.truncation, generator)
            member.advance(Trajectory(ahead.state, {}), ahead.losses)
            if member.lost:
                member.state, member.diverged = beginning, False
                return

    def build_task(self, draw: int) -> VectorizedTask:
        """The task with this number."""
        settings = self.config.unroll
        rng = numpy_generator(self.config.seed, "task", draw)
        weights = torch.tensor([task.weight for task in self.config.tasks], dtype=torch.float64)
        family = self.families[int(rng.choice(len(self.families), p=(weights / weights.sum()).numpy()))]
        scale = None
        if rng.random() < settings.rescale:
            low, high = (math.log(bound) for bound in settings.rescale_range)
            scale = torch.from_numpy(rng.uniform(low, high, (settings.instances, 1))).exp().float()
        task = family.sample(rng, "train")
        inner, outer = task.hold_out() if self.config.estimator.outer_split == "validation" else (task, task)
        return VectorizedTask(
            inner,
            settings.instances,
            derive_seed(self.config.seed, "instances", draw),
            device=self.device,
            scale=scale,
            random_signs=settings.random_signs,
            outer=outer,
        )

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
