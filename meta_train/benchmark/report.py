"""Tables, CSV files and JSON of a benchmark's results."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from learned_optim.files import csv_text, finite_or_none, write_atomically
from learned_optim.meta_train.benchmark.contenders import REFERENCE
from learned_optim.meta_train.benchmark.scores import Result, Score, problem_speedups, score
from learned_optim.meta_train.benchmark.timing import Timing
from learned_optim.meta_train.common.provenance import provenance

EDGE_MARK = "*"  # behind a rate at an edge of the tried ones

Results = Mapping[str, Sequence[Result]]
"""Problem -> what its optimizers did."""

Timings = Mapping[tuple[str, str], Timing]
"""(problem, optimizer) -> seconds of a step; empty where nothing was timed."""


def best_baseline(results: Iterable[Result]) -> Result:
    """The tuned baseline with the lowest final loss."""
    return min((result for result in results if result.is_tuned), key=lambda result: result.final[0])


def reference_of(results: Iterable[Result]) -> Result:
    """Tuned Adam."""
    return next(result for result in results if result.optimizer == REFERENCE)


def scores(results: Results, timings: Timings | None = None) -> list[Score]:
    """One line for each optimizer, the fastest rule first, baselines after rules; with timings, in seconds."""
    runs: dict[str, list[Result]] = {}
    for problem_results in results.values():
        for result in problem_results:
            runs.setdefault(result.optimizer, []).append(result)
    found = [
        score(
            own,
            [reference_of(results[result.problem.name]) for result in own],
            [_cost(result, timings) for result in own] if timings else None,
        )
        for own in runs.values()
    ]
    return sorted(found, key=lambda score: (not score.is_rule, -score.speedup))


def problem_table(results: Sequence[Result]) -> str:
    """Final losses, best first, with their ratio to the best tuned baseline, as aligned text with notes below.

    With losses on data held out, where there are any.
    """
    best, reference = best_baseline(results).final[0], reference_of(results)
    holds_out = any(result.held_out is not None for result in results)
    held_out = ("held out, end", "held out, best") if holds_out else ()
    rows = [("optimizer", "rate", "final loss", "95% band", "/ best tuned", f"speed-up over {REFERENCE}", *held_out)]
    for result in sorted(results, key=lambda result: result.final[0]):
        rate = "none to tune" if result.rate is None else f"{result.rate:g}{EDGE_MARK if result.edge else ''}"
        rate += f", {result.setting}" if result.setting else ""
        final, low, high = result.final
        ratio, speed = _ratio(final, best), problem_speedups(result, reference)[0]
        rows.append(
            (
                *(result.optimizer, rate, f"{final:.4g}", f"{low:.4g} ... {high:.4g}", ratio_text(ratio)),
                f"{speed:.2f}",
                *((f"{result.held_out_end:.4g}", f"{result.held_out_best:.4g}") if holds_out else ()),
            )
        )
    notes = [
        f"{EDGE_MARK} {result.optimizer}: the best rate lies at the {result.edge} edge of those tried, "
        "a rate beyond it may be better: this baseline may be understated"
        for result in results
        if result.edge
    ]
    return "\n".join([_aligned(rows), *notes])


def ratio_text(ratio: float) -> str:
    """A ratio with two decimals; below 0.1 with two digits."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def summary_table(scored: Sequence[Score], unit: str = "steps") -> str:
    """One line for each optimizer over all problems."""
    rows = [("optimizer", f"speed-up over tuned {REFERENCE} in {unit}", "95% band", "lower final loss", "diverged")]
    rows += [
        (
            line.optimizer,
            f"{line.speedup:.2f}",
            f"{line.low:.2f} ... {line.high:.2f}",
            f"{line.better} of {line.problems} problems",
            f"{line.diverged} of {line.runs} runs",
        )
        for line in scored
    ]
    return _aligned(rows)


def as_json(results: Results, settings: Mapping[str, Any], timings: Timings | None = None) -> str:
    """Scores and every problem's final losses, for a script to read."""
    problems = {
        name: [
            {
                "optimizer": result.optimizer,
                "rate": result.rate,
                "edge": result.edge,
                "final_loss": finite_or_none(result.final[0]),
                "band": [finite_or_none(value) for value in result.final[1:]],
                "speedup": float(problem_speedups(result, reference_of(group))[0]),
                "diverged": int(result.diverged.sum()),
                **_held_out(result),
            }
            for result in group
        ]
        for name, group in results.items()
    }
    document = {
        **settings,
        "scores": [dataclasses.asdict(line) for line in scores(results)],
        "scores_in_seconds": [dataclasses.asdict(line) for line in scores(results, timings)] if timings else None,
        "problems": problems,
    }
    return json.dumps(document, indent=2, allow_nan=False)


def save_results(results: Results, folder: Path, settings: Mapping[str, Any], timings: Timings | None = None) -> None:
    """Write summary, curves, runs, tuning and, with timings, timing as CSV files, and ``provenance.json``.

    The summary's column ``edge`` says "lower" or "upper" where a baseline's best rate lies at that end of those tried.
    """
    timings = timings or {}
    tables = {
        "summary": _summary_rows(results, timings),
        "curves": _curve_rows(results, timings),
        "runs": _run_rows(results),
        "tuning": _tuning_rows(results),
    }
    if timings:
        tables["timing"] = _timing_rows(timings)
    for name, rows in tables.items():
        write_atomically(folder / f"{name}.csv", csv_text(rows))
    write_atomically(folder / "provenance.json", json.dumps({**settings, **provenance()}, indent=2) + "\n")


def _summary_rows(results: Results, timings: Timings) -> Iterable[Sequence[object]]:
    yield (
        *("problem", "optimizer", "rate", "final_loss", "band_low", "band_high", "ratio_to_best_baseline", "edge"),
        *("steps", "seeds", "speedup", "diverged", "seconds_per_step", "held_out_end", "held_out_best"),
    )
    for group in results.values():
        best, reference = best_baseline(group).final[0], reference_of(group)
        for result in group:
            numbers = (*result.final, _ratio(result.final[0], best))
            held_out = (result.held_out_end, result.held_out_best)
            yield (
                *_key(result),
                *(f"{number:.6g}" for number in numbers),
                result.edge or "",
                result.problem.steps,
                result.problem.seeds,
                f"{problem_speedups(result, reference)[0]:.6g}",
                int(result.diverged.sum()),
                _seconds(result, timings),
                *("" if result.held_out is None else f"{loss:.6g}" for loss in held_out),
            )


def _curve_rows(results: Results, timings: Timings) -> Iterable[Sequence[object]]:
    yield "problem", "optimizer", "rate", "step", "mean_loss", "band_low", "band_high", "seconds"
    for group in results.values():
        for result in group:
            seconds = timings.get((result.problem.name, result.optimizer))
            for step, *values in zip(*result.curve, strict=True):
                passed = f"{step * seconds.median:.6g}" if seconds else ""
                yield (*_key(result), step, *(f"{value:.6g}" for value in values), passed)


def _run_rows(results: Results) -> Iterable[Sequence[object]]:
    yield "problem", "optimizer", "rate", "seed", "initial_loss", "final_loss", "diverged"
    for group in results.values():
        for result in group:
            for seed, (final, diverged) in enumerate(zip(result.finals, result.diverged, strict=True)):
                yield (*_key(result), seed, f"{result.losses[0, seed]:.6g}", f"{final:.6g}", int(diverged))


def _tuning_rows(results: Results) -> Iterable[Sequence[object]]:
    yield "problem", "optimizer", "rate", "mean_final_loss", "tuning_seeds"
    for group in results.values():
        for result in group:
            for rate, loss in sorted(result.tuning.items()):
                yield result.problem.name, result.optimizer, f"{rate:g}", f"{loss:.6g}", result.problem.tuning_seeds


def _timing_rows(timings: Timings) -> Iterable[Sequence[object]]:
    yield "problem", "optimizer", "seconds_per_step", "lower_quartile", "upper_quartile", "rounds"
    for (problem, optimizer), timing in timings.items():
        yield problem, optimizer, *(f"{value:.6g}" for value in timing.quartiles), timing.rounds


def _key(result: Result) -> tuple[str, str, str]:
    return result.problem.name, result.optimizer, "" if result.rate is None else f"{result.rate:g}"


def _cost(result: Result, timings: Timings) -> float:
    problem = result.problem.name
    return timings[problem, result.optimizer].median / timings[problem, REFERENCE].median


def _seconds(result: Result, timings: Timings) -> str:
    timing = timings.get((result.problem.name, result.optimizer))
    return f"{timing.median:.6g}" if timing else ""


def _ratio(loss: float, best: float) -> float:
    return loss / best if best > 0 else math.nan


def _held_out(result: Result) -> dict[str, float | None]:
    if result.held_out is None:
        return {}
    return {"held_out_end": finite_or_none(result.held_out_end), "held_out_best": finite_or_none(result.held_out_best)}


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
