"""The rows behind every table and figure: the one place that reads, writes, merges and replaces them.

An experiment is one CSV file and one JSON file below ``benchmarks/results/``. Where it was run in parts (one training
of many, say), columns tell the rows of a part from those of others, and the JSON file has the provenance of each part:
``{"shared": what all parts agree in, "parts": {name: the rest}}``.

A suite of ``learned-optim benchmark`` is a folder. The command writes a file a table; here they are fewer:

* ``summary.csv``: an optimizer on a problem. ``phase`` says ``comparison``, or ``tuning`` for a rate that was tried.
  Columns about held-out data and about seconds are empty, or not there, where these were not measured.
* ``curves.csv``: a problem at a step, at most 200 steps a problem; each optimizer has the mean loss since the step
  before, and the edges of its band (``low`` and ``high``). Five and four significant digits, as figures show.
* ``provenance.json``: when and where; ``merged`` and ``rerun`` for problems and rules of another day.

Losses of single seeds (``runs.csv``) are not committed: no table or figure reads them.
"""

import csv
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from learned_optim.files import csv_text, write_atomically
from learned_optim.meta_train.benchmark.contenders import REFERENCE
from learned_optim.meta_train.benchmark.evaluation import BASELINES
from learned_optim.meta_train.benchmark.report import held_out_columns
from learned_optim.meta_train.benchmark.scores import Result
from learned_optim.meta_train.common.provenance import provenance
from learned_optim.meta_train.inner.speedups import speedup

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

SUITES = {
    "paper": "l2l-2016",
    "larger": str(ROOT / "benchmarks" / "suites" / "larger.toml"),
    "width": str(ROOT / "benchmarks" / "suites" / "width.toml"),
}
"""Folder -> its suite, where that is not a shipped one of the folder's name."""

Row = Mapping[str, str]
Curves = dict[str, dict[str, np.ndarray]]
"""Problem -> optimizer -> ``(points, 4)``: step, mean loss, lower and upper edge of its band."""
POINT = ("step", "mean_loss", "band_low", "band_high")
COMPARISON, TUNING = "comparison", "tuning"
TIMING = {
    "lower_quartile": "seconds_lower",
    "upper_quartile": "seconds_upper",
    "rounds": "seconds_rounds",
    "optimizer_seconds_per_step": "optimizer_seconds_per_step",
    "load_of_others": "load_of_others",
}
"""Column of the command's ``timing.csv`` -> column of ``summary.csv``."""
OF_A_RUN = ("problems", "seeds", "suite", "rates", "merged", "rerun")
"""Entries of a suite's provenance that are of whole results; what else there is says when and where."""


# Rows of any experiment


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows; the columns are those of all rows, in the order of their first appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    write_atomically(path, csv_text([columns, *([row.get(column, "") for column in columns] for row in rows)]))


def save_rows(folder: Path, name: str, rows: Iterable[Sequence[object]], details: Mapping[str, Any]) -> None:
    """Write an experiment that runs as a whole: ``name.csv``, and provenance with ``details`` as ``name.json``.

    Args:
        folder: folder of both files; it is made if need be.
        name: without suffix.
        rows: lines of the CSV file, the first of them its header.
        details: everything else that determines the rows, as JSON can hold it.
    """
    write_atomically(folder / f"{name}.csv", csv_text(rows))
    write_atomically(folder / f"{name}.json", json.dumps({**provenance(), **details}, indent=2) + "\n")


def replaced(rows: Sequence[Row], fresh: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """The rows with ``fresh`` in the place of those that agree with one of them in ``keys``, or at the end."""
    taken = {tuple(row[key] for key in keys) for row in fresh}
    own = [place for place, row in enumerate(rows) if tuple(row[key] for key in keys) in taken]
    first = own[0] if own else len(rows)
    kept = [row for place, row in enumerate(rows) if place not in set(own)]
    return [*kept[:first], *fresh, *kept[first:]]


def save_part(
    path: Path, keys: Sequence[str], rows: Sequence[Sequence[object]], details: Mapping[str, Any], part: str = ""
) -> None:
    """Write the rows of one part of an experiment, and its provenance; other parts stay.

    Args:
        path: the CSV file; the JSON file beside it has the same name.
        keys: columns that tell the part's rows from those of others.
        rows: lines, the first of them the header.
        details: everything else that determines the rows, as JSON can hold it.
        part: name of the part in the JSON file; by default made of its keys.
    """
    header, *lines = rows
    fresh = [dict(zip(map(str, header), map(_text, line), strict=True)) for line in lines]
    write(path, replaced(read(path), fresh, keys))
    name = part or ", ".join(fresh[0][key] for key in keys)
    save_provenance(path, name, details)


def save_provenance(path: Path, part: str, details: Mapping[str, Any]) -> None:
    """Write when, where and with what a part of the experiment of a CSV file was measured."""
    own = json.loads(json.dumps({**provenance(), **details}))  # as the others were read: plain types, to be compared
    parts = read_parts(path.with_suffix(".json"))
    write_parts(path.with_suffix(".json"), {**parts, part: own})


def read_parts(path: Path) -> dict[str, Any]:
    """Part -> its provenance, of a JSON file; none where there is no file."""
    if not path.exists():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    return {name: _joined(document["shared"], part) for name, part in document["parts"].items()}


def write_parts(path: Path, parts: Mapping[str, Any]) -> None:
    """The counterpart of :func:`read_parts`: what all agree in is written once, every part on a line."""
    shared = _shared(list(parts.values()))
    lines = [f"    {json.dumps(name)}: {json.dumps(_without(part, shared))}" for name, part in parts.items()]
    body = ",\n".join(lines)
    common = json.dumps(shared, indent=2).replace("\n", "\n  ")
    write_atomically(path, f'{{\n  "shared": {common},\n  "parts": {{\n{body}\n  }}\n}}\n')


def _shared(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if len(parts) < 2:
        return {}
    found: dict[str, Any] = {}
    for key, value in parts[0].items():
        others = [part.get(key, _MISSING) for part in parts[1:]]
        if all(isinstance(each, dict) and each for each in (value, *others)):
            if inner := _shared([value, *others]):
                found[key] = inner
        elif all(type(each) is type(value) and each == value for each in others):
            found[key] = value
    return found


def _without(part: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    nested = {key: _without(part[key], value) for key, value in shared.items() if isinstance(value, dict) and value}
    own = {key: nested.get(key, value) for key, value in part.items() if key not in shared or key in nested}
    return {key: value for key, value in own.items() if not (key in nested and value == {})}


def _joined(shared: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    nested = {
        key: _joined(value, part[key])
        for key, value in shared.items()
        if isinstance(value, dict) and isinstance(part.get(key), dict)
    }
    return {**shared, **part, **nested}


_MISSING = object()


def _text(value: object) -> str:
    return "" if value is None else str(value)


# Suites of `learned-optim benchmark`


@dataclass
class SuiteResults:
    """The contents of a suite's folder."""

    summary: list[Row] = field(default_factory=list)
    tuning: list[Row] = field(default_factory=list)
    curves: Curves = field(default_factory=dict)

    def loss_curve(self, problem: str, optimizer: str, steps: int) -> np.ndarray:
        """Mean loss at every step, ``(steps + 1,)``, from points that are each the mean since the one before."""
        points = self.curves[problem][optimizer]
        repeats = np.diff(points[:, 0].astype(int), prepend=-1)
        return np.repeat(points[:, 1], repeats)[: steps + 1]


def read_suite(folder: Path) -> SuiteResults:
    """Results in the form that is committed, or in that of ``learned-optim benchmark``."""
    if (folder / "tuning.csv").exists():
        return _read_command(folder)
    curves: Curves = {}
    for row in read(folder / "curves.csv"):
        for name in list(row)[2::3]:
            if row[name]:
                values = (row["step"], row[name], row[f"{name} low"], row[f"{name} high"])
                _points(curves, row["problem"], name).append(list(map(float, values)))
    return SuiteResults(read_summary(folder), read_summary(folder, TUNING), _arrays(curves))


def read_summary(folder: Path, phase: str = COMPARISON) -> list[Row]:
    """The rows of ``summary.csv`` of one phase, without that column."""
    rows = (row for row in read(folder / "summary.csv") if row["phase"] == phase)
    return [{column: value for column, value in row.items() if column != "phase"} for row in rows]


def write_suite(folder: Path, results: SuiteResults) -> None:
    """The counterpart of :func:`read_suite`: ``summary.csv`` and ``curves.csv``, and no other table."""
    for name in ("runs", "tuning", "held_out", "timing"):
        (folder / f"{name}.csv").unlink(missing_ok=True)
    phases = ((COMPARISON, results.summary), (TUNING, results.tuning))
    write(folder / "summary.csv", [{"phase": phase, **row} for phase, rows in phases for row in rows])
    names = list(dict.fromkeys(name for curves in results.curves.values() for name in curves))
    lines: list[list[object]] = [
        ["problem", "step", *(f"{name}{edge}" for name in names for edge in ("", " low", " high"))]
    ]
    for problem, curves in results.curves.items():
        cells: dict[int, dict[str, list[str]]] = {}
        for name, points in curves.items():
            for step, mean, low, high in points:
                cells.setdefault(int(step), {})[name] = [f"{mean:.5g}", f"{low:.4g}", f"{high:.4g}"]
        empty = ["", "", ""]
        for step, known in sorted(cells.items()):
            lines.append([problem, step, *itertools.chain(*(known.get(name, empty) for name in names))])
    write_atomically(folder / "curves.csv", csv_text(lines))


def _read_command(folder: Path) -> SuiteResults:
    timings = {(row["problem"], row["optimizer"]): row for row in read(folder / "timing.csv")}
    summary = []
    for row in read(folder / "summary.csv"):
        timing = timings.get((row["problem"], row["optimizer"]))
        summary.append({**row, **({own: timing[column] for column, own in TIMING.items()} if timing else {})})
    tuning: list[Row] = [
        {
            **{key: row[key] for key in ("problem", "optimizer", "rate")},
            "final_loss": row["mean_final_loss"],
            "seeds": row["tuning_seeds"],
        }
        for row in read(folder / "tuning.csv")
    ]
    curves: Curves = {}
    for row in read(folder / "curves.csv"):
        _points(curves, row["problem"], row["optimizer"]).append([float(row[column]) for column in POINT])
    return SuiteResults(list(summary), tuning, _arrays(curves))


def _points(curves: Any, problem: str, optimizer: str) -> list[list[float]]:
    found: list[list[float]] = curves.setdefault(problem, {}).setdefault(optimizer, [])
    return found


def _arrays(curves: Any) -> Curves:
    return {problem: {name: np.array(points) for name, points in own.items()} for problem, own in curves.items()}


def merge(source: Path, target: Path, order: Sequence[str]) -> None:
    """Take the problems of ``source`` into the committed ``target``, in place of those of the same name.

    Args:
        source: a folder that ``learned-optim benchmark`` has written.
        target: a folder below ``benchmarks/results``, which need not be there yet.
        order: names of all problems of the suite.

    Raises:
        ValueError: the results are of two suites, or have other columns; nothing is written then.
    """
    theirs = json.loads((source / "provenance.json").read_text(encoding="utf-8"))
    new, details = read_suite(source), theirs
    if (target / "provenance.json").exists():
        ours = json.loads((target / "provenance.json").read_text(encoding="utf-8"))
        if theirs["suite"] != ours["suite"]:
            raise ValueError(f"{source} is of suite {theirs['suite']!r}, {target} of {ours['suite']!r}")
        old = read_suite(target)
        new = SuiteResults(
            _merged(new.summary, old.summary, order),
            _merged(new.tuning, old.tuning, order),
            {
                name: (new.curves | _others(old.curves, new.curves))[name]
                for name in order
                if name in old.curves | new.curves
            },
        )
        details = _merged_provenance(theirs, ours, order)
    write_suite(target, new)
    write_atomically(target / "provenance.json", json.dumps(details, indent=2) + "\n")


def _others(curves: Curves, but: Curves) -> Curves:
    return {problem: own for problem, own in curves.items() if problem not in but}


def _merged(theirs: Sequence[Row], ours: Sequence[Row], order: Sequence[str]) -> list[Row]:
    """Their rows, and ours of the problems that they do not have."""
    told = {column for row in ours for column, value in row.items() if value}  # without columns that others need
    if theirs and ours and (missing := told - set(theirs[0]) - set(TIMING.values())):
        raise ValueError(f"columns {', '.join(sorted(missing))} are not among those of the new rows")
    taken = {row["problem"] for row in theirs}
    kept = [row for row in ours if row["problem"] not in taken]
    return sorted([*kept, *theirs], key=lambda row: order.index(row["problem"]))


def _merged_provenance(theirs: dict[str, Any], ours: dict[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """Ours, with when and where each of their problems was run."""
    seeds = ours["seeds"] | theirs["seeds"]
    run = {key: value for key, value in theirs.items() if key not in OF_A_RUN}
    return {
        **ours,
        "problems": [name for name in order if name in seeds],
        "seeds": {name: seeds[name] for name in order if name in seeds},
        "merged": ours.get("merged", {}) | dict.fromkeys(theirs["problems"], run),
    }


def with_result(results: SuiteResults, result: Result) -> SuiteResults:
    """The results with those of a rule on a problem in place of earlier ones, or after the others of the problem.

    Raises:
        ValueError: the problem has no rows, so that there are no baselines to compare with; or they are of trainings on
            other data: on all, or on those that are not held out.
    """
    problem, optimizer = result.problem.name, result.optimizer
    places = [place for place, row in enumerate(results.summary) if row["problem"] == problem]
    if not places:
        raise ValueError(
            f"no rows of problem {problem!r} beside which {optimizer} could stand; run its baselines first"
        )
    held_out = any(results.summary[place].get("held_out_end") for place in places)
    if held_out != (result.held_out is not None):
        raise ValueError(
            f"the rows of {problem} are of trainings on {'four fifths' if held_out else 'all'} of the data, which the "
            "suite does otherwise now: run all of its optimizers by learned-optim benchmark, and merge the results"
        )
    row, behind = summary_row(results, result), places[-1] + 1
    fresh: Row = {column: row.get(column, "") for column in results.summary[0]}
    points = np.array([[float(f"{value:.6g}") for value in point] for point in zip(*result.curve, strict=True)])
    added = [*results.summary[:behind], fresh, *results.summary[behind:]]
    known = optimizer in results.curves[problem]
    return SuiteResults(
        replaced(results.summary, [fresh], ("problem", "optimizer")) if known else added,
        results.tuning,
        {**results.curves, problem: {**results.curves[problem], optimizer: points}},
    )


def summary_row(results: SuiteResults, result: Result) -> dict[str, str]:
    """Final loss, and how it compares with the baselines of the same problem."""
    problem, (final, low, high) = result.problem.name, result.final
    losses = {row["optimizer"]: float(row["final_loss"]) for row in results.summary if row["problem"] == problem}
    best = min(loss for optimizer, loss in losses.items() if optimizer in BASELINES)
    reference = results.loss_curve(problem, REFERENCE, result.problem.steps)
    factor = speedup(result.losses.mean(1)[:, None], reference[:, None], diverged=bool(result.diverged.any()))
    values = {"final_loss": final, "band_low": low, "band_high": high, "ratio_to_best_baseline": final / best}
    return {
        "problem": problem,
        "optimizer": result.optimizer,
        "rate": "",
        **{column: f"{value:.6g}" for column, value in values.items()},
        "steps": str(result.problem.steps),
        "seeds": str(result.problem.seeds),
        "speedup": f"{float(factor[0]):.6g}",
        "diverged": str(int(result.diverged.sum())),
        **{column: "" if value is None else f"{value:.6g}" for column, value in held_out_columns(result).items()},
    }


def note_rerun(folder: Path, rule: str, problems: Iterable[str]) -> None:
    """Write where and when a rule was run again, beside the provenance of the others."""
    path = folder / "provenance.json"
    details = json.loads(path.read_text(encoding="utf-8"))
    details.setdefault("rerun", {}).setdefault(rule, {}).update(dict.fromkeys(problems, provenance()))
    write_atomically(path, json.dumps(details, indent=2) + "\n")
