"""Horizons that grow in stages, when validation says that a stage has taught what it can.

After Chen et al. 2020, section 4.1: training goes on at a stage's horizon as long as that improves the score at the
*next* stage's. The yardstick of a stage is the score at its beginning.
"""

from collections.abc import Mapping
from typing import Any

from learned_optim.meta_train.config.settings import CurriculumConfig


class Curriculum:
    """The stage that a run is at.

    Args:
        settings: horizons of the stages, and when a stage is over.
    """

    def __init__(self, settings: CurriculumConfig) -> None:
        self.settings = settings
        self.stage = 0
        self.began = 0
        """Meta-steps before this stage."""
        self.best: float | None = None
        """Lowest score of this stage; None: not even its yardstick has been taken."""
        self.evaluations = 0
        self.improved = False
        self.finished = False
        """Whether the run is over: this stage has never improved, or it was the last."""

    @property
    def horizon(self) -> int:
        """Length of the inner trainings of this stage."""
        return self.settings.horizons[self.stage]

    @property
    def next_horizon(self) -> int:
        """Length of the inner trainings that decide about this stage."""
        return self.settings.horizons[min(self.stage + 1, len(self.settings.horizons) - 1)]

    def due(self, meta_step: int) -> bool:
        """Whether an evaluation is due after ``meta_step`` meta-steps, the last of them just done."""
        return not self.finished and (meta_step - self.began) % self.settings.every == 0

    def record(self, score: float, meta_step: int) -> None:
        """Take note of the score at :attr:`next_horizon` (lower is better); go on to the next stage if it is time."""
        if self.best is None:
            self.best = score
            return
        self.evaluations += 1
        if score < self.best:
            self.best, self.improved = score, True
        elif self.evaluations >= self.settings.evaluations:
            if self.improved and self.stage + 1 < len(self.settings.horizons):
                self.stage, self.began = self.stage + 1, meta_step
                self.best, self.evaluations, self.improved = None, 0, False
            else:
                self.finished = True

    def state(self) -> dict[str, Any]:
        """The state of the curriculum, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "settings"}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` has given."""
        vars(self).update(state)
