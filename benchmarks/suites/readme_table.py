"""The README's table of results: the default rule beside what people would pick instead, in steps and in seconds."""

import math
from collections.abc import Iterable
from pathlib import Path

from benchmarks.suites import wide_seconds
from benchmarks.suites.rival_tables import BETTER, TITLES, bold, means, measured, rows_of_rivals
from benchmarks.suites.wide import SCHEDULED, UNTUNED
from benchmarks.suites.wide_tables import RESULTS, RULE, lower, problems_of
from learned_optim.meta_train.benchmark.contenders import REFERENCE

MOST = 7  # rows: the default rule, two that are tuned, untuned Adam, and the fastest rivals
COLUMNS = (0, 3, 4)  # of the means of rivals: speed-up in steps, final loss, lowest loss on data held out


def table(root: Path = RESULTS) -> str:
    """The default rule beside the fastest rivals, each at the better of its rates, and tuned Adam and AdamW.

    With speed-ups in steps and in seconds, final loss and lowest loss on data held out, as means over tuned Adam, and
    the number of problems on which each ends below the default rule.
    """
    rows = rows_of_rivals(root)
    shown = {RULE: "default rule, nothing set", **{name: TITLES[name] for name in fastest(measured(rows), root)}}
    shown |= {REFERENCE: "Adam, tuned", SCHEDULED: "AdamW-cosine, tuned"}
    seconds = wide_seconds.means(list(shown), root)
    figures = {}
    for name in shown:
        steps, *losses = (means(rows, name)[column] for column in COLUMNS)
        figures[name] = [steps, seconds[name][1], *losses]
    first, *rest = (BETTER[column] for column in COLUMNS)
    lines = [
        "| | speed-up | in seconds | final loss | held out | ends below the default rule on |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, cells in bold(figures, [first, max, *rest]).items():
        ahead = "" if name == RULE else f"{lower(rows, name, RULE)} of {len(problems_of(rows))}"
        lines.append(f"| {shown[name]} | {' | '.join(cells)} | {ahead} |")
    return "\n".join(lines)


def fastest(names: Iterable[str], root: Path) -> list[str]:
    """The fastest rivals, each at the better of its rates, and untuned Adam: as many as the table has room for."""
    rows = rows_of_rivals(root)
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.partition("@")[0], []).append(name)
    better = [max(own, key=lambda name: means(rows, name)[0]) for kind, own in kinds.items() if kind != RULE]
    order = sorted(better, key=lambda name: -means(rows, name)[0] if name != UNTUNED else -math.inf)
    return [name for name in better if name in order[: MOST - 3]]
