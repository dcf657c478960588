"""Meta-training under a progress bar."""

import contextlib
import math
import sys
from typing import Any

from tqdm import tqdm

from learned_optim.meta_train.trainer.loop import MetaTraining


def run_with_progress(trainer: MetaTraining[Any, Any]) -> None:
    """Run ``trainer`` to its end: a live bar with the remaining time on a terminal, else a line for each validation.

    Of several processes the leader shows it.
    """
    live = sys.stderr.isatty() and trainer.world.leads
    with (
        tqdm(
            total=trainer.config.steps, initial=trainer.meta_step, unit="step", disable=not live, dynamic_ncols=True
        ) as bar,
        contextlib.closing(trainer.run()) as run,  # an interrupted run is saved here, not when memory is tidied up
    ):
        for progress in run:
            bar.update()
            if progress.validation is None or not trainer.world.leads:
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


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)
