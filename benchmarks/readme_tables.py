"""The README's tables of results and its claim, written from the committed results and from nothing else.

    python -m benchmarks.readme_tables            # rewrites what lies between the markers in README.md
    python -m benchmarks.readme_tables --check    # status 1 if that would change anything

A rule's figure is bold where it is below that of every baseline tuned. A star marks a rate at an edge of those tried.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from learned_optim.meta_train.evaluation import BASELINES, RATES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- {} table, written by benchmarks/readme_tables.py -->", "<!-- end of the table -->"

EDGE_MARK = r"\*"  # an asterisk of its own in Markdown
FOLDERS = ("unseen", "paper")
"""Where summary.csv is read; no problem may stand in two of them with the same optimizer."""

HELD_OUT = {
    "digits-relu-100": "digits 64-64-10 ReLU, 100 steps",
    "digits-relu-1000": "the same, 1,000 steps",
    "mnist-relu-100": "MNIST 784-64-10 ReLU, 100 steps",
    "mnist-relu-1000": "the same, 1,000 steps",
}
"""Problem -> title, of the first table."""


class PaperProblem(NamedTuple):
    """A row of the second table."""

    title: str
    rule: str
    """Shipped rule that was meta-trained on it."""
    paper: str
    """Ratio of the final losses of the 2016 paper's rule and its best tuned baseline."""


PAPER = {
    "quadratic": PaperProblem("10-d quadratic, 100 steps", "lstm-l2l-quadratic", "0.79"),
    "mnist": PaperProblem("MNIST 784-20-10 sigmoid, 100 steps", "lstm-l2l-mnist", "0.76"),
    "mnist-200": PaperProblem("the same, 200 steps", "lstm-l2l-mnist", "0.81"),
    "mnist-40-units": PaperProblem("40 units", "lstm-l2l-mnist", "0.65"),
    "mnist-2-layers": PaperProblem("2 layers of 20 units", "lstm-l2l-mnist", "0.46"),
    "mnist-relu": PaperProblem("ReLU (the paper's rule fails)", "lstm-l2l-mnist", "7.0"),
}

Row = Mapping[str, str]
Results = Mapping[tuple[str, str], Row]
"""(problem, optimizer) -> row of a summary.csv."""


def read_results(root: Path = RESULTS) -> Results:
    """All rows of the summaries."""
    results: dict[tuple[str, str], Row] = {}
    for folder in FOLDERS:
        with (root / folder / "summary.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                key = row["problem"], row["optimizer"]
                if key in results:
                    raise ValueError(f"{key} stands in two of {', '.join(FOLDERS)}")
                results[key] = row
    return results


def at_edge(row: Row) -> bool:
    """Whether a baseline's rate lies at an edge of those tried. Older summaries have no such column: fixed grid."""
    if "edge" in row:
        return bool(row["edge"])
    return float(row["rate"]) in (max(RATES), min(RATES))


def loss(results: Results, problem: str, optimizer: str) -> float:
    """Final loss."""
    return float(results[problem, optimizer]["final_loss"])


def best_baseline(results: Results, problem: str) -> float:
    """Lowest final loss of a tuned baseline."""
    return min(loss(results, problem, name) for name in BASELINES if (problem, name) in results)


def baselines_of(results: Results, problems: Iterable[str]) -> list[str]:
    """Baselines that were run on one of the problems, at least."""
    return [name for name in BASELINES if any((problem, name) in results for problem in problems)]


def baseline_cells(results: Results, problem: str, names: Sequence[str]) -> list[str]:
    """Final loss and rate of baselines; empty where one was not run."""
    cells = []
    for name in names:
        row = results.get((problem, name))
        mark = EDGE_MARK if row and at_edge(row) else ""
        cells.append(f"{number(row['final_loss'])} ({float(row['rate']):g}{mark})" if row else "")
    return cells


def rule_cell(results: Results, problem: str, rule: str) -> str:
    """Final loss of a rule, bold where it is below that of every tuned baseline."""
    text = number(results[problem, rule]["final_loss"])
    return f"**{text}**" if loss(results, problem, rule) < best_baseline(results, problem) else text


def number(text: str) -> str:
    """Three significant digits."""
    return f"{float(text):.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def held_out_table(results: Results) -> str:
    """The default rule beside tuned baselines."""
    baselines = baselines_of(results, HELD_OUT)
    rows = [
        [
            title,
            rule_cell(results, problem, "default"),
            *baseline_cells(results, problem, baselines),
            f"{loss(results, problem, 'default') / loss(results, problem, 'Adam'):.2f}",
            f"{loss(results, problem, 'default') / best_baseline(results, problem):.2f}",
        ]
        for problem, title in HELD_OUT.items()
    ]
    names = ["default rule", *baselines, "default / Adam", "default / best tuned"]
    return table(["problem (images held out from meta-training)", *names], rows)


def paper_table(results: Results) -> str:
    """The rules of the 2016 paper, each on its problem; problems without results are left out."""
    run = {name: problem for name, problem in PAPER.items() if (name, problem.rule) in results}
    baselines = baselines_of(results, run)
    rows = [
        [
            problem.title,
            rule_cell(results, name, problem.rule),
            rule_cell(results, name, "default"),
            *baseline_cells(results, name, baselines),
            f"{loss(results, name, problem.rule) / best_baseline(results, name):.2f}",
            problem.paper,
        ]
        for name, problem in run.items()
    ]
    return table(["problem", "lstm-l2l", "default rule", *baselines, "lstm-l2l / best tuned", "paper"], rows)


def claim(results: Results) -> str:
    """What the first table says, in a sentence."""
    ratios = [loss(results, problem, "default") / loss(results, problem, "Adam") for problem in HELD_OUT]
    return (
        f"With nothing set, the default rule ends at {min(ratios):.2f} to {max(ratios):.2f} times the training loss of "
        f"Adam at its best rate: {len(ratios)} trainings of networks\non images held out from its meta-training "
        "([results](#results))."
    )


TABLES: Mapping[str, Callable[[Results], str]] = {"claim": claim, "held-out": held_out_table, "paper": paper_table}
"""By the name that stands in the marker before the table."""


def updated(readme: str, results: Results) -> str:
    """The README with fresh tables."""
    for name, build in TABLES.items():
        begin = BEGIN.format(name)
        before, found, rest = readme.partition(begin)
        _, ended, after = rest.partition(END)
        if not (found and ended):
            raise ValueError(f"README.md must hold {begin!r} and, after it, {END!r}")
        readme = f"{before}{begin}\n{build(results)}\n{END}{after}"
    return readme


def main() -> int:
    """Write or check; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if the README is out of date")
    check = parser.parse_args().check
    readme = README.read_text()
    new = updated(readme, read_results())
    if new == readme:
        return 0
    if check:
        print("README.md does not show the committed results: run python -m benchmarks.readme_tables", file=sys.stderr)
        return 1
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
