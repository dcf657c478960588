"""What ``learned-optim benchmark`` does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.benchmark.contenders import Asked, baselines, installed, rival_names
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.report import as_json, problem_table, save_results, scores, summary_table
from learned_optim.meta_train.benchmark.scores import Result
from learned_optim.meta_train.benchmark.suites import Suite, load_suite, shipped_suites, suite_of_model
from learned_optim.meta_train.benchmark.timing import Timing, time_steps
from learned_optim.meta_train.reports.plots import plot_all
from learned_optim.terminal import say


def chosen_suite(
    source: str | None,
    model: str | None = None,
    *,
    problems: Sequence[str] = (),
    seeds: int | None = None,
    steps: int | None = None,
) -> Suite:
    """The suite, or that of a user's own model, cut to some problems and with another number of seeds.

    Raises:
        ValueError: neither or both, ``steps`` for a suite, or what the suite does not have.
    """
    if (source is None) == (model is None):
        raise ValueError(
            f"name a suite ({', '.join(shipped_suites())}, or a TOML file), or your own --model FILE.py:CLASS"
        )
    if source is not None:
        if steps is not None:
            raise ValueError("--steps goes with --model; a suite says itself how long its problems are")
        suite = load_suite(source)
    else:
        suite = suite_of_model(str(model), steps)
    if problems:
        suite = suite.only(problems)
    return suite if seeds is None else suite.with_seeds(seeds)


def compare(
    suite: Suite,
    rules: Sequence[str | Path] | None = None,
    baseline_names: Sequence[str] | None = None,
    rivals: Asked | None = None,
    *,
    out: Path,
    cache: Cache,
    settings: Mapping[str, Any],
    device: str = "cpu",
    timed: bool = False,
    json: bool = False,
) -> dict[str, list[Result]]:
    """Run a suite, print its tables and write results and figures, after each problem and at the end.

    Args:
        suite: what is run.
        rules: names or paths; None: those that the problems name.
        baseline_names: see :func:`~learned_optim.meta_train.benchmark.contenders.baseline`; None: the suite's, with
            those of its rivals whose packages are installed.
        rivals: further ones, instead of the suite's own.
        out: folder for results.
        cache: where runs are stored.
        settings: recorded as provenance.
        device: where trainings run.
        timed: measure the seconds of a step too; for a quiet machine.
        json: print one JSON document instead of tables.
    """
    names, absent = _compared(suite, baseline_names, rivals)
    harness = Harness(suite, baselines(names), rules, cache=cache, device=device)
    if absent:
        say(f"without {', '.join(absent)}: pip install 'learned-optim[rivals]' shows these too", error=True)
    details = {
        **settings,
        "suite": suite.name,
        "problems": [problem.name for problem in suite.problems],
        "seeds": {problem.name: problem.seeds for problem in suite.problems},
        "rates": suite.rates,
        "device": torch.cuda.get_device_name(device) if harness.device.type == "cuda" else device,
    }
    results: dict[str, list[Result]] = {}
    timings: dict[tuple[str, str], Timing] = {}
    with Bar(harness.planned_steps()) as bar:
        for group in harness.results(bar):
            problem = group[0].problem
            results[problem.name] = group
            if timed:
                bar.say(f"{problem.label}: timing")
                seconds = time_steps(problem, harness.contenders[problem.name], harness.device)
                timings |= {(problem.name, name): timing for name, timing in seconds.items()}
            if not json:
                bar.print(f"\n{problem.label}, {problem.seeds} seeds\n{problem_table(group)}\n")
            save_results(results, out, details, timings)  # after each problem: an interruption loses little
    figures = plot_all(results, out, timings)
    if json:
        say(as_json(results, details, timings))
        return results
    say(summary_table(scores(results)))
    if timings:
        say(f"\n{summary_table(scores(results, timings), 'seconds')}")
    say(f"\nwritten to {out}: summary, curves, runs, tuning (CSV), " + ", ".join(path.name for path in figures))
    return results


def _compared(suite: Suite, baseline_names: Sequence[str] | None, rivals: Asked | None) -> tuple[list[str], list[str]]:
    """Names of the hand-designed optimizers, and of the suite's rivals that are left out."""
    names = list(baseline_names or suite.baselines)
    if rivals is not None:
        return [*names, *rival_names(rivals)], []
    if baseline_names:
        return names, []
    found, absent = installed(suite.rivals)
    return [*names, *found], absent


def listing() -> str:
    """The shipped suites and their problems."""
    lines = []
    for name in shipped_suites():
        suite = load_suite(name)
        lines.append(f"{name:20}{suite.title}")
        lines += [f"  {problem.name:30}{problem.label}" for problem in suite.problems]
    return "\n".join(lines)
