"""From which initial parameters the tuned baselines end where the 2016 paper's figures show them.

    python -m benchmarks.suites.l2l_starts                               # all starts; rows in results/paper/starts.csv
    python -m benchmarks.suites.l2l_starts --starts torch,xavier         # the rows of the others stay
    python -m benchmarks.tables                                          # the table of docs/reproduction.md

The paper does not say how its networks start, and the code that was released later draws all parameters from
N(0, 0.01^2). Here the paper's baselines are tuned on its MNIST networks from other starts. Networks are trained on the
training images, as in the paper: 100 batches of the suite's 10,000 test images would show each more than once. A
start's misfit is the root mean square of log(loss / published loss) over all networks and baselines, as a factor.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import Row, read, save_part
from benchmarks.suites.l2l_2016 import NETWORKS, RESULTS
from benchmarks.suites.summary_tables import table as markdown_table
from learned_optim.meta_train.benchmark.cache import Cache, default_folder
from learned_optim.meta_train.benchmark.contenders import Contender, baseline
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.report import ratio_text
from learned_optim.meta_train.benchmark.scores import Result
from learned_optim.meta_train.benchmark.suites import Suite, load_suite
from learned_optim.meta_train.common.strict import unknown

ROWS = RESULTS / "starts.csv"
SEEDS = (
    8  # of each rate, and of each baseline at its best rate: means are then good to some percent, as the figures are
)
GRIDS: Mapping[str, tuple[float, ...]] = {
    "Adam": (0.1, 0.03, 0.01),
    "RMSprop": (0.03, 0.01, 0.003),
    "NAG": (3.0, 1.0, 0.3),
    "SGD": (3.0, 1.0, 0.3),
}
"""Baseline -> rates that are tried; further ones while an end is the best."""


class Start(NamedTuple):
    """Initial parameters of the networks."""

    title: str
    options: Mapping[str, Any]
    """Of the family."""


def normal(deviation: float) -> Start:
    """Weights and biases from a normal distribution."""
    gain = round(deviation / 0.01, 6)
    return Start(f"N(0, {deviation:g}^2)", {"gain": [gain, gain]})


STARTS: Mapping[str, Start] = {
    **{f"normal-{deviation:g}": normal(deviation) for deviation in (0.01, 0.03, 0.04, 0.05, 0.1)},
    "torch-half": Start("half of Torch's", {"initial": "torch", "gain": [0.5, 0.5]}),
    "torch": Start("Torch's, 1/sqrt(inputs)", {"initial": "torch"}),
    "xavier": Start("Xavier's, biases at 0", {"initial": "xavier"}),
}
"""Name in the rows -> start."""
FITTED_START = "normal-0.05"
"""The start of the suite's problems with a fitted start: of those that the rows cannot tell apart the simplest."""


def suite_from(start: Start, seeds: int) -> Suite:
    """The problems of suite ``l2l-2016`` from this start, on training images."""
    suite = load_suite("l2l-2016").only(NETWORKS)
    problems = tuple(
        dataclasses.replace(
            problem,
            options={**problem.options, **start.options},
            split="train",
            seeds=seeds,
            tuning_seeds=seeds,
            instances=None,
        )
        for problem in suite.problems
    )
    return dataclasses.replace(suite, problems=problems)


def contenders() -> list[Contender]:
    """The paper's baselines with their grids."""
    return [dataclasses.replace(baseline(name), grid=grid) for name, grid in GRIDS.items()]


def run(names: Sequence[str], seeds: int, cache: Cache, path: Path = ROWS) -> None:
    """Tune the baselines from each start, and write its rows when it is done."""
    harnesses = {name: Harness(suite_from(STARTS[name], seeds), contenders(), [], cache=cache) for name in names}
    with Bar(sum(harness.planned_steps() for harness in harnesses.values())) as bar:
        for name, harness in harnesses.items():
            rows = [row_of(name, result) for group in harness.results(bar) for result in group]
            header = ("start", "problem", "optimizer", "rate", "edge", "final_loss", "published", "seeds")
            details = {"options": STARTS[name].options, "split": "train"}
            save_part(path, ("start",), [header, *rows], details)
            bar.print(f"{STARTS[name].title}: off by {misfit(rows_of(read(path), name)):.3f}")


def row_of(name: str, result: Result) -> tuple[object, ...]:
    """A baseline on a problem from a start: its final loss beside the published one."""
    loss = f"{result.final[0]:.5g}"
    published = NETWORKS[result.problem.name].published[result.optimizer]
    key = (name, result.problem.name, result.optimizer)
    return (*key, f"{result.rate:g}", result.edge or "", loss, published, result.problem.seeds)


def rows_of(rows: Sequence[Row], start: str) -> list[Row]:
    """The rows of one start."""
    return [row for row in rows if row["start"] == start]


def logarithms(rows: Sequence[Row]) -> list[float]:
    """``log(loss / published loss)`` of each row."""
    return [math.log(float(row["final_loss"]) / float(row["published"])) for row in rows]


def misfit(rows: Sequence[Row]) -> float:
    """How far losses lie from the published ones, as a factor: ``exp`` of the root mean square of the logarithms."""
    found = logarithms(rows)
    return math.exp(math.sqrt(sum(value * value for value in found) / len(found)))


def table(path: Path = ROWS) -> str:
    """A row for each start, the best first: geometric means over the baselines of loss / published loss, and misfit."""
    rows = read(path)
    known = sorted((name for name in STARTS if rows_of(rows, name)), key=lambda name: misfit(rows_of(rows, name)))
    lines = []
    for name in known:
        own = rows_of(rows, name)
        means = [mean_ratio([row for row in own if row["problem"] == problem]) for problem in NETWORKS]
        lines.append([STARTS[name].title, *map(ratio_text, means), f"{misfit(own):.2f}"])
    titles = [experiment.title for experiment in NETWORKS.values()]
    return markdown_table(["start", *titles, "off by a factor of"], lines)


def mean_ratio(rows: Sequence[Row]) -> float:
    """Geometric mean of loss / published loss."""
    found = logarithms(rows)
    return math.exp(sum(found) / len(found))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", default=",".join(STARTS), help="comma-separated (%(default)s)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="trainings of each rate (%(default)s)")
    parser.add_argument("--cache", type=Path, default=default_folder(), help="where runs are stored (%(default)s)")
    given = parser.parse_args(arguments)
    names = given.starts.split(",")
    if absent := [name for name in names if name not in STARTS]:
        parser.error(f"--starts: {unknown(absent[0], STARTS)}")
    run(names, given.seeds, Cache(given.cache))


if __name__ == "__main__":
    main()
