"""What a specialised rule gains over the default, on draws of its task that were never seen."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learned_optim.files import csv_text, write_atomically
from learned_optim.meta_train.benchmark.cache import Cache, default_folder, problem_fingerprint
from learned_optim.meta_train.benchmark.scores import Result, Score, score
from learned_optim.meta_train.benchmark.suites import Suite, SuiteProblem
from learned_optim.meta_train.reports.comparison import compare
from learned_optim.meta_train.tasks import TaskFamily
from learned_optim.meta_train.tasks.lookup import build_family
from learned_optim.terminal import say

DRAWS, SEEDS, TUNING_SEEDS = 3, 8, 4
"""Tasks, training runs of each optimizer on each, and runs of each rate that is tried."""
BASELINES = ("Adam", "AdamW-cosine")
RATES = (0.1, 0.03, 0.01, 0.003, 0.001)  # continued while one of the ends is the best
DEFAULT = "default"


@dataclass(frozen=True)
class Gain:
    """The speed-up of a specialised rule over the default: in steps, geometric mean over draws, with 95% interval."""

    speedup: float
    low: float
    high: float
    loss_ratio: float
    """Final loss over that of the default, geometric mean over draws."""

    @property
    def better(self) -> bool:
        """Whether the whole interval lies above 1."""
        return self.low > 1

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        figures = (
            f"{self.speedup:.2f} times as fast as the default rule in steps "
            f"(95% interval {self.low:.2f} to {self.high:.2f}), final loss {self.loss_ratio:.2f} times the default's"
        )
        if self.better:
            return f"the specialised rule is better: {figures}"
        if self.high < 1:
            return f"the specialised rule is worse than the default, do not use it: {figures}"
        return f"the specialised rule is not shown to be better than the default: {figures}"


def compare_with_default(
    task: str, options: Mapping[str, Any], steps: int, weights: Path, out: Path, device: str = "cpu"
) -> Gain:
    """Train new tasks by the default, the specialised rule, and tuned baselines; print tables, write rows and plots.

    Args:
        task: name of a family.
        options: of the family.
        steps: of each training.
        weights: of the specialised rule.
        out: folder for results.
        device: where trainings run.
    """
    family = build_family(task, options, "task")
    problems = problems_of(task, options, family, steps)
    say(
        f"\ncomparing on {len(problems)} {'new draw' if len(problems) == 1 else 'new draws'} of the task, "
        f"{problems[0].seeds} seeds each, with {' and '.join(BASELINES)} tuned there"
    )
    suite = Suite("specialised", tuple(problems), "A specialised rule beside the default", BASELINES, rates=RATES)
    settings = {"command": "learned-optim specialise", "task": task}
    cache = Cache(default_folder())
    results = compare(suite, [DEFAULT, weights], out=out, cache=cache, settings=settings, device=device, seconds=True)
    rows = gain_rows(results)
    write_atomically(out / "gain.csv", csv_text([list(rows[0]), *(list(row.values()) for row in rows)]))
    say(f"\n{gain_table(rows)}")
    own, reference = of(results, weights.stem), of(results, DEFAULT)
    scored = score(own, reference)
    return Gain(scored.speedup, scored.low, scored.high, ratio(own, reference))


def problems_of(task: str, options: Mapping[str, Any], family: TaskFamily, steps: int) -> list[SuiteProblem]:
    """Some draws of the family from the test split; of a family with one task that one, with as many seeds in all."""
    draws = {problem_fingerprint(family, "test", draw): draw for draw in reversed(range(DRAWS))}.values()
    return [
        SuiteProblem(
            name=f"draw-{draw}",
            family=task,
            steps=steps,
            title=f"draw {draw}",
            seeds=SEEDS * DRAWS // len(draws),
            tuning_seeds=TUNING_SEEDS,
            draw=draw,
            options=dict(options),
        )
        for draw in sorted(draws)
    ]


def of(results: Mapping[str, Sequence[Result]], optimizer: str) -> list[Result]:
    """The results of an optimizer, problem by problem."""
    return [next(result for result in group if result.optimizer == optimizer) for group in results.values()]


def ratio(own: Sequence[Result], reference: Sequence[Result], part: str = "final") -> float:
    """Final loss, or ``held_out_best``, over that of the reference: geometric mean over problems."""
    pairs = zip((value(result, part) for result in own), (value(result, part) for result in reference), strict=True)
    logs = [math.log(mine / theirs) if mine > 0 and theirs > 0 else math.nan for mine, theirs in pairs]
    return math.exp(sum(logs) / len(logs))


def value(result: Result, part: str) -> float:
    """A loss of a result."""
    return result.final[0] if part == "final" else result.held_out_best


def gain_rows(results: Mapping[str, Sequence[Result]]) -> list[dict[str, str | float]]:
    """One for each optimizer, everything over the default rule; results have their timings.

    Each has the optimizer's name, speed-up in steps with the ends of its 95% interval, speed-up in seconds, final loss
    and, where data are held out, the lowest held-out loss.
    """
    reference = of(results, DEFAULT)
    holds = all(result.held_out is not None for result in reference)
    rows: list[dict[str, str | float]] = []
    for result in next(iter(results.values())):
        own = of(results, result.optimizer)
        line: Score = score(own, reference)
        row: dict[str, str | float] = {"optimizer": result.optimizer}
        row |= {"speedup": line.speedup, "low": line.low, "high": line.high}
        row |= {"in_seconds": score(own, reference, in_seconds=True).speedup, "final_loss": ratio(own, reference)}
        rows.append(row | ({"held_out_loss": ratio(own, reference, "held_out_best")} if holds else {}))
    return rows


def gain_table(rows: Sequence[Mapping[str, str | float]]) -> str:
    """The rows of :func:`gain_rows` as a table for people."""
    header = f"{'over the default rule':24}{'speed-up in steps':>20}{'95% interval':>18}{'in seconds':>12}"
    header += f"{'final loss':>12}"
    lines = [header + (f"{'held-out loss':>15}" if "held_out_loss" in rows[0] else "")]
    for row in rows:
        interval = f"{row['low']:.2f} ... {row['high']:.2f}"
        text = f"{row['optimizer']:24}{row['speedup']:20.2f}{interval:>18}{row['in_seconds']:12.2f}"
        text += f"{row['final_loss']:12.2f}"
        lines.append(text + (f"{row['held_out_loss']:15.2f}" if "held_out_loss" in row else ""))
    return "\n".join(lines)
