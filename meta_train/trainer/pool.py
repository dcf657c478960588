"""The inner trainings that are under way while a rule is meta-trained, in one process or divided among several.

What becomes of a member follows from the run's seed, its place in the pool and counters, and from the rule at the steps
at which it advances: never from what other members do. So members, and parts of them, may live in different processes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from learned_optim.meta_train.common.seeds import derive_seed, fixed_global_state, numpy_generator, torch_generator
from learned_optim.meta_train.config.settings import Config
from learned_optim.meta_train.estimators import Combination, Directions, Trajectory, WindowShare
from learned_optim.meta_train.inner.distributed import World
from learned_optim.meta_train.inner.shares import Division, Share, cut, join
from learned_optim.meta_train.inner.unroll import InnerState, check_positive, start, unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks.sampling import log_uniform_integer
from learned_optim.meta_train.trainer.checkpoint import below, flatten, unflatten
from learned_optim.meta_train.trainer.member import InnerTraining, TrainedShare
from learned_optim.rules import UpdateRule

SPREAD_DECAY = 0.95  # a window of the running mean square of an entry's meta-gradients


class Header(NamedTuple):
    """The figures that the shares of a window report beside :attr:`Part.sums`, to be added up."""

    step: float
    """Inner steps taken before the window; the first share alone counts, here and below."""
    steps: float
    """Inner steps of the window."""
    meta_loss: float
    inner_loss: float
    """The share's part of the mean inner loss at the end of the window."""
    lost: float
    """Shares in which an instance has diverged."""


class Outcome(NamedTuple):
    """The outcome of a meta-step: means over its windows."""

    grads: list[Tensor]
    """One tensor for each of the rule's parameters, in their order."""
    finite: bool
    """Whether nothing in any window's meta-loss and gradient is NaN or infinite."""
    meta_loss: float
    inner_loss: float
    """Mean inner loss at the end of the windows."""
    truncation: float
    """Inner steps of a window."""
    report: dict[str, float]
    """Means of the figures in :attr:`Estimator.reports`, as far as they could be computed."""
    agreement: float | None
    """Cosine between the means over two halves of the windows: near 0 where meta-gradients are noise. None: one window,
    or a gradient of zero."""


class Pool:
    """Members, drawn when their turn comes and again when they are finished.

    Of several processes each has a pool, and trains its share of the windows; a process by itself has the share that is
    the whole. All take the same course, up to rounding, whatever their number. One sum over the processes a meta-step
    carries everything: for each window a :class:`Header` and what the estimator makes the meta-gradient from. The state
    of inner trainings stays where it is, and is collected for checkpoints.

    Args:
        config: configuration of the run.
        device: device of inner training.
        rule: is meta-trained; its parameters change between meta-steps.
        world: the processes of the run; None: this one alone.

    Raises:
        ValueError: there are more processes than a meta-step has parts, or the estimator cannot be divided.
    """

    def __init__(self, config: Config, device: torch.device, rule: UpdateRule, world: World | None = None) -> None:
        self.config, self.device, self.rule = config, device, rule
        self.world = World() if world is None else world
        if self.world.size > 1 and not config.estimator.divisible:
            raise ValueError(f"{config.estimator.name} runs in one process, got {self.world.size}")
        self.families = [task.build() for task in config.tasks]
        self.pieces = config.estimator.pieces(config.unroll.instances)
        windows = config.unroll.windows_per_step
        self.division = Division(self.world.size, windows, self.pieces)
        self.team = self.world.team([self.division.team(window) for window in range(windows)])
        self.members: list[InnerTraining | None] = [None] * config.unroll.pool
        self.learned: dict[str, Tensor] = {}
        """Tensors that the estimator has learned over all windows so far; the same on all processes."""
        self.spread = [(0.0, 0.0) for _ in config.tasks]
        """Of each entry of the mixture, running sums of weights and of squared norms of its meta-gradients."""

    def places(self, meta_step: int) -> list[int]:
        """The members whose turn it is at the meta-step ``meta_step`` (from 0)."""
        windows = self.config.unroll.windows_per_step
        return [(meta_step * windows + index) % len(self.members) for index in range(windows)]

    def meta_gradient(self, meta_step: int, horizon: tuple[int, int]) -> Outcome:
        """Take the windows of the meta-step ``meta_step`` (from 0); new members get a length from ``horizon``.

        The outcome is the same on all processes.
        """
        return self.advance(self.places(meta_step), meta_step, horizon)

    def advance(self, places: Sequence[int], meta_step: int, horizon: tuple[int, int]) -> Outcome:
        """Take one window of each of these members: every process its share, and then their sum.

        A member whose turn comes first, or that is finished, is drawn anew with a length from ``horizon``.
        """
        meta_parameters = sum(parameter.numel() for parameter in self.rule.parameters())
        length = self.config.estimator.sums_length(meta_parameters, self.pieces)
        rows = torch.zeros(len(places), len(Header._fields) + length, dtype=torch.float64, device=self.device)
        drawn = [self._train_share(place, meta_step, horizon, row) for place, row in zip(places, rows, strict=True)]
        rows = self.world.sum(rows)
        headers = [Header(*row) for row in rows[:, : len(Header._fields)].tolist()]
        combined = [
            self._combine(place, directions, header, sums)
            for place, directions, header, sums in zip(
                places, drawn, headers, rows[:, len(Header._fields) :], strict=True
            )
        ]
        windows = len(places)
        meta_loss = sum(header.meta_loss for header in headers) / windows
        by_window: list[Sequence[Tensor]] = [combination.grads for combination in combined]
        if self.config.unroll.balanced:
            by_window = [self._balanced(place, grads) for place, grads in zip(places, by_window, strict=True)]
        grads = mean_grads(by_window)
        return Outcome(
            grads=grads,
            finite=math.isfinite(meta_loss) and all(bool(grad.isfinite().all()) for grad in grads),
            meta_loss=meta_loss,
            inner_loss=sum(header.inner_loss for header in headers) / windows,
            truncation=sum(header.steps for header in headers) / windows,
            report=mean_report([combination.report for combination in combined]),
            agreement=agreement(by_window),
        )

    def _balanced(self, place: int, grads: Sequence[Tensor]) -> list[Tensor]:
        """The meta-gradient of a member's window over the running root mean square of those of its entry."""
        member = self.members[place]
        assert member is not None  # its turn has just come
        entry = self.entry(member.draw)
        square = sum(float(grad.square().sum()) for grad in grads)
        if not math.isfinite(square):
            return list(grads)
        weight, total = (SPREAD_DECAY * old for old in self.spread[entry])
        self.spread[entry] = weight + 1, total + square
        rms = math.sqrt(self.spread[entry][1] / self.spread[entry][0])
        return [grad / rms if rms > 0 else grad for grad in grads]

    def _train_share(self, place: int, meta_step: int, horizon: tuple[int, int], row: Tensor) -> Directions | None:
        """Train this process's share of a window, if any, and add what comes of it to ``row``."""
        seed = self.config.seed
        with fixed_global_state(derive_seed(seed, "dropout", meta_step, place), self.device):
            member = self.members[place]
            if member is None or member.finished:
                member = self.members[place] = self.draw(place, horizon)
            trained = member.trained
            if trained is None:
                return None
            before = int(trained.inner.step)
            rng = numpy_generator(seed, "truncation", member.draw, before)
            steps = self.config.unroll.window(meta_step, member.horizon - before, rng)
            generator = torch_generator(seed, "window", member.draw, before)
            directions = self.config.estimator.directions(self.rule, self.pieces, member.memory, generator)
            window = WindowShare(trained.task, trained.inner, steps, generator, trained.share)
            part = self.config.estimator.train_share(self.rule, window, directions, self.learned)
        trained.advance(part.inner, part.losses)
        once = float(trained.share.first == 0)
        header = Header(
            step=once * before,
            steps=once * steps,
            meta_loss=float(part.meta_loss),
            inner_loss=trained.share.fraction * float(part.losses[-1].mean()),
            lost=float(trained.lost),
        )
        row += torch.cat([part.sums.new_tensor(header), part.sums])
        return directions

    def _combine(self, place: int, directions: Directions | None, header: Header, sums: Tensor) -> Combination:
        """Bring what all processes know of a member to the end of its window."""
        member = self.members[place]
        assert member is not None  # its turn has just come
        if directions is None:  # others have trained the member: only now this process knows its step
            generator = torch_generator(self.config.seed, "window", member.draw, int(header.step))
            directions = self.config.estimator.directions(self.rule, self.pieces, member.memory, generator)
        combination = self.config.estimator.combine(self.rule, directions, sums, self.learned)
        member.step, member.lost = int(header.step + header.steps), header.lost > 0
        member.memory = directions.memory
        return combination

    # New members

    def draw(self, place: int, horizon: tuple[int, int]) -> InnerTraining:
        """The successor of the member at ``place``: at its start or, in a staggered pool that begins, under way.

        Raises:
            ValueError: the meta-loss is a logarithm, and the task starts at a loss that is not positive.
        """
        previous = self.members[place]
        draw, length, windows = self.plan(place, None if previous is None else previous.draw, horizon)
        generator = torch_generator(self.config.seed, "estimator", draw)
        memory = self.config.estimator.memory(self.rule, self.pieces, generator)
        share, task = self._own_task(place, draw, length)
        if share is None or task is None:
            return InnerTraining(draw, length, memory, None)
        trained = TrainedShare(share, task, self.begin(task, draw))
        beginning = trained.inner
        lost = not self.fast_forward(trained, draw, windows)
        if windows > 0 and bool(share.team.gather(lost).any()):
            trained.inner, trained.diverged = beginning, False
        trained.inner = self.config.estimator.spread(trained.inner, share.count)
        return InnerTraining(draw, length, memory, trained, step=int(trained.inner.step))

    def plan(self, place: int, previous: int | None, horizon: tuple[int, int]) -> tuple[int, int, int]:
        """Draw, length and windows to run ahead of the successor of the draw ``previous`` at ``place``."""
        settings, size = self.config.unroll, len(self.members)
        round_ = 0 if previous is None else (previous - 1) // size + 1
        draw = 1 + place + size * round_
        rng = numpy_generator(self.config.seed, "horizon", draw)
        if previous is None and settings.stagger and size > 1:
            # As in a pool that has run for long: log-uniform horizons, met in proportion to their length, are uniform.
            length = int(rng.integers(*horizon, endpoint=True))
            windows = 1 if settings.truncation == "whole" else math.ceil(length / settings.truncation)
            return draw, length, int(rng.integers(windows))
        return draw, log_uniform_integer(rng, horizon), 0

    def begin(self, task: VectorizedTask, draw: int) -> InnerState:
        """The state of a task's instances at their start."""
        with torch.no_grad():
            inner = start(self.rule, task, torch_generator(self.config.seed, "first batch", draw))
        if self.config.estimator.meta_loss == "log":
            check_positive(task, inner, 'meta_loss = "log" takes the logarithm of the loss over its initial value')
        return inner

    @torch.no_grad()
    def fast_forward(self, trained: TrainedShare, draw: int, windows: int) -> bool:
        """Take a new member to a later stage, without a meta-gradient; False if it is lost on the way."""
        generator = torch_generator(self.config.seed, "fast forward", draw)
        for _ in range(windows):
            steps = self.config.unroll.truncation
            assert steps != "whole"  # then no member starts at a later stage
            ahead = unroll(self.rule, trained.task, trained.inner, steps, generator)
            trained.advance(ahead.state, ahead.losses)
            if trained.lost:
                return False
        return True

    def _own_task(self, place: int, draw: int, length: int) -> tuple[Share | None, VectorizedTask | None]:
        """This process's share of a member, and its instances of the task; None if it has nothing to do with it."""
        team = self.division.team(place)
        if self.world.rank not in team:
            return None, None
        task = self.build_task(draw, length)
        if len(team) == 1:
            return Share.whole(self.pieces), task
        if task.draws_random_numbers:  # it cannot be divided
            return (Share.whole(self.pieces), task) if self.world.rank == team.start else (None, None)
        share = self.division.share(self.team)
        return share, task.part(share.rows(task.instances))

    def entry(self, draw: int, rng: np.random.Generator | None = None) -> int:
        """The entry of the mixture that the task with this number is drawn from, by its generator or that given."""
        rng = numpy_generator(self.config.seed, "task", draw) if rng is None else rng
        weights = torch.tensor([task.weight for task in self.config.tasks], dtype=torch.float64)
        return int(rng.choice(len(self.families), p=(weights / weights.sum()).numpy()))

    def build_task(self, draw: int, length: int) -> VectorizedTask:
        """The task with this number, which is trained for so many steps."""
        settings = self.config.unroll
        rng = numpy_generator(self.config.seed, "task", draw)
        entry = self.entry(draw, rng)
        scale = None
        if rng.random() < settings.rescale:
            low, high = (math.log(bound) for bound in settings.rescale_range)
            scale = torch.from_numpy(rng.uniform(low, high, (settings.instances, 1))).exp().float()
        task = self.families[entry].sample(rng, "train")
        told = numpy_generator(self.config.seed, "known length", draw).random() < settings.known_length
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
            total_steps=settings.whole_windows(length) if told else None,
        ).in_steps_of(self.rule)

    # Checkpoints

    def state(self) -> tuple[list[dict[str, Any] | None], dict[str, Tensor]]:
        """Entries of each member for JSON, and tensors by dotted names; on all processes but the leader, nothing."""
        own = {
            f"{place}.{name}": tensor
            for place, member in enumerate(self.members)
            if member is not None and member.trained is not None
            for name, tensor in flatten(Trajectory(member.trained.inner, {})).items()
        }
        collected = self.world.collect(own)
        entries: list[dict[str, Any] | None] = []
        tensors: dict[str, Tensor] = {}
        for place, member in enumerate(self.members if self.world.leads else ()):
            if member is None:
                entries.append(None)
                continue
            entries.append({"draw": member.draw, "horizon": member.horizon, "diverged": member.lost})
            parts = (below(f"{place}.", collected[rank]) for rank in self.division.team(place))
            states = [unflatten(part, torch.device("cpu")).inner for part in parts if part]
            state = Trajectory(join(states, self.pieces), member.memory)
            tensors |= {f"{place}.{name}": tensor for name, tensor in flatten(state).items()}
        return entries, tensors

    def restore(self, entries: Sequence[Mapping[str, Any] | None], tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` has given: every process is given everything, and keeps its part."""
        for place, entry in enumerate(entries):
            if entry is None:
                continue
            state = unflatten(below(f"{place}.", tensors), self.device)
            lost = entry["diverged"] or not bool(state.inner.parameters.isfinite().all())
            member = InnerTraining(entry["draw"], entry["horizon"], state.memory, None, int(state.step), lost)
            share, task = self._own_task(place, member.draw, member.horizon)
            if share is not None and task is not None:
                inner = state.inner if share.count == self.pieces else cut(state.inner, share)
                member.trained = TrainedShare(share, task, inner, entry["diverged"])
            self.members[place] = member


def mean_grads(windows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Means over windows of one gradient for each of the rule's parameters."""
    return [torch.stack(parts).mean(0) for parts in zip(*windows, strict=True)]


def agreement(windows: Sequence[Sequence[Tensor]]) -> float | None:
    """Cosine between the mean gradients of the first, third, ... and of the other windows; None if there is none."""
    if len(windows) < 2:
        return None
    halves = [torch.cat([grad.flatten() for grad in mean_grads(windows[first::2])]) for first in (0, 1)]
    norms = [float(half.norm()) for half in halves]
    return float(halves[0] @ halves[1]) / (norms[0] * norms[1]) if all(norms) else None


def mean_report(reports: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Mean of each entry, and over the windows that have it."""
    means: dict[str, float] = {}
    for name in dict.fromkeys(name for report in reports for name in report):
        values = [float(report[name].mean()) for report in reports if name in report]
        means[name] = sum(values) / len(values)
    return means
