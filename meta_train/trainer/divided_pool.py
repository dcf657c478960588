"""A pool whose windows are divided among the processes of a run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learned_optim.meta_train.common.seeds import derive_seed, fixed_global_state, numpy_generator, torch_generator
from learned_optim.meta_train.config.settings import Config
from learned_optim.meta_train.estimators import Combination, Estimator, Trajectory
from learned_optim.meta_train.inner.distributed import World
from learned_optim.meta_train.inner.particles import as_meta_grads
from learned_optim.meta_train.inner.shares import Division, Share, cut, join
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.trainer.checkpoint import below, flatten, unflatten
from learned_optim.meta_train.trainer.pool import InnerTraining, Outcome, Pool, mean_grads, mean_report
from learned_optim.rules import UpdateRule


@dataclass
class Own:
    """A process's part of a member."""

    share: Share
    training: InnerTraining
    """Without the estimator's memory."""


@dataclass
class Member:
    """What all processes know alike of a member, and what this one has of it."""

    draw: int
    horizon: int
    memory: dict[str, Tensor]
    """The estimator's: it follows from seeds, so that it need not travel."""
    own: Own | None
    step: int = 0
    """Inner steps taken, at the time of the latest meta-step that it took part in."""
    lost: bool = False
    """See :attr:`InnerTraining.lost`; of any instance, wherever it is."""

    @property
    def finished(self) -> bool:
        """See :attr:`InnerTraining.finished`."""
        return self.step >= self.horizon or self.lost


class Header(NamedTuple):
    """What the shares of a window say about it beside :attr:`Part.sums`, to be added up."""

    step: float
    """Inner steps taken before the window; the first share alone tells, here and below."""
    steps: float
    meta_loss: float
    inner_loss: float
    lost: float
    """Shares of which an instance is lost."""


class DividedPool(Pool):
    """Takes the course of a :class:`Pool`, up to rounding, whatever the number of processes.

    One sum over the processes a meta-step carries everything: gradients, or slopes of perturbations that all
    processes draw alike, and a :class:`Header` for each window. State of inner trainings stays where it is, and is
    collected for checkpoints.

    Args:
        config: of the run.
        estimator: takes the windows.
        device: where inner training runs.
        rule: of the architecture that is trained.
        world: the processes.

    Raises:
        ValueError: there are more processes than a meta-step has parts, or the estimator cannot be divided.
    """

    def __init__(
        self, config: Config, estimator: Estimator, device: torch.device, rule: UpdateRule, world: World
    ) -> None:
        super().__init__(config, estimator, device, rule)
        if not estimator.divisible:
            raise ValueError(f"{estimator.name} runs in one process, got {world.size}")
        self.world = world
        self.pieces = estimator.pieces(config.unroll.instances)
        windows = config.unroll.windows_per_step
        self.division = Division(world.size, windows, self.pieces)
        self.team = world.team([self.division.team(window) for window in range(windows)])
        self.known: list[Member | None] = [None] * len(self.members)

    def meta_gradient(self, rule: UpdateRule, meta_step: int, horizon: tuple[int, int]) -> Outcome:
        """See :meth:`Pool.meta_gradient`; the same on all processes."""
        places = self.places(meta_step)
        parameters = sum(parameter.numel() for parameter in rule.parameters())
        length, sums_length = self.estimator.lengths(parameters, self.pieces)
        gradient = torch.zeros(length, dtype=torch.float64, device=self.device)
        rows = torch.zeros(
            len(places), len(Header._fields) + sums_length, dtype=torch.float64, device=self.device
        )  # one a window
        for place, row in zip(places, rows, strict=True):
            self._take_own_part(rule, place, meta_step, horizon, gradient, row)
        total = self.world.sum(torch.cat([gradient, rows.flatten()]))
        gradient, rows = total[:length], total[length:].view(rows.shape)
        headers = [Header(*row[: len(Header._fields)].tolist()) for row in rows]
        combined = [
            self._combine(rule, place, header, row[len(Header._fields) :])
            for place, header, row in zip(places, headers, rows, strict=True)
        ]
        windows = len(places)
        if length > 0:
            grads = list(as_meta_grads(rule, gradient / windows))
        else:
            grads = mean_grads([combination.grads for combination in combined])
        meta_loss = sum(header.meta_loss for header in headers) / windows
        return Outcome(
            grads=grads,
            finite=math.isfinite(meta_loss) and all(bool(grad.isfinite().all()) for grad in grads),
            meta_loss=meta_loss,
            inner_loss=sum(header.inner_loss for header in headers) / windows,
            truncation=sum(header.steps for header in headers) / windows,
            report=mean_report([combination.report for combination in combined]),
        )

    def _take_own_part(
        self,
        rule: UpdateRule,
        place: int,
        meta_step: int,
        horizon: tuple[int, int],
        gradient: Tensor,
        row: Tensor,
    ) -> None:
        """Take this process's share of a window, if any, and add what comes of it to ``gradient`` and ``row``."""
        seed = self.config.seed
        with fixed_global_state(derive_seed(seed, "dropout", meta_step, place), self.device):
            member = self.known[place]
            if member is None or member.finished:
                member = self.known[place] = self._draw(rule, place, horizon)
            if member.own is None:
                return
            share, training = member.own.share, member.own.training
            before = training.step
            rng = numpy_generator(seed, "truncation", member.draw, before)
            steps = self.config.unroll.window(meta_step, member.horizon - before, rng)
            generator = torch_generator(seed, "window", member.draw, before)
            state = Trajectory(training.state.inner, member.memory)
            part = self.estimator.part(rule, training.task, state, steps, generator, share)
        training.advance(Trajectory(part.inner, {}), part.losses)
        tells = float(share.first == 0)
        header = Header(
            step=tells * before,
            steps=tells * steps,
            meta_loss=float(part.meta_loss),
            inner_loss=share.fraction * float(part.losses[-1].double().mean()),
            lost=float(training.lost),
        )
        gradient += part.gradient
        row += torch.cat([part.sums.new_tensor(header), part.sums])

    def _combine(self, rule: UpdateRule, place: int, header: Header, sums: Tensor) -> Combination:
        """Bring what all processes know of a member to the end of its window."""
        member = self.known[place]
        assert member is not None  # its turn has just come
        combination = Combination((), {}, {})
        if len(sums) > 0:
            generator = torch_generator(self.config.seed, "window", member.draw, int(header.step))
            combination = self.estimator.combine(rule, self.pieces, member.memory, generator, sums)
        member.step, member.lost, member.memory = int(header.step + header.steps), header.lost > 0, combination.memory
        return combination

    def _draw(self, rule: UpdateRule, index: int, horizon: tuple[int, int]) -> Member:
        """See :meth:`Pool.draw`."""
        previous = self.known[index]
        draw, length, windows = self.plan(index, None if previous is None else previous.draw, horizon)
        memory = self.estimator.memory(rule, self.pieces, torch_generator(self.config.seed, "estimator", draw))
        share, task = self._own_task(index, draw)
        if share is None or task is None:
            return Member(draw, length, memory, None)
        training = self.begin(rule, draw, length, task)
        beginning = training.state
        lost_on_the_way = not self.fast_forward(rule, training, windows)
        if windows > 0 and bool(share.team.gather(lost_on_the_way).any()):
            training.state, training.diverged = beginning, False
        inner = self.estimator.spread(training.state.inner, share.count)
        training.state = Trajectory(inner, {})
        return Member(draw, length, memory, Own(share, training))

    def _own_task(self, index: int, draw: int) -> tuple[Share | None, VectorizedTask | None]:
        """This process's share of a member, and its instances of the task; None if it has nothing to do with it."""
        team = self.division.team(index)
        if self.world.rank not in team:
            return None, None
        task = self.build_task(draw)
        if len(team) == 1:
            return Share.whole(self.pieces), task
        if task.draws_random_numbers:  # it cannot be divided
            return (Share.whole(self.pieces), task) if self.world.rank == team.start else (None, None)
        share = self.division.share(self.team)
        return share, task.part(share.rows(task.instances))

    # Checkpoints

    def state(self) -> tuple[list[dict[str, Any] | None], dict[str, Tensor]]:
        """See :meth:`Pool.state`: on the leader, of all processes; on the others, nothing."""
        own = {
            f"{index}.{name}": tensor
            for index, member in enumerate(self.known)
            if member is not None and member.own is not None
            for name, tensor in flatten(member.own.training.state).items()
        }
        collected = self.world.collect(own)
        entries: list[dict[str, Any] | None] = []
        tensors: dict[str, Tensor] = {}
        for index, member in enumerate(self.known if self.world.leads else ()):
            if member is None:
                entries.append(None)
                continue
            entries.append({"draw": member.draw, "horizon": member.horizon, "diverged": member.lost})
            parts = (below(f"{index}.", collected[rank]) for rank in self.division.team(index))
            states = [unflatten(part, torch.device("cpu")).inner for part in parts if part]
            state = Trajectory(join(states, self.pieces), member.memory)
            tensors |= {f"{index}.{name}": tensor for name, tensor in flatten(state).items()}
        return entries, tensors

    def restore(self, entries: Sequence[Mapping[str, Any] | None], tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`Pool.restore`: every process is given everything, and keeps its part."""
        for index, entry in enumerate(entries):
            if entry is None:
                continue
            state = unflatten(below(f"{index}.", tensors), self.device)
            lost = entry["diverged"] or not bool(state.inner.parameters.isfinite().all())
            member = Member(entry["draw"], entry["horizon"], state.memory, None, int(state.step), lost)
            share, task = self._own_task(index, member.draw)
            if share is not None and task is not None:
                inner = state.inner if share.count == self.pieces else cut(state.inner, share)
                training = InnerTraining(member.draw, member.horizon, task, Trajectory(inner, {}), entry["diverged"])
                member.own = Own(share, training)
            self.known[index] = member
