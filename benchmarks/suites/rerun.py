"""Run a rule again on the problems of committed results, or a new one beside them; the rows of all others stay.

    python -m benchmarks.suites.rerun unseen default               # results/unseen, suite unseen
    python -m benchmarks.suites.rerun paper default --problems mnist,mnist-relu
    python -m benchmarks.suites.rerun paper runs/specialised-cifar.safetensors --problems cifar-10,cifar-5,cifar-2

After new weights nothing else has changed: tasks, batches and seeds of a suite are fixed, so baselines tuned on another
day are compared with as if they had run beside it. Speed-ups are counted on the committed curves, at most 200 points
long. ``provenance.json`` says when and where the rule was run.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.results import RESULTS, SUITES, note_rerun, read_suite, with_result, write_suite
from benchmarks.suites.figures import redraw
from learned_optim.meta_train.benchmark.cache import Cache, default_folder
from learned_optim.meta_train.benchmark.contenders import rules
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.suites import load_suite


def rerun(folder: Path, suite_name: str, rule: str, problems: Iterable[str], cache: Cache) -> None:
    """Run the rule on these problems and write after each; by default on all on which it has rows.

    Raises:
        ValueError: it has none and no problem is named, or a problem has no rows at all.
    """
    results, suite = read_suite(folder), load_suite(suite_name)
    name = rules([rule])[0].name
    chosen = list(problems) or [row["problem"] for row in results.summary if row["optimizer"] == name]
    if not chosen:
        raise ValueError(f"{name} has no rows in {folder}: name the problems that it is to run on, with --problems")
    harness = Harness(suite.only(chosen), [], [rule], cache=cache)
    with Bar(harness.planned_steps()) as bar:
        for (result,) in harness.results(bar):
            results = with_result(results, result)
            write_suite(folder, results)
            note_rerun(folder, name, [result.problem.name])
            bar.print(f"{result.problem.label}: {result.final[0]:.4g}")
    redraw(folder, load_suite(suite_name))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="below benchmarks/results")
    parser.add_argument(
        "rule", help="name of a shipped rule, or a .safetensors file, whose stem is the name in the rows"
    )
    parser.add_argument("--suite", help="the suite that was run; by default the one that the folder is known to hold")
    parser.add_argument("--problems", default="", help="comma-separated; those of its rows by default")
    parser.add_argument("--cache", type=Path, default=default_folder(), help="where runs are stored (%(default)s)")
    given = parser.parse_args(arguments)
    problems = [name for name in given.problems.split(",") if name]
    suite = given.suite or SUITES.get(given.folder, given.folder)
    rerun(RESULTS / given.folder, suite, given.rule, problems, Cache(given.cache))


if __name__ == "__main__":
    main()
