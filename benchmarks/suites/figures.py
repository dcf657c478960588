"""Figures of a suite, drawn from its committed rows.

    python -m benchmarks.suites.figures generalization              # results/generalization, suite generalization
    python -m benchmarks.suites.figures paper --suite l2l-2016
    python -m benchmarks.suites.figures readme                      # results/readme.png

Problems stand in the order of the suite, as in the tables. Rows hold no speed-ups of single seeds: the bar of a
speed-up spans those of the edges of the band of its loss curve, against the mean curve of tuned Adam. Edges are taken
step by step, so that this is wider than a bootstrap band of the speed-up would be.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.results import RESULTS, SUITES, Row, SuiteResults, read_suite
from benchmarks.suites import l2l_2016, readme_figure
from learned_optim.meta_train.benchmark.contenders import REFERENCE
from learned_optim.meta_train.benchmark.suites import Suite, SuiteProblem, load_suite
from learned_optim.meta_train.inner.speedups import speedup
from learned_optim.meta_train.reports.plots import (
    STYLE,
    Speed,
    comparison_figure,
    profile_figure,
    save_figure,
    speedup_figure,
)

README = "readme"


def redraw(folder: Path, suite: Suite) -> None:
    """Draw the figures that are there again; in a new folder loss curves, speed-ups and profile."""
    results = read_suite(folder)
    shown = drawn_results(results, suite)
    speeds = {group[0].problem.label: [speed(results, each) for each in group] for group in shown.values()}
    figures: dict[str, Callable[[], Figure]] = {
        "comparison": lambda: comparison_figure(shown),
        "speedup": lambda: speedup_figure(speeds),
        "profile": lambda: profile_figure(speeds),
        "seconds": lambda: comparison_figure(shown, "seconds"),
        "figure": lambda: l2l_2016.figure(results.curves),  # of results/paper
    }
    names = [name for name in figures if (folder / f"{name}.png").exists()]
    with mpl.rc_context(STYLE):
        for name in names or ("comparison", "speedup", "profile"):
            save_figure(figures[name](), folder / f"{name}.png")


def drawn_results(results: SuiteResults, suite: Suite) -> dict[str, list[Any]]:
    """Problem -> what is drawn of each of its results, in the order of the suite."""
    problems = {problem.name: problem for problem in suite.problems}
    shown: dict[str, list[Any]] = {name: [] for name in problems}
    for row in results.summary:
        if row["problem"] in problems:
            shown[row["problem"]].append(drawn_result(results, problems[row["problem"]], row))
    return {name: group for name, group in shown.items() if group}


def drawn_result(results: SuiteResults, problem: SuiteProblem, row: Row) -> Any:
    """The numbers that are drawn of a :class:`~learned_optim.meta_train.benchmark.scores.Result`."""
    optimizer, rate = row["optimizer"], row["rate"]
    return SimpleNamespace(
        problem=problem,
        optimizer=optimizer,
        is_rule=not rate,
        is_tuned=bool(rate) and "@" not in optimizer,
        rate=float(rate) if rate else None,
        curve=tuple(results.curves[row["problem"]][optimizer].T),
        speedup=float(row["speedup"]),
        diverged=int(row["diverged"]) > 0,
        timing=SimpleNamespace(step=float(row["seconds_per_step"])) if row["seconds_per_step"] else None,
    )


def speed(results: SuiteResults, result: Any) -> Speed:
    """The speed-up of a row, between those of the edges of the band of its curve."""
    problem, steps = result.problem.name, result.problem.steps
    reference = results.loss_curve(problem, REFERENCE, steps)[:, None]
    step, _, low, high = result.curve
    repeats = np.diff(step.astype(int), prepend=-1)
    edges = (np.repeat(edge, repeats)[: steps + 1, None] for edge in (high, low))
    slowest, fastest = (float(speedup(edge, reference, diverged=result.diverged)[0]) for edge in edges)
    factor = result.speedup
    return Speed(result.optimizer, result.is_rule, factor, min(slowest, factor), max(fastest, factor))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help=f"below benchmarks/results, or {README}")
    parser.add_argument("--suite", help="the suite that was run; by default the one that the folder is known to hold")
    given = parser.parse_args(arguments)
    if given.folder == README:
        readme_figure.save()
        return
    redraw(RESULTS / given.folder, load_suite(given.suite or SUITES.get(given.folder, given.folder)))


if __name__ == "__main__":
    main()
