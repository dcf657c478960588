"""The tables of the 2016 paper's experiments: three rules beside tuned baselines, and beside the paper's figures.

``benchmarks/tables.py`` writes them. A cell is empty where a rule has not been run, or the paper has no figure.
"""

from collections.abc import Iterable, Mapping

from benchmarks.suites.l2l_2016 import EXPERIMENTS, PAPER_RULE, Experiment
from benchmarks.suites.summary_tables import (
    Results,
    baseline_cells,
    baselines_of,
    best_baseline,
    loss,
    number,
    rule_cell,
    table,
)
from learned_optim.meta_train.benchmark.evaluation import BASELINES
from learned_optim.meta_train.benchmark.report import ratio_text

RULES = ("lstm-l2l", "specialised", "default")
"""Titles of the columns, in the order of :attr:`~benchmarks.suites.l2l_2016.Experiment.learned`: the paper's
architecture, the default's meta-trained on the same tasks, and the default."""


def experiments_run(results: Results) -> Iterable[tuple[str, Experiment]]:
    """Problem and experiment of those whose rule of the paper's architecture has been run."""
    return ((problem, each) for problem, each in EXPERIMENTS.items() if (problem, each.rule) in results)


def ratios_table(results: Results) -> str:
    """The rules over the best tuned baseline and over tuned Adam, the same of the paper's rule, and who is as good."""
    rows = []
    for problem, experiment in experiments_run(results):
        over_best = [over(results, problem, rule, best_baseline(results, problem)) for rule in experiment.learned]
        over_adam = [over(results, problem, rule, loss(results, problem, "Adam")) for rule in experiment.learned]
        rows.append(
            [
                experiment.title,
                *map(ratio_cell, over_best),
                ratio_cell(paper_over(experiment, *BASELINES)) or "below 1",
                reached(experiment, *over_best[:2]),
                *map(ratio_cell, over_adam),
                ratio_cell(paper_over(experiment, "Adam")),
            ]
        )
    best, adam = ([f"{rule} / {name}" for rule in (*RULES, "paper")] for name in ("best", "Adam"))
    return table(["problem", *best, "at or below the paper", *adam], rows)


def losses_table(results: Results) -> str:
    """Final losses of the rules, of Adam and of the best tuned baseline, beside those of the paper's figures."""
    rows = []
    for problem, experiment in experiments_run(results):
        ours = {name: loss(results, problem, name) for name in BASELINES if (problem, name) in results}
        paper = {name: value for name, value in experiment.published.items() if name != PAPER_RULE}
        published = [experiment.published.get(name) for name in (PAPER_RULE, "Adam")]
        rows.append(
            [
                experiment.title,
                *(
                    rule_cell(results, problem, rule) if (problem, rule) in results else ""
                    for rule in experiment.learned
                ),
                number(str(ours["Adam"])),
                lowest(ours),
                *("" if value is None else f"{value:g}" for value in published),
                lowest(paper),
            ]
        )
    return table(
        ["problem", *RULES, "Adam", "best tuned", "paper: LSTM", "paper: Adam", "paper: best tuned"],
        rows,
    )


def reproduction_table(results: Results) -> str:
    """All baselines with their rates, and the band of the rule of the paper's architecture."""
    run = list(experiments_run(results))
    baselines = baselines_of(results, [problem for problem, _ in run])
    rows = []
    for problem, experiment in run:
        row = results[problem, experiment.rule]
        band = f"{number(row['band_low'])} to {number(row['band_high'])}"
        rows.append([experiment.title, row["seeds"], rule_cell(results, problem, experiment.rule), band])
        rows[-1] += baseline_cells(results, problem, baselines)
    return table(["problem", "seeds", "lstm-l2l", "95% band", *baselines], rows)


def over(results: Results, problem: str, rule: str, reference: float) -> float | None:
    """Final loss of a rule over another loss; None where it has not been run."""
    return loss(results, problem, rule) / reference if (problem, rule) in results else None


def paper_over(experiment: Experiment, *baselines: str) -> float | None:
    """The paper's rule over the best of these baselines in its figures; None where it has none."""
    losses = [experiment.published[name] for name in baselines if name in experiment.published]
    return experiment.published[PAPER_RULE] / min(losses) if losses else None


def reached(experiment: Experiment, rule: float | None, specialised: float | None) -> str:
    """Which of two rules is at or below the paper's ratio, to two decimals; below 1 where that is unknown or above."""
    paper = paper_over(experiment, *BASELINES)
    known = paper is not None and paper < 1
    there = [
        name
        for name, ratio in zip(RULES, (rule, specialised), strict=False)
        if ratio is not None and (round(ratio, 2) <= round(paper, 2) if known and paper is not None else ratio < 1)
    ]
    return " and ".join(there) or "none"


def ratio_cell(ratio: float | None) -> str:
    """A ratio; empty where there is none."""
    return "" if ratio is None else ratio_text(ratio)


def lowest(losses: Mapping[str, float]) -> str:
    """Name and loss of the best; empty where there are none."""
    if not losses:
        return ""
    best = min(losses, key=lambda name: losses[name])
    return f"{best} {number(str(losses[best]))}"
