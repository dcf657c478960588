"""Rules on the wide suites, by which the default rule's base is chosen: one table, and the figures to decide by.

    python -m benchmarks.suites.wide default                          # the first half; baselines are stored once
    python -m benchmarks.suites.wide default,default@0,my.safetensors # @0: the same rule with outputs of zero
    python -m benchmarks.suites.wide default --set GAIN=0.3 --set rate=0.02
    python -m benchmarks.suites.wide default --half second --save     # only when a version is final
    python -m benchmarks.suites.wide --half second --rivals untuned --save   # what people would pick instead

A name in capitals that is set is a constant of :mod:`learned_optim.rules.schedule_free_lstm`, one in small letters a
setting of the rule; all rules of the command get them. Speed-ups are over tuned Adam, in steps, as the benchmark counts
them; in those called "strict", a problem on which Adam's final loss is never reached counts as 1/4. Ratios are of final
losses (below 1: the rule's is lower), in means bounded by 1/10 and 10. Held-out losses, at the end and at their lowest,
are compared with untuned Adam's at 1e-3. ``--save`` puts the rows into results/wide/wide.csv; with ``--rivals``, those
of the rivals and rules alone. Rivals are names such as ``Prodigy@1``, or ``untuned``, ``tuned``, ``all``. Seconds are
those of the comparison's trainings, of whatever day they ran on.
"""

import argparse
import ast
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.results import RESULTS, save_part
from learned_optim import LearnedOptimizer, load_rule
from learned_optim.files import csv_text, write_atomically
from learned_optim.meta_train.benchmark.cache import Cache, code_fingerprint, default_folder, rule_fingerprint
from learned_optim.meta_train.benchmark.contenders import REFERENCE, Asked, Contender, baseline, baselines, rival_names
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.report import reference_of
from learned_optim.meta_train.benchmark.scores import LARGEST_RATIO, Result, problem_speedups
from learned_optim.meta_train.benchmark.suites import load_suite
from learned_optim.meta_train.inner.speedups import SLOWEST, running_final
from learned_optim.rules import UpdateRule, schedule_free_lstm
from learned_optim.terminal import say

UNTUNED, SCHEDULED = "Adam@0.001", "AdamW-cosine"
NOISELESS = ("quadratic", "valleys", "factorization")
"""Families; the problems of all others are networks in minibatches."""
BEHIND = 1.02  # of Adam's final loss: less is within what seeds differ by
ZEROED = "@0"
NUMBERS = (int, float, tuple)  # kinds of constants


def set_constants(settings: Mapping[str, Any], module: ModuleType = schedule_free_lstm) -> None:
    """Give constants of a rule's module other values, before rules are built.

    Raises:
        ValueError: the module has no such number, or the value is of another kind.
    """
    known = {name: each for name, each in vars(module).items() if name.isupper() and isinstance(each, NUMBERS)}
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"--set: {module.__name__} has no constant {name!r}; it has {', '.join(known)}")
        current = known[name]
        if isinstance(current, tuple) != isinstance(value, tuple) or not isinstance(value, NUMBERS):
            raise ValueError(f"--set: {name} is {current!r}, and cannot be {value!r}")
        setattr(module, name, value)


def contender(source: str, settings: Mapping[str, Any], *, total_steps: bool = False) -> Contender:
    """A rule by name or path, with ``@0`` behind it that with outputs of zero.

    Args:
        source: a rule's name or file, as :func:`~learned_optim.load_rule` takes it.
        settings: constants that were set, which belong to its identity, and settings that the rule is built with.
        total_steps: tell the optimizer how long the training is.

    Raises:
        ValueError: no such rule or setting.
    """
    rule = load_rule(source.removesuffix(ZEROED))
    own = {name: value for name, value in settings.items() if not name.isupper()}
    if own:
        if unknown := [name for name in own if name not in rule.settings]:
            raise ValueError(f"--set: rule {source} has no setting {unknown[0]!r}; it has {', '.join(rule.settings)}")
        other = type(rule)(**{**rule.settings, **own})
        other.load_state_dict(rule.state_dict())
        rule = other
    if source.endswith(ZEROED):
        rule = zeroed(rule)
    identity: dict[str, Any] = {"rule": rule_fingerprint(rule)}
    constants = {name: value for name, value in sorted(settings.items()) if name.isupper()}
    if constants:
        identity["constants"] = constants
    if total_steps:  # what is made of it is written in the optimizer and in the rule's ancestors
        identity["total_steps"] = code_fingerprint(LearnedOptimizer, *type(rule).__mro__[:-1])

    def build(parameters: Iterable[torch.Tensor], rate: float, steps: int) -> LearnedOptimizer:
        options: dict[str, Any] = {"total_steps": steps} if total_steps else {}
        return LearnedOptimizer(parameters, rule, **options)

    return Contender(shown_name(source, settings, total_steps), build, identity, is_rule=True)


def shown_name(source: str, settings: Mapping[str, Any], total_steps: bool) -> str:
    """A rule's name in tables; of a file its folder and stem, so that the best weights of two runs differ."""
    path, mark = source.removesuffix(ZEROED), ZEROED if source.endswith(ZEROED) else ""
    name = "/".join(Path(path).with_suffix("").parts[-2:]) if path.endswith(".safetensors") else path
    told = ["total steps"] if total_steps else []
    return " ".join([name + mark, *(f"{key}={value}" for key, value in settings.items()), *told])


def zeroed(rule: UpdateRule) -> UpdateRule:
    """The rule, its output layer zero; raises ``ValueError`` if it has none."""
    outputs = [parameter for name, parameter in rule.named_parameters() if name.startswith("output_")]
    if not outputs:
        raise ValueError(f"rule {rule.name!r} has no output layer to set to zero")
    with torch.no_grad():
        for parameter in outputs:
            parameter.zero_()
    return rule


@dataclass(frozen=True)
class ProblemRow:
    """The figures of one optimizer on one problem, beside tuned Adam and others."""

    problem: str
    optimizer: str
    network: bool
    final: float
    adam: float
    scheduled: float
    speedup: float
    strict: float
    held_out_end: float
    """Over untuned Adam's at its end; not a number where nothing is held out."""
    held_out_best: float
    seconds: float
    diverged: int

    @property
    def to_adam(self) -> float:
        """Final loss over tuned Adam's."""
        return ratio(self.final, self.adam)

    @property
    def to_scheduled(self) -> float:
        """Final loss over that of tuned AdamW on a cosine."""
        return ratio(self.final, self.scheduled)


def ratio(loss: float, other: float) -> float:
    """``loss / other``; infinite for a loss that is, and 1 where both are zero."""
    if not math.isfinite(loss):
        return math.inf
    return loss / other if other > 0 else (1.0 if loss == other else math.inf)


def rows(group: Sequence[Result]) -> list[ProblemRow]:
    """One for each optimizer of a problem."""
    adam = reference_of(group)
    scheduled, untuned = (next(each for each in group if each.optimizer == name) for name in (SCHEDULED, UNTUNED))
    return [
        ProblemRow(
            problem=result.problem.name,
            optimizer=result.optimizer,
            network=result.problem.family not in NOISELESS,
            final=result.final[0],
            adam=adam.final[0],
            scheduled=scheduled.final[0],
            speedup=float(problem_speedups(result, adam)[0]),
            strict=strict_speedup(result, adam),
            held_out_end=result.held_out_end / untuned.held_out_end,
            held_out_best=result.held_out_best / untuned.held_out_best,
            seconds=result.seconds,
            diverged=int(result.diverged.any()),
        )
        for result in group
    ]


def strict_speedup(result: Result, reference: Result) -> float:
    """The speed-up, or its lower bound where the reference's final loss is never reached."""
    own, other = (running_final(each.losses.mean(1, keepdims=True)) for each in (result, reference))
    reached = bool((own[1:] <= other[-1]).any()) or not np.isfinite(other[-1])
    return float(problem_speedups(result, reference)[0]) if reached else SLOWEST


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of the values that are numbers, each taken as at least 1 / 10 and at most 10."""
    logs = [math.log(min(max(value, 1 / LARGEST_RATIO), LARGEST_RATIO)) for value in values if not math.isnan(value)]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


TABLE_COLUMNS: tuple[tuple[str, Callable[[ProblemRow], str]], ...] = (
    ("problem", lambda row: row.problem),
    ("optimizer", lambda row: row.optimizer),
    ("final", lambda row: f"{row.final:.4g}"),
    ("Adam", lambda row: f"{row.adam:.4g}"),
    ("cosine", lambda row: f"{row.scheduled:.4g}"),
    ("speed-up", lambda row: f"{row.speedup:.2f}"),
    ("strict", lambda row: f"{row.strict:.2f}"),
    ("/ Adam", lambda row: f"{row.to_adam:.3g}"),
    ("/ cosine", lambda row: f"{row.to_scheduled:.3g}"),
    ("held out, end", lambda row: f"{row.held_out_end:.3f}"),
    ("best", lambda row: f"{row.held_out_best:.3f}"),
    ("seconds", lambda row: f"{row.seconds:.1f}"),
    ("diverged", lambda row: str(row.diverged)),
)
"""Columns of the table of problems: name, and text of a row."""

MEANS: tuple[tuple[str, Callable[[ProblemRow], float]], ...] = (
    ("speed-up", lambda row: row.speedup),
    ("strict", lambda row: row.strict),
    ("/ Adam", lambda row: row.to_adam),
    ("/ cosine", lambda row: row.to_scheduled),
    ("held out, end", lambda row: row.held_out_end),
    ("best", lambda row: row.held_out_best),
)
"""Columns of which geometric means are taken: name, and value of a row."""


def summary(found: Sequence[ProblemRow]) -> list[list[str]]:
    """A line over all problems and one over the networks in minibatches for each optimizer; the head first."""
    lines = [["optimizer", "problems", *(name for name, _ in MEANS), "lower", "behind 2%", "diverged", "seconds"]]
    for optimizer in dict.fromkeys(row.optimizer for row in found):
        every = [row for row in found if row.optimizer == optimizer]
        for kind, own in (("all", every), ("networks", [row for row in every if row.network])):
            counts = (
                sum(row.final < row.adam for row in own),
                sum(row.to_adam > BEHIND for row in own),
                sum(row.diverged for row in own),
            )
            means = [f"{geometric_mean(map(value, own)):.3f}" for _, value in MEANS]
            seconds = f"{sum(row.seconds for row in own):.0f}"
            lines.append([optimizer, f"{len(own)} {kind}", *means, *map(str, counts), seconds])
    return lines


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def rivals_of(text: str) -> list[Contender]:
    """Rivals by their names, or all as ``untuned``, ``tuned`` or ``all``; raises like :func:`.contenders.baseline`."""
    names = text.split(",") if text else []
    if len(names) == 1 and names[0] in get_args(Asked):
        names = rival_names(names[0])  # type: ignore[arg-type]
    return [baseline(name) for name in names]


def run(half: str, contenders: Sequence[Contender], problems: Sequence[str], cache: Cache) -> list[ProblemRow]:
    """Run the suite, tell of each problem as it is done, and give the rows of all."""
    suite = load_suite(f"wide-{half}")
    suite = suite.only(problems) if problems else suite
    harness = Harness(suite, [*baselines(suite.baselines), *contenders], [], cache=cache)
    found: list[ProblemRow] = []
    with Bar(harness.planned_steps()) as bar:
        for group in harness.results(bar):
            found += rows(group)
    return found


def save(half: str, lines: Sequence[Sequence[str]], packages: Sequence[str] = ()) -> None:
    """Put rows in the place of committed ones of the same half, problem and optimizer.

    Args:
        half: of the problems.
        lines: rows, the header first.
        packages: names and versions of what rivals came from, for the provenance.
    """
    header, *rows = lines
    table = [["half", *header], *([half, *row] for row in rows)]
    details = {"packages": list(packages)} if packages else {}
    optimizers = ", ".join(dict.fromkeys(row[1] for row in rows))
    save_part(RESULTS / "wide" / "wide.csv", ("half", "problem", "optimizer"), table, details, f"{half}: {optimizers}")


def parsed(settings: Iterable[str]) -> dict[str, Any]:
    """``NAME=VALUE`` as names and Python values; raises ``ValueError`` for anything else."""
    values = {}
    for text in settings:
        name, equals, value = text.partition("=")
        try:
            values[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            equals = ""
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE with a number or a tuple of numbers, got {text!r}")
    return values


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="?", default="", help="names or paths, comma-separated; none: baselines alone")
    parser.add_argument("--rivals", default="", metavar="A,B", help="hand-designed optimizers beside the suite's own")
    parser.add_argument("--half", choices=("first", "second"), default="first", help="of the problems (%(default)s)")
    parser.add_argument("--problems", default="", help="comma-separated; all by default")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="constant, or setting of a rule"
    )
    parser.add_argument("--total-steps", action="store_true", help="tell rules the length of the training")
    parser.add_argument("--cache", type=Path, default=default_folder(), help="where runs are stored (%(default)s)")
    parser.add_argument("--csv", type=Path, help="where the rows are written as well")
    parser.add_argument("--save", action="store_true", help="put the rows into the committed ones")
    given = parser.parse_args(arguments)
    settings = parsed(given.set)
    set_constants({name: value for name, value in settings.items() if name.isupper()})
    chosen = rivals_of(given.rivals)
    chosen += [contender(name, settings, total_steps=given.total_steps) for name in given.rules.split(",") if name]
    found = run(given.half, chosen, [name for name in given.problems.split(",") if name], Cache(given.cache))
    lines = [[name for name, _ in TABLE_COLUMNS], *([show(row) for _, show in TABLE_COLUMNS] for row in found)]
    if given.csv is not None:
        write_atomically(given.csv, csv_text(lines))
    if given.save:
        names = {each.name for each in chosen} if given.rivals else {row.optimizer for row in found}
        packages = sorted({each.identity["package"] for each in chosen if "package" in each.identity})
        save(given.half, [lines[0], *(line for line in lines[1:] if line[1] in names)], packages)
    shown = [line for line, row in zip(lines[1:], found, strict=True) if not chosen or row.optimizer != REFERENCE]
    say(aligned([lines[0], *shown]))
    say(f"\n{aligned(summary(found))}")


if __name__ == "__main__":
    main()
