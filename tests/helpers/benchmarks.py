"""Tiny benchmarks: a suite of one noisy quadratic, its comparison, and made-up results."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.benchmark.contenders import baselines
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.scores import Result
from learned_optim.meta_train.benchmark.suites import Suite, SuiteProblem, suite_from_tables
from learned_optim.meta_train.benchmark.timing import Timing

STEPS = 5

NOISY = {
    "name": "noisy",
    "family": "quadratic",
    "steps": STEPS,
    "seeds": 3,
    "tuning_seeds": 3,
    "dimensions": [2, 50],
    "condition": [1.0, 30.0],
    "noise": 0.1,
}
"""An entry of a suite: quadratics with noisy losses."""


def suite(*problems: dict[str, Any], **others: Any) -> Suite:
    """A suite of the given problems (``NOISY`` if there are none) with three rates."""
    return suite_from_tables(
        {"name": "test", "rates": [0.1, 0.03, 0.01], "problems": list(problems or [NOISY]), **others}
    )


def run(
    suite: Suite, cache: Path | None = None, names: tuple[str, ...] = ("SGD",), rules: list[Any] | None = None
) -> dict[str, list[Result]]:
    """Results of Adam, the named baselines and the rules on a suite, by problem."""
    harness = Harness(suite, baselines(names), rules or [], cache=Cache(cache))
    with Bar(harness.planned_steps()) as bar:
        return {group[0].problem.name: group for group in harness.results(bar)}


def result(optimizer: str, *, loss: float = 1.0, problem: str = "p", seeds: int = 4, **others: Any) -> Result:
    """A made-up result whose losses fall from 2 to ``loss`` in 20 steps; with ``rate`` a baseline, else a rule."""
    losses = np.linspace(2.0, loss, 21)[:, None] * np.linspace(0.9, 1.1, seeds)
    if "rate" in others:
        others.setdefault("tuning", {others["rate"]: 1.0})
    else:
        others["is_rule"] = True
    return Result(SuiteProblem(problem, "quadratic", 20, seeds=seeds), optimizer, losses, **others)


RESULTS = {
    "p": [
        result("Adam", rate=0.01),
        result("SGD", rate=30.0, edge="upper", loss=1.5),
        result("NAG", rate=1e-5, edge="lower"),
        result("mine", loss=0.5),
    ],
    "q": [result("Adam", rate=0.01, problem="q"), result("mine", loss=1.5, problem="q")],
}
"""Made-up results by problem: three baselines, of which two have their best rate at an edge, and a rule."""


def timing(seconds: float) -> Timing:
    """A timing of which the optimizer's step takes a quarter."""
    return Timing(0.75 * seconds, 0.25 * seconds, (seconds, seconds), 1, others=0.0)


def timed(results: dict[str, list[Result]], seconds: float, of_rules: float | None = None) -> dict[str, list[Result]]:
    """Made-up results with the seconds of their steps, of rules perhaps others."""
    return {
        name: [
            dataclasses.replace(each, timing=timing(of_rules if of_rules is not None and each.is_rule else seconds))
            for each in group
        ]
        for name, group in results.items()
    }
