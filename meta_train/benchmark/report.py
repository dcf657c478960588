"""Tables, CSV files and JSON of a benchmark's results."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from learned_optim.files import csv_text, finite_or_none, write_atomically
from learned_optim.meta_train.benchmark.contenders import REFERENCE
from learned_optim.meta_train.benchmark.scores import Result, Score, cost, problem_speedups, score, seconds_to
from learned_optim.meta_train.common.provenance import provenance

EDGE_MARK = "*"  # behind a rate at an edge of the tried ones

Results = Mapping[str, Sequence[Result]]
"""Problem -> what its optimizers did."""


def best_baseline(results: Iterable[Result]) -> Result:
    """The tuned baseline with the lowest final loss."""
    return min((result for result in results if result.is_tuned), key=lambda result: result.final[0])


def reference_of(results: Iterable[Result]) -> Result:
    """Tuned Adam."""
    return next(result for result in results if result.optimizer == REFERENCE)


def scores(results: Results, *, in_seconds: bool = False) -> list[Score]:
    """One line for each optimizer, the fastest rule first, baselines after rules; speed-ups in steps or in seconds."""
    runs: dict[str, list[Result]] = {}
    for problem_results in results.values():
        for result in problem_results:
            runs.setdefault(result.optimizer, []).append(result)
    found = [
        score(own, [reference_of(results[result.problem.name]) for result in own], in_seconds=in_seconds)
        for own in runs.values()
    ]
    return sorted(found, key=lambda score: (not score.is_rule, -score.speedup))


def is_timed(results: Results) -> bool:
    """Whether seconds were measured."""
    return all(result.timing is not None for group in results.values() for result in group)


def problem_table(results: Sequence[Result]) -> str:
    """Final losses, best first, with their ratio to the best tuned baseline, as aligned text with notes below.

    Then losses and accuracies on data held out: when training ends and at their best, with the step of the lowest loss.
    """
    best, reference = best_baseline(results).final[0], reference_of(results)
    holds_out = any(result.held_out is not None for result in results)
    classifies = any(result.accuracy is not None for result in results)
    held_out = ("held out, end", "held out, best", "at step") if holds_out else ("held out",)
    accuracy = ("accuracy, end", "best") if classifies else ()
    head = ("optimizer", "rate", "final loss", "95% band", "/ best tuned", f"speed-up over {REFERENCE}")
    rows: list[Sequence[str]] = [(*head, *held_out, *accuracy)]
    for result in sorted(results, key=lambda result: result.final[0]):
        rate = "none to tune" if result.rate is None else f"{result.rate:g}{EDGE_MARK if result.edge else ''}"
        rate += f", {result.setting}" if result.setting else ""
        final, low, high = result.final
        ratio, speed = _ratio(final, best), problem_speedups(result, reference)[0]
        rows.append(
            (
                *(result.optimizer, rate, f"{final:.4g}", f"{low:.4g} ... {high:.4g}", ratio_text(ratio)),
                f"{speed:.2f}",
                *(_held_out_cells(result) if holds_out else ("none",)),
                *((f"{result.accuracy_end:.1%}", f"{result.accuracy_best:.1%}") if classifies else ()),
            )
        )
    notes = [
        f"{EDGE_MARK} {result.optimizer}: the best rate lies at the {result.edge} edge of those tried, "
        "a rate beyond it may be better: this baseline may be understated"
        for result in results
        if result.edge
    ]
    if not holds_out:
        notes.append(f"held out: none; {results[0].not_held_out}")
    return "\n".join([aligned(rows), *notes])


def seconds_table(results: Sequence[Result]) -> str:
    """Seconds of a step and to tuned Adam's final loss; then tuned Adam's training of as many seconds as each took."""
    reference = reference_of(results)
    rows: list[Sequence[str]] = [
        (
            *("optimizer", "ms a step", "optimizer's share", f"seconds to {REFERENCE}'s loss", "speed-up in seconds"),
            *(f"{REFERENCE} in equal seconds: steps", "final loss", "held out, end"),
        )
    ]
    for result in sorted(results, key=lambda result: seconds_to(result, reference) or math.inf):
        if result.timing is None:
            continue
        seconds, equal = seconds_to(result, reference), result.equal_seconds
        speed = problem_speedups(result, reference, cost(result, reference) or math.nan)[0]
        rows.append(
            (
                *(result.optimizer, f"{1e3 * result.timing.step:.3g}", f"{result.timing.share:.0%}"),
                "not reached" if seconds is None or math.isinf(seconds) else f"{seconds:.3g}",
                f"{speed:.2f}",
                *((f"{equal.steps:,}", f"{equal.final[0]:.4g}") if equal else ("too many", "")),
                "none" if equal is None or math.isnan(equal.held_out) else f"{equal.held_out:.4g}",
            )
        )
    return aligned(rows)


def ratio_text(ratio: float) -> str:
    """A ratio with two decimals; below 0.1 with two digits."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def summary_table(scored: Sequence[Score], in_seconds: Sequence[Score] = ()) -> str:
    """One line for each optimizer over all problems.

    Args:
        scored: the scores in steps.
        in_seconds: those in seconds, where these were measured.
    """
    timed = {line.optimizer: line for line in in_seconds}
    holds_out = any(line.held_out_end is not None for line in scored)
    rows = [
        (
            *("optimizer", f"speed-up over tuned {REFERENCE} in steps", "95% band"),
            *(("in seconds", "95% band") if timed else ()),
            "lower final loss",
            *(("in equal seconds",) if timed else ()),
            *((f"held out / {REFERENCE}, end", "best") if holds_out else ()),
            "diverged",
        )
    ]
    for line in scored:
        speedups = [line, timed[line.optimizer]] if timed else [line]
        equal = "" if line.better_in_equal_seconds is None else f"{line.better_in_equal_seconds} of {line.problems}"
        rows.append(
            (
                line.optimizer,
                *(text for each in speedups for text in (f"{each.speedup:.2f}", f"{each.low:.2f} ... {each.high:.2f}")),
                f"{line.better} of {line.problems} problems",
                *((equal,) if timed else ()),
                *((_ratio_cell(line.held_out_end), _ratio_cell(line.held_out_best)) if holds_out else ()),
                f"{line.diverged} of {line.runs} runs",
            )
        )
    return aligned(rows)


def as_json(results: Results, settings: Mapping[str, Any]) -> str:
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
                **({"not_held_out": result.not_held_out} if result.not_held_out else {}),
                **{
                    column: finite_or_none(value)
                    for column, value in {**held_out_columns(result), **seconds_columns(result, group)}.items()
                    if value is not None
                },
            }
            for result in group
        ]
        for name, group in results.items()
    }
    document = {
        **settings,
        "scores": [dataclasses.asdict(line) for line in scores(results)],
        "scores_in_seconds": [dataclasses.asdict(line) for line in scores(results, in_seconds=True)]
        if is_timed(results)
        else None,
        "problems": problems,
    }
    return json.dumps(document, indent=2, allow_nan=False)


def save_results(results: Results, folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """Write CSV files and ``provenance.json``; returns the names of the tables.

    They are summary, curves, runs and tuning, ``held_out`` where data are held out, and ``timing`` where seconds were
    measured; files of these two that an earlier command has left are removed. The summary's column ``edge`` says
    "lower" or "upper" where a baseline's best rate lies at that end of those tried.
    """
    tables = {
        "summary": _summary_rows(results),
        "curves": _curve_rows(results),
        "runs": _run_rows(results),
        "tuning": _tuning_rows(results),
    }
    every = [result for group in results.values() for result in group]
    if any(result.held_out is not None for result in every):
        tables["held_out"] = _held_out_rows(every)
    if any(result.timing is not None for result in every):
        tables["timing"] = _timing_rows(every)
    for name in ("held_out", "timing"):
        (folder / f"{name}.csv").unlink(missing_ok=True)
    for name, rows in tables.items():
        write_atomically(folder / f"{name}.csv", csv_text(rows))
    loads = {result.problem.name: result.timing.others for result in every if result.timing is not None}
    measured = {"load_of_others_while_timing": loads} if loads else {}
    write_atomically(folder / "provenance.json", json.dumps({**settings, **provenance(), **measured}, indent=2) + "\n")
    return list(tables)


def held_out_columns(result: Result) -> dict[str, float | None]:
    """The columns of a summary about data held out; None where there is no such number."""
    held_out, accuracy = result.held_out is not None, result.accuracy is not None
    return {
        "held_out_end": result.held_out_end if held_out else None,
        "held_out_best": result.held_out_best if held_out else None,
        "held_out_best_step": result.held_out_best_step if held_out else None,
        "accuracy_end": result.accuracy_end if accuracy else None,
        "accuracy_best": result.accuracy_best if accuracy else None,
    }


def seconds_columns(result: Result, group: Sequence[Result]) -> dict[str, float | None]:
    """The columns of a summary about seconds; None where they were not measured, infinite where a loss is not reached.

    Args:
        result: of an optimizer.
        group: the results of all optimizers on the problem.
    """
    reference, timing, equal = reference_of(group), result.timing, result.equal_seconds
    factor = cost(result, reference)
    return {
        "seconds_per_step": timing.step if timing else None,
        "speedup_in_seconds": None if factor is None else float(problem_speedups(result, reference, factor)[0]),
        "seconds_to_adam": seconds_to(result, reference),
        "adam_steps_in_equal_seconds": equal.steps if equal else None,
        "adam_loss_in_equal_seconds": equal.final[0] if equal else None,
        "adam_held_out_in_equal_seconds": equal.held_out if equal and not math.isnan(equal.held_out) else None,
    }


def _summary_rows(results: Results) -> Iterable[Sequence[object]]:
    header: tuple[str, ...] = ()
    for group in results.values():
        best, reference = best_baseline(group).final[0], reference_of(group)
        for result in group:
            more = {**held_out_columns(result), **seconds_columns(result, group)}
            if not header:
                header = (
                    *("problem", "optimizer", "rate", "final_loss", "band_low", "band_high", "ratio_to_best_baseline"),
                    *("edge", "steps", "seeds", "speedup", "diverged", *more),
                )
                yield header
            numbers = (*result.final, _ratio(result.final[0], best))
            yield (
                *_key(result),
                *(f"{number:.6g}" for number in numbers),
                result.edge or "",
                result.problem.steps,
                result.problem.seeds,
                f"{problem_speedups(result, reference)[0]:.6g}",
                int(result.diverged.sum()),
                *("" if value is None else f"{value:.6g}" for value in more.values()),
            )


def _curve_rows(results: Results) -> Iterable[Sequence[object]]:
    yield "problem", "optimizer", "rate", "step", "mean_loss", "band_low", "band_high", "seconds"
    for group in results.values():
        for result in group:
            for step, *values in zip(*result.curve, strict=True):
                passed = f"{step * result.timing.step:.6g}" if result.timing else ""
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


def _held_out_rows(results: Sequence[Result]) -> Iterable[Sequence[object]]:
    yield "problem", "optimizer", "rate", "step", "mean_loss", "band_low", "band_high", "mean_accuracy"
    for result in results:
        if result.held_out is not None:
            means = [""] * len(result.looks)
            if result.accuracy is not None:
                means = [f"{mean:.6g}" for mean in result.accuracy.mean(axis=1)]
            for step, *values, accuracy in zip(*result.held_out_curve, means, strict=True):
                yield (*_key(result), step, *(f"{value:.6g}" for value in values), accuracy)


def _timing_rows(results: Sequence[Result]) -> Iterable[Sequence[object]]:
    yield (
        *("problem", "optimizer", "seconds_per_step", "lower_quartile", "upper_quartile", "rounds"),
        *("optimizer_seconds_per_step", "load_of_others"),
    )
    for result in results:
        if (timing := result.timing) is not None:
            seconds = (f"{value:.6g}" for value in (timing.step, *timing.quartiles))
            others = "" if timing.others is None else f"{timing.others:.2f}"
            yield result.problem.name, result.optimizer, *seconds, timing.rounds, f"{timing.optimizer:.6g}", others


def _key(result: Result) -> tuple[str, str, str]:
    return result.problem.name, result.optimizer, "" if result.rate is None else f"{result.rate:g}"


def _ratio(loss: float, best: float) -> float:
    return loss / best if best > 0 else math.nan


def _held_out_cells(result: Result) -> tuple[str, str, str]:
    return f"{result.held_out_end:.4g}", f"{result.held_out_best:.4g}", f"{result.held_out_best_step:.0f}"


def _ratio_cell(ratio: float | None) -> str:
    return "" if ratio is None else ratio_text(ratio)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, in columns, with a line below the first."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
