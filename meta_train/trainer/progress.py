"""Meta-training under a progress bar."""

import contextlib
import math
import statistics
import sys
from typing import Any

from tqdm import tqdm

from learned_optim.meta_train.trainer.log import Progress
from learned_optim.meta_train.trainer.loop import MetaTraining
from learned_optim.terminal import say


def run_with_progress(trainer: MetaTraining[Any, Any]) -> None:
    """Run ``trainer`` to its end: a live bar with the remaining time on a terminal, else a line for each validation.

    Says before the first meta-step what there is to get below, after some steps how long all will take, and at the end
    if no weights were better than the start. Of several processes the leader says it.
    """
    live = sys.stderr.isatty() and trainer.world.leads
    with (
        tqdm(
            total=trainer.config.steps, initial=trainer.meta_step, unit="step", disable=not live, dynamic_ncols=True
        ) as bar,
        contextlib.closing(trainer.run()) as run,  # an interrupted run is saved here, not when memory is tidied up
    ):
        if trainer.world.leads:
            trainer.tell = _say
        estimate = Estimate(trainer.config.steps)
        first = trainer.meta_step == 0
        for progress in run:
            bar.update()
            if not trainer.world.leads:
                continue
            if first and (baselines := getattr(trainer, "baselines", None)):
                _say(
                    "meta-step 0: validation "
                    + ", ".join(f"{_short(score)} {name}" for name, score in baselines.items())
                )
            first = False
            if line := estimate.after(progress, _validation_seconds(trainer)):
                _say(line)
            if progress.validation is None:
                continue
            best = (
                "best so far"
                if progress.validation == progress.best_validation
                else f"best {_short(progress.best_validation)}"
            )
            line = f"validation {_short(progress.validation)} ({best})"
            if live:
                bar.set_postfix_str(line)
            else:
                skipped = f", {progress.skipped} steps skipped" if progress.skipped else ""
                print(f"meta-step {progress.meta_step}: {line}{skipped}, {progress.seconds:.0f} s", flush=True)
    if trainer.world.leads and trainer.finished and getattr(trainer, "gained", None) is False:
        score = _short(trainer.best_validation)
        say(f"warning: no weights validated better than the start ({score}), which is kept as the best", error=True)


class Estimate:
    """How long a meta-step and a whole run take, by the first steps; nothing is said of runs of some seconds.

    Args:
        steps: meta-steps of the run.
    """

    MEASURED = 10
    """Steps that are looked at. The first half does not count: members of the pool run ahead when they begin."""
    PATIENCE = 30.0
    """Seconds after which fewer must do."""
    SHORT = 5.0
    """Seconds of a run whose length is not worth a line."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.clock: list[float] = []
        self.done = False

    def after(self, progress: Progress, validation: float = 0.0) -> str | None:
        """The estimate in words, once, when enough steps are known.

        Args:
            progress: of the latest step.
            validation: seconds of validations for each step.
        """
        if self.done:
            return None
        self.clock.append(progress.seconds)
        measured = len(self.clock)
        if measured < 4 or (measured <= self.MEASURED and self.clock[-1] - self.clock[0] < self.PATIENCE):
            return None
        self.done = True
        durations = [later - earlier for earlier, later in zip(self.clock, self.clock[1:], strict=False)]
        step = statistics.median(durations[len(durations) // 2 :])
        left = (step + validation) * (self.steps - progress.meta_step)
        if left < self.SHORT:
            return None
        return f"a meta-step takes {step:.2g} s; all {self.steps:,} take about {amount(progress.seconds + left)}"


def amount(seconds: float) -> str:
    """Seconds in words that suit their number."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _validation_seconds(trainer: MetaTraining[Any, Any]) -> float:
    """What validations add to each meta-step, where it was measured."""
    seconds: float = getattr(trainer, "validation_seconds", 0.0)
    return seconds / trainer.config.validation.every if seconds > 0 else 0.0


def _say(line: str) -> None:
    with tqdm.external_write_mode(file=sys.stdout):
        say(line)


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)
