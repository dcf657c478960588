"""Take results of ``learned-optim benchmark`` into the committed ones, and draw their figures again.

    learned-optim benchmark horizon --problems fashion-mnist-10000 --out runs/horizon
    python -m benchmarks.suites.merge runs/horizon horizon        # into results/horizon

Rows of problems that both have are replaced, all others stay, in the order of the suite. ``provenance.json`` says of
each problem that was taken in when and where it was run.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import RESULTS, SUITES, merge
from benchmarks.suites.figures import redraw
from learned_optim.meta_train.benchmark.suites import load_suite


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder that learned-optim benchmark has written")
    parser.add_argument("target", help="below benchmarks/results")
    given = parser.parse_args(arguments)
    written = json.loads((given.source / "provenance.json").read_text(encoding="utf-8"))["suite"]
    suite = load_suite(SUITES.get(given.target, written))
    merge(given.source, RESULTS / given.target, [problem.name for problem in suite.problems])
    redraw(RESULTS / given.target, suite)


if __name__ == "__main__":
    main()
