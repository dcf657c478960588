"""Run a rule again on the problems of committed results; the rows of all others stay.

    python -m benchmarks.rerun_rule unseen default               # results/unseen, suite unseen
    python -m benchmarks.rerun_rule paper default --suite l2l-2016 --problems mnist,mnist-relu

After new weights nothing else has changed: tasks, batches and seeds of a suite are fixed, so baselines tuned on another
day are compared with as if they had run beside it. Speed-ups are counted on the committed curves, at most 200 points
long. ``provenance.json`` says when and where the rule was run.
"""

import argparse
import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from learned_optim.files import csv_text, write_atomically
from learned_optim.meta_train.benchmark.cache import Cache, default_folder
from learned_optim.meta_train.benchmark.contenders import REFERENCE
from learned_optim.meta_train.benchmark.evaluation import BASELINES
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.scores import Result
from learned_optim.meta_train.benchmark.suites import Suite, load_suite
from learned_optim.meta_train.common.provenance import provenance
from learned_optim.meta_train.inner.speedups import speedup
from learned_optim.meta_train.reports.plots import (
    STYLE,
    Speed,
    comparison_figure,
    profile_figure,
    save_figure,
    speedup_figure,
)

RESULTS = Path(__file__).parent / "results"
Row = dict[str, object]
Tables = dict[str, list[Row]]
TABLES = ("summary", "curves", "runs")


def read(folder: Path, names: Iterable[str] = TABLES) -> Tables:
    """Rows of tables of results; of those that hold a rule's, by default."""
    tables: Tables = {}
    for name in names:
        with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            tables[name] = [dict(row) for row in csv.DictReader(file)]
    return tables


def write(folder: Path, tables: Tables) -> None:
    """The counterpart of :func:`read`."""
    for name, rows in tables.items():
        write_atomically(folder / f"{name}.csv", csv_text([list(rows[0]), *(list(row.values()) for row in rows)]))


def replaced(tables: Tables, result: Result) -> Tables:
    """The tables with the rows of ``result`` in place of those of the same rule and problem.

    Raises:
        ValueError: there were none.
    """
    fresh = {"summary": [summary_row(tables, result)], "curves": curve_rows(result), "runs": run_rows(result)}
    return {name: _replaced(rows, fresh[name], result) for name, rows in tables.items()}


def _replaced(rows: Sequence[Row], fresh: Sequence[Row], result: Result) -> list[Row]:
    own = [place for place, row in enumerate(rows) if _is_of(row, result.problem.name, result.optimizer)]
    if not own:
        raise ValueError(f"no rows of {result.optimizer} on {result.problem.name} to replace")
    kept = [row for place, row in enumerate(rows) if place not in set(own)]
    filled = [dict.fromkeys(rows[0], "") | row for row in fresh]
    return [*kept[: own[0]], *filled, *kept[own[0] :]]


def _is_of(row: Mapping[str, object], problem: str, optimizer: str) -> bool:
    return row["problem"] == problem and row["optimizer"] == optimizer


def summary_row(tables: Tables, result: Result) -> Row:
    """Final loss, and how it compares with the baselines of the same problem."""
    name, (final, low, high) = result.problem.name, result.final
    losses = {
        str(row["optimizer"]): float(str(row["final_loss"])) for row in tables["summary"] if row["problem"] == name
    }
    best = min(loss for optimizer, loss in losses.items() if optimizer in BASELINES)
    reference = curve(tables, name, REFERENCE, result.problem.steps)
    factor = speedup(result.losses.mean(1)[:, None], reference[:, None], diverged=bool(result.diverged.any()))
    values = {"final_loss": final, "band_low": low, "band_high": high, "ratio_to_best_baseline": final / best}
    return {
        **_key(result),
        **{column: f"{value:.6g}" for column, value in values.items()},
        "steps": result.problem.steps,
        "seeds": result.problem.seeds,
        "speedup": f"{float(factor[0]):.6g}",
        "diverged": int(result.diverged.sum()),
    }


def curve(tables: Tables, problem: str, optimizer: str, steps: int) -> np.ndarray:
    """Mean loss at every step ``(steps + 1,)``, from points that are each the mean since the one before."""
    places, means, *_ = points(tables, problem, optimizer)
    return np.repeat(means, np.diff(places.astype(int), prepend=-1))[: steps + 1]


def curve_rows(result: Result) -> list[Row]:
    """One for each point."""
    columns = ("step", "mean_loss", "band_low", "band_high")
    points = zip(*result.curve, strict=True)
    return [
        _key(result) | dict(zip(columns, (int(step), *(f"{value:.6g}" for value in values)), strict=True))
        for step, *values in points
    ]


def run_rows(result: Result) -> list[Row]:
    """One for each seed."""
    return [
        _key(result)
        | {"seed": seed, "initial_loss": f"{initial:.6g}", "final_loss": f"{final:.6g}", "diverged": int(diverged)}
        for seed, (initial, final, diverged) in enumerate(
            zip(result.losses[0], result.finals, result.diverged, strict=True)
        )
    ]


def _key(result: Result) -> Row:
    return {"problem": result.problem.name, "optimizer": result.optimizer, "rate": ""}


def rerun(folder: Path, suite_name: str, rule: str, problems: Iterable[str], cache: Cache) -> None:
    """Run the rule on these problems and write after each; of those committed, all by default."""
    tables, suite = read(folder), load_suite(suite_name)
    known = [str(row["problem"]) for row in tables["summary"] if row["optimizer"] == rule]
    suite = suite.only(list(problems) or known)
    harness = Harness(suite, [], [rule], cache=cache)
    with Bar(harness.planned_steps()) as bar:
        for (result,) in harness.results(bar):
            tables = replaced(tables, result)
            write(folder, tables)
            note(folder, rule, result.problem.name)
            bar.print(f"{result.problem.label}: {result.final[0]:.4g}")
    redraw(folder, load_suite(suite_name))


def note(folder: Path, rule: str, problem: str) -> None:
    """Where and when the rule was run, beside the provenance of the others."""
    path = folder / "provenance.json"
    details = json.loads(path.read_text(encoding="utf-8"))
    details.setdefault("rerun", {}).setdefault(rule, {})[problem] = provenance()
    write_atomically(path, json.dumps(details, indent=2) + "\n")


def redraw(folder: Path, suite: Suite) -> None:
    """The figure of loss curves, and the others that are there, from the rows.

    Rows hold no speed-ups of single seeds, so that the latter has no bands.
    """
    from benchmarks import l2l_2016  # which imports what imports this

    tables = read(folder)
    problems = {problem.name: problem for problem in suite.problems}
    shown: dict[str, list[Any]] = {name: [] for name in problems}
    speeds: dict[str, list[Speed]] = {problem.label: [] for problem in suite.problems}
    for row in tables["summary"]:
        name, optimizer, rate = (str(row[column]) for column in ("problem", "optimizer", "rate"))
        if name not in problems:
            continue
        shown[name].append(
            SimpleNamespace(  # what is drawn of a Result
                problem=problems[name],
                optimizer=optimizer,
                is_rule=not rate,
                is_tuned=bool(rate) and "@" not in optimizer,
                rate=float(rate) if rate else None,
                curve=points(tables, name, optimizer),
            )
        )
        factor = float(str(row["speedup"]))
        speeds[problems[name].label].append(Speed(optimizer, not rate, factor, factor, factor))
    figures: dict[str, Callable[[], Figure]] = {
        "comparison": lambda: comparison_figure({name: group for name, group in shown.items() if group}),
        "speedup": lambda: speedup_figure({label: group for label, group in speeds.items() if group}),
        "profile": lambda: profile_figure({label: group for label, group in speeds.items() if group}),
    }
    figures["figure"] = lambda: l2l_2016.figure(l2l_2016.read_curves(folder))  # of results/paper
    with mpl.rc_context(STYLE):
        for name, draw in figures.items():
            if name == "comparison" or (folder / f"{name}.png").exists():
                save_figure(draw(), folder / f"{name}.png")


def points(tables: Tables, problem: str, optimizer: str) -> tuple[np.ndarray, ...]:
    """Steps, mean loss, lower and upper edge of its band: as :attr:`Result.curve`."""
    rows = [row for row in tables["curves"] if _is_of(row, problem, optimizer)]
    columns = ("step", "mean_loss", "band_low", "band_high")
    return tuple(np.array([float(str(row[column])) for row in rows]) for column in columns)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="below benchmarks/results")
    parser.add_argument("rule", help="name of a shipped rule, as it stands in the tables")
    parser.add_argument("--suite", help="the suite that was run; by default named like the folder")
    parser.add_argument("--problems", default="", help="comma-separated; all by default")
    parser.add_argument("--cache", type=Path, default=default_folder(), help="where runs are stored (%(default)s)")
    given = parser.parse_args(arguments)
    problems = [name for name in given.problems.split(",") if name]
    rerun(RESULTS / given.folder, given.suite or given.folder, given.rule, problems, Cache(given.cache))


if __name__ == "__main__":
    main()
