"""The division of a meta-step's windows among the processes of a run.

Whole windows first; if there are more processes than windows, each window's *pieces*, which are its instances or, of a
smoothed estimator, its groups of instances. Who takes what follows from the place in the pool, so that the state of an
inner training never moves.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learned_optim.meta_train.inner.distributed import World
from learned_optim.meta_train.inner.unroll import InnerState


@dataclass(frozen=True)
class Share:
    """The part of a window that one process takes: neighbouring pieces."""

    first: int
    end: int
    pieces: int
    """Number of pieces of the whole window."""
    team: World = field(default_factory=World)
    """The processes that share the window."""

    @classmethod
    def whole(cls, pieces: int) -> "Share":
        """The share that is a whole window."""
        return cls(0, pieces, pieces)

    @property
    def count(self) -> int:
        """Pieces of this share."""
        return self.end - self.first

    @property
    def fraction(self) -> float:
        """Weight of a mean over this share in the mean over the window."""
        return self.count / self.pieces

    def rows(self, instances: int) -> slice:
        """The slice of the share's instances among those of the whole window."""
        size = instances // self.pieces
        return slice(self.first * size, self.end * size)

    def select(self, tensor: Tensor) -> Tensor:
        """Rows of its own pairs (or particles), of those of all ``(K, ...)`` in the order (pair, piece)."""
        if self.count == self.pieces:
            return tensor
        own: Tensor = tensor.unflatten(0, (-1, self.pieces))[:, self.first : self.end].flatten(0, 1)
        return own

    def scatter(self, values: Tensor) -> Tensor:
        """The counterpart: values ``(k, ...)`` of its own pairs among zeros for all others, ``(K, ...)`` in float64."""
        own: Tensor = values.double().unflatten(0, (-1, self.count))
        if self.count == self.pieces:
            everyone = own
        else:
            everyone = own.new_zeros(len(own), self.pieces, *own.shape[2:])
            everyone[:, self.first : self.end] = own
        return everyone.flatten(0, 1)


@dataclass(frozen=True)
class Division:
    """The assignment of windows to processes.

    Args:
        processes: number of processes of the run.
        windows: number of windows of a meta-step.
        pieces: number of pieces of a window.

    Raises:
        ValueError: there are more processes than pieces.
    """

    processes: int
    windows: int
    pieces: int

    def __post_init__(self) -> None:
        if self.processes > self.windows * self.pieces:
            raise ValueError(
                f"{self.processes} processes, but a meta-step has only {self.windows * self.pieces} parts: "
                f"{self.windows} windows (unroll.windows_per_step) of {self.pieces} instances or groups "
                "(unroll.instances, estimator.groups); start fewer processes, or raise one of these"
            )

    def team(self, place: int) -> range:
        """Ranks that advance the pool's member at ``place``: one, or several if there are more ranks than windows.

        The windows of a meta-step are neighbours in the pool. If their number divides the pool's size, every step is
        divided alike; if not, some steps wait for a process that has two windows.
        """
        window = place % self.windows
        first = window * self.processes // self.windows
        return range(first, max(first + 1, (window + 1) * self.processes // self.windows))

    def share(self, team: World) -> Share:
        """The share of this process in its team's windows."""
        first, end = (rank * self.pieces // team.size for rank in (team.rank, team.rank + 1))
        return Share(first, end, self.pieces, team)


def cut(state: InnerState, share: Share) -> InnerState:
    """The share's part of the state of a whole window, of instances or of particles."""
    rows = share.rows(len(state.parameters))

    def cut_one(axis: int, tensor: Tensor) -> Tensor:
        if state.parameters.dim() == 3:
            return share.select(tensor)  # particles lie in the order (sign, pair, piece)
        return tensor.narrow(axis, rows.start, rows.stop - rows.start).clone()

    return _map(cut_one, state)


def join(states: list[InnerState], pieces: int) -> InnerState:
    """The state of a whole window from its parts in their order; the counterpart of :func:`cut`."""

    def join_some(axis: int, *tensors: Tensor) -> Tensor:
        if states[0].parameters.dim() == 3:
            copies = sum(len(tensor) for tensor in tensors) // pieces
            by_copy: list[Tensor] = [tensor.unflatten(0, (copies, -1)) for tensor in tensors]
            return torch.cat(by_copy, 1).flatten(0, 1)
        return torch.cat(tensors, axis)

    return _map(join_some, *states)


def _map(function: Callable[..., Tensor], *states: InnerState) -> InnerState:
    """Apply ``function(axis of the instances or particles, *tensors)`` to each entry but the step."""
    first = states[0]
    features = 0 if first.parameters.dim() == 3 else 1  # (features, B, N), but (P, features, b, N)
    return first._replace(
        parameters=function(0, *(state.parameters for state in states)),
        grad=function(0, *(state.grad for state in states)),
        initial_loss=function(0, *(state.initial_loss for state in states)),
        rule_state={
            entry: function(features, *(state.rule_state[entry] for state in states)) for entry in first.rule_state
        },
    )
