"""What the speed-ups of the wide suite's second half are in seconds: its rows, and the time of a training step.

    python -m benchmarks.suites.wide_seconds                # on a quiet machine: rows in results/wide/seconds.csv
    python -m benchmarks.suites.wide_seconds --problems gru # the rows of the others stay

On each problem every optimizer that has rows there trains one network for some steps, in the loop that a user writes.
All take turns. A speed-up in seconds is that in steps, times tuned Adam's seconds of a step over the optimizer's own.
"""

import argparse
import functools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.results import Row, read, save_part
from benchmarks.suites.rival_tables import HALF, TITLES, bold, measured, rows_of_rivals
from benchmarks.suites.wide import SCHEDULED, contender
from benchmarks.suites.wide_tables import RESULTS, RULE, problems_of
from learned_optim.meta_train.benchmark.contenders import REFERENCE, Contender, baseline
from learned_optim.meta_train.benchmark.evaluation import comparison_task
from learned_optim.meta_train.benchmark.suites import load_suite
from learned_optim.meta_train.benchmark.timing import Timing, time_steps
from learned_optim.terminal import say

SECONDS = "seconds.csv"
LARGE = 100_000  # parameters
TIMED_RATE = 1e-4  # of what is tuned: at every rate a step takes as long
HEADER = ("problem", "optimizer", "parameters", "model_milliseconds", "optimizer_milliseconds", "rounds", "others")
Seconds = Mapping[tuple[str, str], float]
"""(problem, optimizer) -> seconds of a training step."""


def timed(problems: Iterable[str]) -> None:
    """Time the steps of some problems, and put their rows into the place of earlier ones."""
    contenders = [_contender(name) for name in (*measured(rows_of_rivals()), REFERENCE, SCHEDULED)]
    for problem in load_suite(f"wide-{HALF}").only(list(problems)).problems:
        task = comparison_task(problem.build(), problem.split, problem.draw)
        parameters = sum(parameter.numel() for parameter in task.module().parameters() if parameter.requires_grad)
        makers = {
            each.name: functools.partial(each.for_module, rate=each.rate or TIMED_RATE, steps=problem.steps)
            for each in contenders
        }
        timings = time_steps(task, makers, torch.device("cpu"))
        lines = [_line(problem.name, name, parameters, timing) for name, timing in timings.items()]
        save_part(RESULTS / SECONDS, ("problem", "optimizer"), [HEADER, *lines], {}, problem.name)
        say(f"{problem.name}, {parameters:,} parameters: {_summary(timings)}")


def _contender(name: str) -> Contender:
    return contender(name, {}) if name == RULE else baseline(name)


def _line(problem: str, name: str, parameters: int, timing: Timing) -> tuple[str, ...]:
    milliseconds = (f"{1e3 * seconds:.4g}" for seconds in (timing.model, timing.optimizer))
    others = "" if timing.others is None else f"{timing.others:.2f}"
    return problem, name, str(parameters), *milliseconds, str(timing.rounds), others


def _summary(timings: Mapping[str, Timing]) -> str:
    adam = timings[REFERENCE].step
    return ", ".join(f"{name} {timing.step / adam:.2f}" for name, timing in timings.items()) + " of Adam's time"


def steps_of(rows: Iterable[Row]) -> Seconds:
    """Seconds of a whole step from rows."""
    return {
        (row["problem"], row["optimizer"]): 1e-3
        * (float(row["model_milliseconds"]) + float(row["optimizer_milliseconds"]))
        for row in rows
    }


def speed_in_seconds(speedup: float, seconds: Seconds, problem: str, name: str) -> float:
    """A speed-up in steps over tuned Adam, as one in seconds."""
    return speedup * seconds[problem, REFERENCE] / seconds[problem, name]


def means(names: Sequence[str], root: Path = RESULTS) -> dict[str, list[float]]:
    """Optimizer -> geometric means of its speed-ups over tuned Adam: in steps, in seconds, and on large models."""
    rows, times = rows_of_rivals(root), read(root / SECONDS)
    seconds, sizes = steps_of(times), {row["problem"]: int(row["parameters"]) for row in times}
    problems = [problem for problem in problems_of(rows) if problem in sizes]
    large = [problem for problem in problems if sizes[problem] >= LARGE]
    figures = {}
    for name in names:
        steps = {problem: float(rows[problem, name]["speed-up"]) for problem in problems}
        clock = {problem: speed_in_seconds(steps[problem], seconds, problem, name) for problem in problems}
        kinds = steps.values(), clock.values(), [clock[problem] for problem in large]
        figures[name] = [statistics.geometric_mean(values) for values in kinds]
    return figures


def table(root: Path = RESULTS) -> str:
    """Speed-ups over tuned Adam of all with nothing tuned, and of AdamW-cosine, tuned; the best of a column is bold."""
    times = read(root / SECONDS)
    large = len({row["problem"] for row in times if int(row["parameters"]) >= LARGE})
    names = [*measured(rows_of_rivals(root)), SCHEDULED]
    lines = [
        f"| | in steps | in seconds | in seconds, {large} models of {LARGE:,} parameters and more |",
        "| --- | --- | --- | --- |",
    ]
    titles = {**TITLES, SCHEDULED: "AdamW-cosine, tuned"}
    for name, cells in bold(means(names, root), (max, max, max)).items():
        lines.append(f"| {titles[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default="", help="comma-separated; all that have rows by default")
    given = parser.parse_args(arguments)
    timed(given.problems.split(",") if given.problems else problems_of(rows_of_rivals()))


if __name__ == "__main__":
    main()
