"""A member of the pool: an inner training on its way to its horizon."""

from dataclasses import dataclass

from torch import Tensor

from learned_optim.meta_train.inner.shares import Share
from learned_optim.meta_train.inner.unroll import InnerState
from learned_optim.meta_train.inner.vectorize import VectorizedTask

GIVEN_UP = 10.0  # initial losses: a training that stays above for a whole window is given up


@dataclass
class TrainedShare:
    """The instances of an inner training that one process trains: all of them, or some."""

    share: Share
    task: VectorizedTask
    inner: InnerState
    diverged: bool = False
    """Whether a loss was far above its initial one for a whole window."""

    @property
    def lost(self) -> bool:
        """Whether an instance has diverged, to infinity or just far off: its meta-gradients would drown the others."""
        return self.diverged or not bool(self.inner.parameters.isfinite().all())

    def advance(self, inner: InnerState, losses: Tensor) -> None:
        """Continue from ``inner``; ``losses`` are those of the window that led there, ``(steps, ...)``.

        ``...`` is the shape of the initial losses, particles included: one that is far off is not hidden by the others.
        """
        self.inner = inner
        far_off = ~(losses <= GIVEN_UP * inner.initial_loss) & (inner.initial_loss > 0)  # NaN is far off too
        self.diverged = bool(far_off.all(dim=0).any())


@dataclass
class InnerTraining:
    """B instances of one task on their way to their horizon: what all processes know alike, and this one's share."""

    draw: int
    """Numbers the tasks of a run; with the seed it determines the task."""
    horizon: int
    memory: dict[str, Tensor]
    """The memory of the estimator; it follows from seeds, so that it need not travel."""
    trained: TrainedShare | None
    """The share that this process trains, if any."""
    step: int = 0
    """Inner steps taken."""
    lost: bool = False
    """Whether an instance has diverged, wherever it is: see :attr:`TrainedShare.lost`."""

    @property
    def finished(self) -> bool:
        """Whether the horizon is reached, or nothing is left to learn from."""
        return self.step >= self.horizon or self.lost
