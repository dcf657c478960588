"""Every generated table and claim in README.md and docs/, written from the committed results and from nothing else.

    python -m benchmarks.tables            # rewrites what lies between the markers in the documents
    python -m benchmarks.tables --check    # status 1 if that would change anything

A table stands where its markers do: ``<!-- NAME table, written by benchmarks/tables.py -->`` before it and
``<!-- end of the table -->`` behind, in README.md or any page of docs/.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks.estimators import equal_time
from benchmarks.few_shot import tables as few_shot
from benchmarks.results import RESULTS, ROOT, read, read_parts
from benchmarks.speed import scale
from benchmarks.suites import (
    cookbook_tables,
    l2l_starts,
    l2l_tables,
    metz_2019,
    neural_art,
    readme_table,
    rival_tables,
    robustness,
    specialised,
    summary_tables,
    wide_seconds,
    wide_tables,
)
from benchmarks.suites.summary_tables import Results, read_results, speedup_table
from learned_optim.files import write_atomically

BEGIN, END = "<!-- {} table, written by benchmarks/tables.py -->", "<!-- end of the table -->"
FEW_SHOT = RESULTS / "few_shot"
SPEEDUP_TABLES = ("generalization", "width", "horizon", "larger")


def table_of_suites(build: Callable[[Results], str]) -> str:
    """A table that is made of the summaries of suites."""
    return build(read_results())


TABLES: Mapping[str, Callable[[], str]] = {
    "claim": wide_tables.claim,
    "readme": readme_table.table,
    "wide": wide_tables.table,
    "rivals-claim": rival_tables.claim,
    "rivals": rival_tables.means_table,
    "rivals-seconds": wide_seconds.table,
    "rivals-problems": rival_tables.problems_table,
    **{name: partial(table_of_suites, partial(speedup_table, folder=name)) for name in SPEEDUP_TABLES},
    "held-out": partial(table_of_suites, summary_tables.held_out_table),
    "paper": partial(table_of_suites, l2l_tables.ratios_table),
    "paper-losses": partial(table_of_suites, l2l_tables.losses_table),
    "reproduction": partial(table_of_suites, l2l_tables.reproduction_table),
    "starts": l2l_starts.table,
    "metz-2019": metz_2019.table,
    "neural-art": neural_art.table,
    "programs": cookbook_tables.table,
    "waveforms": cookbook_tables.waveforms_table,
    "waveforms-claim": cookbook_tables.waveforms_claim,
    "robustness": robustness.table,
    "specialised": specialised.table,
    "equal-time": equal_time.table,
    "sine-waves": lambda: few_shot.sinusoid_table(read(FEW_SHOT / "sinusoid.csv")),
    "omniglot": lambda: few_shot.omniglot_table(
        read(FEW_SHOT / "omniglot.csv"), read_parts(FEW_SHOT / "omniglot.json")
    ),
    "few-shot-cost": lambda: few_shot.cost_table(read(FEW_SHOT / "cost.csv")),
    "scale": scale.table,
}
"""Name in a table's marker -> the function that builds the table."""


def documents(root: Path = ROOT) -> list[Path]:
    """The documents in which tables may stand."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def names_in(text: str) -> list[str]:
    """Names of the tables whose markers a text has, in their order."""
    return re.findall(re.escape(BEGIN).replace(r"\{\}", "(.+?)"), text)


def updated(document: str, text: str) -> str:
    """The text of a document with fresh tables.

    Raises:
        ValueError: a marker names no table, or the one of its end is missing.
    """
    for name in names_in(text):
        if name not in TABLES:
            raise ValueError(f"{document} asks for a table {name!r}; there are {', '.join(TABLES)}")
        begin = BEGIN.format(name)
        before, _, rest = text.partition(begin)
        _, ended, after = rest.partition(END)
        if not ended or names_in(rest.partition(END)[0]):
            raise ValueError(f"{document} must hold {END!r} after {begin!r}")
        text = f"{before}{begin}\n{TABLES[name]()}\n{END}{after}"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Write or check; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a document is out of date")
    check = parser.parse_args(arguments).check
    stale = []
    for path in documents(ROOT):
        old, shown = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        if (new := updated(shown, old)) != old:
            stale.append(shown)
            if not check:
                write_atomically(path, new)
    if check and stale:
        print(f"not as the committed results: {', '.join(stale)}; run python -m benchmarks.tables", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
