"""The documents' tables of the wide suites: the claim, and the table of all problems.

python -m benchmarks.suites.wide default --half second --save
python -m benchmarks.suites.wide default --half second --total-steps --save
"""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.results import RESULTS as ALL_RESULTS
from benchmarks.results import Row
from benchmarks.results import read as read_rows
from benchmarks.suites.wide import SCHEDULED, UNTUNED
from learned_optim.meta_train.benchmark.scores import LARGEST_RATIO
from learned_optim.meta_train.benchmark.suites import load_suite

RESULTS = ALL_RESULTS / "wide"
RULE, TOLD = "default", "default total steps"
HELD_OUT, BEST = "held out, end", "best"
"""Columns: losses on data held out, over those of Adam at its default rate."""
Rows = Mapping[tuple[str, str], Row]
"""(problem, optimizer) -> row."""


def read(half: str, root: Path = RESULTS) -> Rows:
    """The rows of a half, ``"first"`` or ``"second"``, with and without a known end."""
    return {(row["problem"], row["optimizer"]): row for row in read_rows(root / "wide.csv") if row["half"] == half}


def problems_of(rows: Rows) -> list[str]:
    """The problems of the rows, in their order."""
    return list(dict.fromkeys(problem for problem, _ in rows))


def mean_ratio(rows: Rows, rule: str, other: str, column: str = "final") -> float:
    """Geometric mean of a rule's loss over another's; one problem counts as at most 10 and at least 1/10."""
    ratios = []
    for problem in problems_of(rows):
        ratio = float(rows[problem, rule][column]) / float(rows[problem, other][column])
        if math.isfinite(ratio):  # a problem without data that could be held out has no such loss
            ratios.append(min(max(ratio, 1 / LARGEST_RATIO), LARGEST_RATIO))
    return statistics.geometric_mean(ratios)


def lower(rows: Rows, rule: str, other: str) -> int:
    """The number of problems on which a rule's final loss is lower."""
    return sum(float(rows[p, rule]["final"]) < float(rows[p, other]["final"]) for p in problems_of(rows))


def claim(root: Path = RESULTS) -> str:
    """The README's claim, from the second half, by which no constant was chosen."""
    rows = read("second", root)
    problems = problems_of(rows)
    speedup = statistics.geometric_mean(float(rows[problem, RULE]["speed-up"]) for problem in problems)
    text = f"""On {len(problems)} problems by which nothing was chosen (networks for images, text and tables, pictures,
    equations, fine-tuning), the default rule, with nothing set, ends at {mean_ratio(rows, RULE, SCHEDULED):.2f} of the
    loss of AdamW with a tuned rate and a cosine to the known end (geometric mean; lower on
    {lower(rows, RULE, SCHEDULED)}), and is {speedup:.2f} times as fast as Adam at the best rate for each problem (in
    steps to Adam's final loss; lower in the end on {lower(rows, RULE, "Adam")}). Its lowest loss on data held out is
    {mean_ratio(rows, RULE, UNTUNED, BEST):.2f} of that of Adam at its default rate. Told how many steps there will be,
    it ends lower than AdamW with the cosine on {lower(rows, TOLD, SCHEDULED)}, and on data held out at
    {mean_ratio(rows, TOLD, SCHEDULED, HELD_OUT):.2f} of its loss."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False)


def table(half: str = "second", root: Path = RESULTS) -> str:
    """Final losses, problem by problem; bold where the rule's is below those of all three others."""
    rows = read(half, root)
    known = {problem.name: problem for problem in load_suite(f"wide-{half}").problems}
    lines = [
        "| problem | default rule | with `total_steps` | Adam, tuned | AdamW-cosine, tuned | Adam, 0.001 | speed-up |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for problem in problems_of(rows):
        others = [float(rows[problem, name]["final"]) for name in ("Adam", SCHEDULED, UNTUNED)]
        cells = [cell(float(rows[problem, name]["final"]), others) for name in (RULE, TOLD)]
        cells += [f"{other:.3g}" for other in others]
        title = f"{known[problem].title}, {known[problem].steps:,} steps"
        lines.append(f"| {title} | {' | '.join(cells)} | {rows[problem, RULE]['speed-up']} |")
    return "\n".join(lines)


def cell(loss: float, others: Sequence[float]) -> str:
    """A loss, bold where it is below all others."""
    return f"**{loss:.3g}**" if loss < min(others) else f"{loss:.3g}"
