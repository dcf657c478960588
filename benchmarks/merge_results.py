"""Take problems that were run by themselves into committed results of the same suite.

    learned-optim benchmark horizon --problems fashion-mnist-10000 --out runs/horizon
    python -m benchmarks.merge_results runs/horizon horizon        # into results/horizon, and draws loss curves again

Rows of problems that both have are replaced, all others stay, in the order of the suite. ``provenance.json`` says of
each problem that was taken in when and where it was run.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import rerun_rule
from benchmarks.rerun_rule import RESULTS, Row, read, redraw, write
from learned_optim.files import write_atomically
from learned_optim.meta_train.benchmark.suites import load_suite

TABLES = (*rerun_rule.TABLES, "tuning")
OF_A_RUN = ("problems", "seeds", "suite", "rates", "merged", "rerun")
"""Entries of provenance that are of whole results; what else there is says when and where."""


def merge(source: Path, target: Path, order: Sequence[str]) -> None:
    """Write the problems of ``source`` into ``target``; ``order``: names of all problems of the suite.

    Raises:
        ValueError: the results are of two suites, or a table has other columns; nothing is written then.
    """
    theirs, ours = (json.loads((folder / "provenance.json").read_text(encoding="utf-8")) for folder in (source, target))
    if theirs["suite"] != ours["suite"]:
        raise ValueError(f"{source} is of suite {theirs['suite']!r}, {target} of {ours['suite']!r}")
    new, old = read(source, TABLES), read(target, TABLES)
    write(target, {name: merged_rows(new[name], old[name], order) for name in TABLES})
    write_atomically(target / "provenance.json", json.dumps(merged_provenance(theirs, ours, order), indent=2) + "\n")


def merged_rows(theirs: Sequence[Row], ours: Sequence[Row], order: Sequence[str]) -> list[Row]:
    """Their rows, and ours of the problems that they do not have."""
    if list(theirs[0]) != list(ours[0]):
        raise ValueError(f"columns {list(theirs[0])} and {list(ours[0])} do not go together")
    taken = {row["problem"] for row in theirs}
    kept = [row for row in ours if row["problem"] not in taken]
    return sorted([*kept, *theirs], key=lambda row: order.index(str(row["problem"])))


def merged_provenance(theirs: dict[str, Any], ours: dict[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """Ours, with when and where each of their problems was run."""
    seeds = ours["seeds"] | theirs["seeds"]
    run = {key: value for key, value in theirs.items() if key not in OF_A_RUN}
    return {
        **ours,
        "problems": [name for name in order if name in seeds],
        "seeds": {name: seeds[name] for name in order if name in seeds},
        "merged": ours.get("merged", {}) | dict.fromkeys(theirs["problems"], run),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder that learned-optim benchmark has written")
    parser.add_argument("target", help="below benchmarks/results")
    given = parser.parse_args(arguments)
    target = RESULTS / given.target
    suite = load_suite(json.loads((target / "provenance.json").read_text(encoding="utf-8"))["suite"])
    merge(given.source, target, [problem.name for problem in suite.problems])
    redraw(target, suite)


if __name__ == "__main__":
    main()
