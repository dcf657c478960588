"""Ordinary training programs with optimizers that nobody has tuned for them.

    python -m benchmarks.suites.programs baselines                      # Adam at four rates; once
    python -m benchmarks.suites.programs learned                        # the default with nothing set
    python -m benchmarks.suites.programs learned --rule FILE --total-steps  # other weights, told the program's length
    python -m benchmarks.suites.programs summary

Rows go to programs.csv, one for each program, optimizer and seed. A run whose row is there is not repeated, so an
interrupted command goes on where it stopped; ``--again`` repeats it, as after a change of the code or of a rule's file.
Seconds are those of the processor. Programs whose data are missing are skipped, with the reason.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from benchmarks.results import RESULTS as ALL_RESULTS
from benchmarks.results import Row, replaced, save_rows
from benchmarks.results import read as read_rows
from benchmarks.suites.program_list import PROGRAMS, TrainingProgram
from benchmarks.suites.program_loop import TrainingOutcome
from learned_optim import LearnedOptimizer
from learned_optim.meta_train.common.provenance import provenance
from learned_optim.meta_train.data.datasets import DataNotFoundError

RESULTS = ALL_RESULTS / "programs"
UNTUNED = "Adam@0.001"
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
FOR_GAMES = "Adam@0.0002, beta1 0.5"  # as Radford et al. (2016) set it for adversarial networks, which others took over
COLUMNS = ("program", "optimizer", "seed", "steps", *TrainingOutcome._fields, "seconds", "commit")
KEY = COLUMNS[:4]
NEAR, HALF_A_POINT = 1.05, 0.005  # a held-out loss and an accuracy that nobody would change an optimizer for

Build = Callable[[Iterable[nn.Parameter], int], Optimizer]
"""Parameters and the number of steps of the program -> optimizer."""


def adam(rate: float, beta: float = 0.9) -> Build:
    """Adam at a constant rate."""
    return lambda parameters, steps: Adam(parameters, rate, (beta, 0.999))


def baselines(program: str) -> dict[str, Build]:
    """Adam at each rate, by name; for adversarial networks also as they are usually trained."""
    found = {f"Adam@{rate:g}": adam(rate) for rate in RATES}
    return found | {FOR_GAMES: adam(2e-4, beta=0.5)} if program == "adversarial" else found


def learned(rule: str, settings: Mapping[str, Any], *, total_steps: bool) -> Build:
    """The learned optimizer; settings that are left out are its own."""

    def build(parameters: Iterable[nn.Parameter], steps: int) -> Optimizer:
        given = {**settings, "total_steps": steps} if total_steps else settings
        return LearnedOptimizer(parameters, rule, **given)

    return build


def label(rule: str, settings: Mapping[str, Any], *, total_steps: bool) -> str:
    """Name of these settings in the rows."""
    parts = [Path(rule).stem, *(f"{name} {value}" for name, value in settings.items())]
    return ", ".join([*parts, "total_steps"] if total_steps else parts)


def read(folder: Path) -> list[Row]:
    """The rows there are."""
    return read_rows(folder / "programs.csv")


def add(folder: Path, row: Row) -> None:
    """Write the row in place of one of the same program, optimizer, seed and number of steps, or at the end.

    The file is read again before, so that commands side by side keep each other's rows.
    """
    lines = ([each[column] for column in COLUMNS] for each in replaced(read(folder), [row], KEY))
    save_rows(folder, "programs", [COLUMNS, *lines], {"rates": RATES})


def run(folder: Path, name: str, optimizers: Mapping[str, Build], seed: int, *, again: bool = False) -> None:
    """Run a program with each optimizer that has no row yet, and write after each."""
    program, commit = PROGRAMS[name], str(provenance()["commit"])
    known = {tuple(row[column] for column in KEY) for row in read(folder)}
    for optimizer, build in optimizers.items():
        key = (name, optimizer, str(seed), str(program.steps))
        if key in known and not again:
            continue
        try:
            program.prepare()
            began = time.process_time()
            outcome = trained(program, build, seed)
        except (DataNotFoundError, ImportError) as error:
            print(f"{name} skipped: {error}")
            return
        seconds = time.process_time() - began
        values = ["" if value is None else f"{value:.6g}" for value in outcome]
        row = dict(zip(COLUMNS, (*key, *values, f"{seconds:.1f}", commit), strict=True))
        add(folder, row)
        print(*key[:2], *(f"{column} {row[column]}" for column in COLUMNS[4:-1] if row[column]), sep=", ", flush=True)


def trained(program: TrainingProgram, build: Build, seed: int) -> TrainingOutcome:
    """The outcome of a program; the caller's random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return program.run(lambda parameters: build(parameters, program.steps), program.steps)


class ProgramComparison(NamedTuple):
    """A learned optimizer on one program beside Adam, each the mean over their seeds."""

    program: str
    learned: Mapping[str, float]
    untuned: Mapping[str, float]
    best: Mapping[str, float]
    """The best of all of Adam's settings, chosen for each column by itself."""


SCORES = {"picture": "PSNR in decibels", "policy-gradient": "return", "adversarial": "Frechet distance"}
HIGH_IS_GOOD = ("accuracy", "score", "entropy")  # but for the score of "adversarial", a distance


def compared(rows: Sequence[Row], optimizer: str) -> list[ProgramComparison]:
    """The programs that both the optimizer and untuned Adam have rows of, over the seeds that the optimizer has."""
    found = []
    for program in PROGRAMS:
        own = [row for row in rows if row["program"] == program]
        seeds = {row["seed"] for row in own if row["optimizer"] == optimizer}
        by_name: dict[str, list[Row]] = {}
        for row in own:
            if row["seed"] in seeds:
                by_name.setdefault(row["optimizer"], []).append(row)
        means = {name: mean(group) for name, group in by_name.items() if len(group) == len(seeds)}
        if optimizer in means and UNTUNED in means:
            adams = [values for name, values in means.items() if name.startswith("Adam@")]
            best = {column: choice(program, column)(row[column] for row in adams) for column in means[optimizer]}
            found.append(ProgramComparison(program, means[optimizer], means[UNTUNED], best))
    return found


def choice(program: str, column: str) -> Callable[[Iterable[float]], float]:
    """The function that finds the best of several."""
    return max if column in HIGH_IS_GOOD and (program, column) != ("adversarial", "score") else min


def mean(rows: Sequence[Row]) -> dict[str, float]:
    """The mean of each column that the program has."""
    columns = [column for column in TrainingOutcome._fields if rows[0][column]]
    return {column: fmean(float(row[column]) for row in rows) for column in columns}


def geometric_mean(ratios: Sequence[float]) -> float:
    """The geometric mean of positive numbers; NaN of none."""
    return math.exp(fmean(map(math.log, ratios))) if ratios else math.nan


SHOWN = {"best_held_out_loss": ".4g", "held_out_loss": ".4g", "accuracy": ".3f", "score": ".4g"}
"""Columns of the table and their formats."""


def summary(rows: Sequence[Row], optimizer: str) -> str:
    """A table of the programs and the figures that sum them up."""
    comparisons = compared(rows, optimizer)
    titles = ("held-out loss, the least", "held-out loss at the end", "accuracy at the end", "score")
    lines = [
        f"{optimizer} | untuned Adam | best of Adam's settings, for each column by itself",
        " " * 24 + "".join(f"{title:>30}" for title in titles),
    ]
    for program, *values in comparisons:
        cells = (
            f"{format(row[column], SHOWN[column]) if column in row else '':>10}" for column in SHOWN for row in values
        )
        lines.append(f"{program:24}{''.join(cells)}".rstrip())
    losses = [one for one in comparisons if "held_out_loss" in one.learned]
    for column, words in (("best_held_out_loss", "least held-out loss"), ("held_out_loss", "held-out loss at the end")):
        ratios = [one.learned[column] / one.untuned[column] for one in losses]
        tuned = [one.learned[column] / one.best[column] for one in losses]
        lines.append(
            f"{words}: {geometric_mean(ratios):.3f} of untuned Adam's, {geometric_mean(tuned):.3f} of best Adam's "
            f"(geometric means); at most 5% above untuned Adam's on {sum(ratio <= NEAR for ratio in ratios)} of "
            f"{len(ratios)}, the most {max(ratios, default=math.nan):.3f}"
        )
    gains = [one.learned["accuracy"] - one.untuned["accuracy"] for one in comparisons if "accuracy" in one.learned]
    if gains:
        lines.append(
            f"accuracy at the end: {100 * fmean(gains):+.2f} points beside untuned Adam's (mean); at most half a point "
            f"lower on {sum(gain >= -HALF_A_POINT for gain in gains)} of {len(gains)}, least {100 * min(gains):+.1f}"
        )
    for one in comparisons:
        if one.program in SCORES:
            scores = (f"{values['score']:.4g}" for values in (one.learned, one.untuned, one.best))
            lines.append("{} {}, untuned Adam {}, best Adam {}".format(SCORES[one.program], *scores))
        if "entropy" in one.learned:
            entropies = (f"{values['entropy']:.2f}" for values in (one.learned, one.untuned))
            lines.append("entropy of the classes {}, untuned Adam {}, at most 2.30".format(*entropies))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("baselines", "learned", "summary"))
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="comma-separated; all by default")
    parser.add_argument("--seeds", default="0", help="comma-separated (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the rows (%(default)s)")
    parser.add_argument("--again", action="store_true", help="repeat runs that have a row")
    options = parser.add_argument_group("settings of the learned optimizer")
    options.add_argument("--rule", default="default", help="a shipped rule or a file (%(default)s)")
    options.add_argument("--lr", type=float, default=argparse.SUPPRESS)
    options.add_argument("--weight-decay", type=float, default=argparse.SUPPRESS)
    options.add_argument("--no-averaging", dest="averaging", action="store_false", default=argparse.SUPPRESS)
    options.add_argument("--total-steps", action="store_true", help="tell it how many steps the program takes")
    options.add_argument("--label", help="its name in the rows; by default made of the settings")
    given = parser.parse_args(arguments)
    names = given.programs.split(",")
    if unknown := set(names) - set(PROGRAMS):
        parser.error(f"unknown programs: {', '.join(sorted(unknown))}; known: {', '.join(PROGRAMS)}")
    if given.command == "summary":
        rows = [row for row in read(given.output) if row["program"] in names]
        for optimizer in dict.fromkeys(row["optimizer"] for row in rows if not row["optimizer"].startswith("Adam@")):
            print(summary(rows, optimizer), end="\n\n")
        return
    torch.set_num_threads(1)
    settings = {name: getattr(given, name) for name in ("lr", "weight_decay", "averaging") if hasattr(given, name)}
    own = given.label or label(given.rule, settings, total_steps=given.total_steps)
    entrants = {own: learned(given.rule, settings, total_steps=given.total_steps)}
    for seed in map(int, given.seeds.split(",")):
        for name in names:
            optimizers = baselines(name) if given.command == "baselines" else entrants
            run(given.output, name, optimizers, seed, again=given.again)


if __name__ == "__main__":
    main()
