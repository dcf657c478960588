"""Compare learned rules with tuned hand-designed optimizers; write CSV, provenance and a figure."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import learned_optim
from learned_optim import LearnedOptimizer
from learned_optim.files import csv_text, write_atomically
from learned_optim.meta_train.evaluation import BASELINES, RATES, Edge, Problem, final_loss, mean_and_band
from learned_optim.meta_train.tasks import MLPFamily, QuadraticFamily, TaskFamily

TUNING_SEED, COMPARISON_SEED = 1, 2  # the same architecture, other starting points, batches and random problems

EDGE_MARK = "*"  # behind a rate at an edge of the tried ones


@dataclass(frozen=True)
class Comparison:
    """One problem of the benchmark and the rules that are shown on it unless others are asked for."""

    title: str
    family: TaskFamily
    steps: int
    rules: tuple[str, ...]


RELU_MNIST = MLPFamily(width=(64, 64), activations=("relu",), initial="torch")
RELU_DIGITS = MLPFamily(dataset="digits", width=(64, 64), activations=("relu",), batch_size=(64, 64), initial="torch")

COMPARISONS: dict[str, Comparison] = {
    "quadratic": Comparison("10-d quadratic", QuadraticFamily(), 100, ("lstm-l2l-quadratic", "default")),
    "mnist": Comparison("MNIST, 784-20-10 sigmoid", MLPFamily(), 100, ("lstm-l2l-mnist", "default")),
    "mnist-relu-100": Comparison("MNIST, 784-64-10 ReLU", RELU_MNIST, 100, ("default",)),
    "mnist-relu-1000": Comparison("MNIST, 784-64-10 ReLU", RELU_MNIST, 1000, ("default",)),
    "digits-relu-100": Comparison("digits, 64-64-10 ReLU", RELU_DIGITS, 100, ("default",)),
    "digits-relu-1000": Comparison("digits, 64-64-10 ReLU", RELU_DIGITS, 1000, ("default",)),
}
"""Problems by name. All are evaluated on the test part of the data."""


@dataclass(frozen=True)
class Curve:
    """What one optimizer did on one problem."""

    optimizer: str
    """Name of a baseline, or of a rule."""
    rate: float | None
    """Tuned learning rate of a baseline; None for a rule, which has none."""
    mean: np.ndarray
    """Mean loss over the seeds, ``(steps + 1,)``."""
    low: np.ndarray
    """Lower edge of the bootstrap 95% band of the mean."""
    high: np.ndarray
    """Upper edge."""
    final: float
    """Mean loss of the last tenth of the steps."""
    final_low: float
    final_high: float
    edge: Edge | None = None
    """End of the tried rates at which a baseline's rate lies: it may be understated. None: inside, or a rule."""

    @property
    def is_baseline(self) -> bool:
        """Whether this is a hand-designed optimizer."""
        return self.rate is not None

    @property
    def label(self) -> str:
        """Name, with the rate where one was tuned."""
        return f"{self.optimizer} (lr {self.rate:g})" if self.is_baseline else self.optimizer


def compare(
    comparison: Comparison,
    rules: Sequence[str | Path],
    seeds: int,
    *,
    baselines: Iterable[str] = tuple(BASELINES),
    rates: Sequence[float] = RATES,
    tuning_seeds: int | None = None,
    report: Callable[[str], None] = lambda message: None,
) -> list[Curve]:
    """Tune each baseline on training runs of its own, then take baselines and rules through the same fresh ones.

    All runs train the same architecture: see :class:`~learned_optim.meta_train.evaluation.Problem`.

    Args:
        comparison: the problem.
        rules: names or paths; taken as they are, nothing about them is tuned.
        seeds: training runs of each optimizer.
        baselines: names from :data:`BASELINES`.
        rates: grid on which each baseline's rate is chosen for the lowest mean final loss; extended upwards, up to 30,
            while its highest rate is the best. A baseline whose rate still lies at an edge is flagged.
        tuning_seeds: training runs for each rate; None: as many as ``seeds``, but at most 32.
        report: called with a line of progress now and then.
    """
    tuning = Problem(comparison.family, tuning_seeds or min(seeds, 32), comparison.steps, TUNING_SEED)
    problem = Problem(comparison.family, seeds, comparison.steps, COMPARISON_SEED)
    curves = []
    for name in baselines:
        report(f"{comparison.title}: tuning {name} over {len(rates)} rates")
        tuned = tuning.tune(name, rates)
        make, rate = BASELINES[name], tuned.rate
        losses = problem.run(lambda parameters, make=make, rate=rate: make(parameters, rate))  # type: ignore[misc]
        curves.append(_curve(name, rate, losses, tuned.edge))
    for rule in rules:
        name = rule.stem if isinstance(rule, Path) else rule
        report(f"{comparison.title}: running {name}")
        curves.append(_curve(name, None, problem.run(lambda parameters, rule=rule: LearnedOptimizer(parameters, rule))))  # type: ignore[misc]
    return curves


def best_baseline(curves: Iterable[Curve]) -> Curve:
    """The baseline with the lowest final loss."""
    return min((curve for curve in curves if curve.is_baseline), key=lambda curve: curve.final)


def table(curves: Sequence[Curve]) -> str:
    """Final losses, best first, with their ratio to the best baseline, as aligned text with notes below."""
    best = best_baseline(curves).final
    rows = [("optimizer", "rate", "final loss", "95% band", "/ best tuned")]
    for curve in sorted(curves, key=lambda curve: curve.final):
        rate = f"{curve.rate:g}{EDGE_MARK if curve.edge else ''}" if curve.is_baseline else "none to tune"
        band = f"{curve.final_low:.4g} ... {curve.final_high:.4g}"
        rows.append((curve.optimizer, rate, f"{curve.final:.4g}", band, f"{curve.final / best:.2f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [
        f"{EDGE_MARK} {curve.optimizer}: the best rate lies at the {curve.edge} edge of those tried, "
        "a rate beyond it may be better: this baseline may be understated"
        for curve in curves
        if curve.edge
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:], *notes])


def save_results(results: Mapping[str, Sequence[Curve]], folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Write ``summary.csv``, ``curves.csv`` and ``provenance.json``; returns their paths.

    The summary's column ``edge`` says "lower" or "upper" where a baseline's best rate lies at that end of those tried.
    """
    summary: list[tuple[str, ...]] = [
        ("problem", "optimizer", "rate", "final_loss", "band_low", "band_high", "ratio_to_best_baseline", "edge")
    ]
    curves: list[tuple[str, ...]] = [("problem", "optimizer", "rate", "step", "mean_loss", "band_low", "band_high")]
    for problem, problem_curves in results.items():
        best = best_baseline(problem_curves).final
        for curve in problem_curves:
            key = (problem, curve.optimizer, "" if curve.rate is None else f"{curve.rate:g}")
            numbers = (curve.final, curve.final_low, curve.final_high, curve.final / best)
            summary.append((*key, *(f"{number:.6g}" for number in numbers), curve.edge or ""))
            for step, values in enumerate(zip(curve.mean, curve.low, curve.high, strict=True)):
                curves.append((*key, str(step), *(f"{value:.6g}" for value in values)))
    write_atomically(folder / "summary.csv", csv_text(summary))
    write_atomically(folder / "curves.csv", csv_text(curves))
    write_atomically(folder / "provenance.json", json.dumps({**settings, **provenance()}, indent=2) + "\n")
    return [folder / name for name in ("summary.csv", "curves.csv", "provenance.json")]


def save_rows(folder: Path, name: str, rows: Iterable[Sequence[object]], details: Mapping[str, Any]) -> None:
    """Write ``name.csv``, and provenance with ``details`` as ``name.json``."""
    write_atomically(folder / f"{name}.csv", csv_text(rows))
    write_atomically(folder / f"{name}.json", json.dumps({**provenance(), **details}, indent=2) + "\n")


def provenance() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "learned_optim": learned_optim.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _curve(name: str, rate: float | None, losses: np.ndarray, edge: Edge | None = None) -> Curve:
    mean, low, high = mean_and_band(losses)
    final, final_low, final_high = (float(value[0]) for value in mean_and_band(final_loss(losses)[None]))
    return Curve(name, rate, mean, low, high, final, final_low, final_high, edge)


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
