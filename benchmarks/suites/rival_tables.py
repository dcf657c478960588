"""What the committed rows of the wide suite say of rivals as they come out of the box, beside the default rule.

python -m benchmarks.suites.wide --half second --rivals untuned --save
"""

import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.suites.wide import NOISELESS, UNTUNED, geometric_mean
from benchmarks.suites.wide_tables import BEST, HELD_OUT, RESULTS, RULE, Rows, lower, mean_ratio, problems_of, read
from learned_optim.meta_train.benchmark.contenders import REFERENCE
from learned_optim.meta_train.benchmark.rivals import RIVALS
from learned_optim.meta_train.benchmark.suites import load_suite

HALF = "second"  # no constant of the default rule was chosen by it
TITLES: Mapping[str, str] = {
    RULE: "default rule",
    **{
        f"{name}@{rate:g}": name if rate == 1 else f"{name}, {rate:g}"
        for name, rival in RIVALS.items()
        for rate in rival.untuned
    },
    UNTUNED: "Adam, 0.001",
}
"""Optimizer -> its name in the tables; a factor of 1 on a step size that is estimated says nothing."""


def rows_of_rivals(root: Path = RESULTS) -> Rows:
    """The rows of the problems on which every rival that has rows was run."""
    rows = read(HALF, root)
    names = measured(rows)
    problems = [problem for problem in problems_of(rows) if all((problem, name) in rows for name in names)]
    return {(problem, name): row for (problem, name), row in rows.items() if problem in problems}


def measured(rows: Rows) -> list[str]:
    """The default rule, rivals and untuned Adam, those of which there are rows; in the order of the tables."""
    known = {name for _, name in rows}
    return [name for name in TITLES if name in known]


def speed_up(rows: Rows, name: str, problems: Sequence[str], column: str = "speed-up") -> float:
    """Geometric mean of an optimizer's speed-up, over problems."""
    return statistics.geometric_mean(float(rows[problem, name][column]) for problem in problems)


def means(rows: Rows, name: str) -> list[float]:
    """Of an optimizer, geometric means over tuned Adam.

    Speed-up, that of networks alone, strict speed-up; final loss, and loss on data held out, at its lowest and at the
    end.
    """
    problems = problems_of(rows)
    families = {problem.name: problem.family for problem in load_suite(f"wide-{HALF}").problems}
    return [
        speed_up(rows, name, problems),
        speed_up(rows, name, [problem for problem in problems if families[problem] not in NOISELESS]),
        speed_up(rows, name, problems, "strict"),
        geometric_mean(float(rows[problem, name]["/ Adam"]) for problem in problems),
        mean_ratio(rows, name, REFERENCE, BEST),
        mean_ratio(rows, name, REFERENCE, HELD_OUT),
    ]


BETTER: tuple[Callable[[Iterable[float]], float], ...] = (max, max, max, min, min, min)
"""Of each of :func:`means`, which one is best."""


def means_table(root: Path = RESULTS) -> str:
    """A line for each optimizer with nothing tuned, with its means; the best figure of a column is bold."""
    rows = rows_of_rivals(root)
    figures = {name: means(rows, name) for name in measured(rows)}
    lines = [
        "| nothing tuned | speed-up | of networks alone | strict speed-up | final loss | held out, lowest "
        "| held out, at the end | the default ends lower on |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, cells in bold(figures, BETTER).items():
        ahead = "" if name == RULE else f"{lower(rows, RULE, name)} of {len(problems_of(rows))}"
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} | {ahead} |")
    return "\n".join(lines)


def bold(
    figures: Mapping[str, Sequence[float]], better: Sequence[Callable[[Iterable[float]], float]]
) -> dict[str, list[str]]:
    """Figures by name as cells; the best of each column is bold."""
    best = [choose(column) for choose, column in zip(better, zip(*figures.values(), strict=True), strict=True)]
    return {
        name: [f"**{value:.2f}**" if value == top else f"{value:.2f}" for value, top in zip(own, best, strict=True)]
        for name, own in figures.items()
    }


def problems_table(root: Path = RESULTS) -> str:
    """Final losses, problem by problem; the lowest of those with nothing tuned is bold."""
    rows = rows_of_rivals(root)
    names = measured(rows)
    known = {problem.name: problem for problem in load_suite(f"wide-{HALF}").problems}
    lines = [f"| problem | {' | '.join(TITLES[name] for name in names)} | Adam, tuned |"]
    lines.append("| --- " * (len(names) + 2) + "|")
    for problem in problems_of(rows):
        losses = [float(rows[problem, name]["final"]) for name in names]
        cells = [f"**{loss:.3g}**" if loss == min(losses) else f"{loss:.3g}" for loss in losses]
        adam = float(rows[problem, REFERENCE]["final"])
        lines.append(f"| {known[problem].title} | {' | '.join(cells)} | {adam:.3g} |")
    return "\n".join(lines)


def claim(root: Path = RESULTS) -> str:
    """Two sentences: the speed-ups, and on how many problems a rival ends below the default rule."""
    rows = rows_of_rivals(root)
    problems, names = problems_of(rows), measured(rows)
    speeds = {name: speed_up(rows, name, problems) for name in names}
    rivals = [name for name in names if name not in (RULE, UNTUNED)]
    first = max(rivals, key=lambda name: speeds[name])
    ahead = [p for p in problems if min(float(rows[p, n]["final"]) for n in rivals) < float(rows[p, RULE]["final"])]
    each = "; ".join(f"{TITLES[name]} on {lower(rows, name, RULE)}" for name in rivals)
    text = f"""With nothing tuned, on {len(problems)} problems, the default rule is {speeds[RULE]:.2f} times as fast as
    Adam at the best rate for each problem (in steps to Adam's final loss, geometric mean), and the fastest rival,
    {TITLES[first]}, is {speeds[first]:.2f} times as fast. At least one rival ends below the default rule on
    {len(ahead)} of them: {each}."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)
