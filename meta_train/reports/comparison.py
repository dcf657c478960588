"""Rules beside tuned baselines on a suite: runs, tables, results and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.benchmark.contenders import Asked, baselines, installed, rival_names
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.report import (
    as_json,
    is_timed,
    problem_table,
    save_results,
    scores,
    seconds_table,
    summary_table,
)
from learned_optim.meta_train.benchmark.scores import Result
from learned_optim.meta_train.benchmark.suites import Suite
from learned_optim.meta_train.common.load import busy_machine
from learned_optim.meta_train.reports.plots import plot_all
from learned_optim.terminal import say


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
    seconds: bool | None = None,
    json: bool = False,
) -> dict[str, list[Result]]:
    """Run a suite, print its tables and write results and figures, after each problem and at the end.

    Args:
        suite: the suite that is run.
        rules: names or paths; None: those that the problems name.
        baseline_names: see :func:`~learned_optim.meta_train.benchmark.contenders.baseline`; None: the suite's, with
            those of its rivals whose packages are installed.
        rivals: further ones, instead of the suite's own.
        out: folder for results.
        cache: store of runs.
        settings: recorded as provenance.
        device: device of the trainings.
        seconds: measure seconds too; for a quiet machine. None: where the suite says so.
        json: print one JSON document instead of tables.
    """
    names, absent = _compared(suite, baseline_names, rivals)
    in_seconds = suite.seconds if seconds is None else seconds
    harness = Harness(suite, baselines(names), rules, cache=cache, device=device, seconds=in_seconds)
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
    tables: list[str] = []
    with Bar(harness.planned_steps()) as bar:
        for group in harness.results(bar):
            problem = group[0].problem
            results[problem.name] = group
            if not json:
                shown = [problem_table(group), *([seconds_table(group)] if in_seconds else [])]
                bar.print(f"\n{problem.label}, {problem.seeds} seeds\n" + "\n\n".join(shown) + "\n")
            tables = save_results(results, out, details)  # after each problem: an interruption loses little
    figures = plot_all(results, out)
    say(as_json(results, details) if json else _summary(results, out, tables, figures))
    others = [result.timing.others for group in results.values() for result in group if result.timing]
    if warning := busy_machine(max((load for load in others if load is not None), default=None)):
        say(warning, error=True)
    return results


def _summary(results: Mapping[str, list[Result]], out: Path, tables: Sequence[str], figures: Sequence[Path]) -> str:
    """The scores in steps, and in seconds where they were measured, and the files that were written."""
    lines = [summary_table(scores(results), scores(results, in_seconds=True) if is_timed(results) else ())]
    lines.append(f"written to {out}: {', '.join(tables)} (CSV), " + ", ".join(path.name for path in figures))
    return "\n\n".join(lines)


def _compared(suite: Suite, baseline_names: Sequence[str] | None, rivals: Asked | None) -> tuple[list[str], list[str]]:
    """Names of the hand-designed optimizers, and of the suite's rivals that are left out."""
    names = list(baseline_names or suite.baselines)
    if rivals is not None:
        return [*names, *rival_names(rivals)], []
    if baseline_names:
        return names, []
    found, absent = installed(suite.rivals)
    return [*names, *found], absent
