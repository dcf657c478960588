"""Run a suite: tune each baseline on runs of its own, then take baselines and rules through the same fresh ones."""

import copy
import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from learned_optim.meta_train.benchmark.cache import Cache, problem_fingerprint
from learned_optim.meta_train.benchmark.contenders import REFERENCE, Contender
from learned_optim.meta_train.benchmark.contenders import rules as learned_rules
from learned_optim.meta_train.benchmark.evaluation import Problem, Tuned, comparison_task, final_loss, tune
from learned_optim.meta_train.benchmark.held_out import HeldOut, hold_out_of
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.scores import Result, at_equal_seconds, cost
from learned_optim.meta_train.benchmark.suites import Suite, SuiteProblem
from learned_optim.meta_train.benchmark.timing import time_steps
from learned_optim.meta_train.inner.speedups import FASTEST

TUNING_SEED, COMPARISON_SEED = 1, 2  # the same architecture, other starting points, batches and random problems
TIMED_RATE = 1e-4  # of whatever is tuned: its steps take equally long at every rate, and here nothing can overflow
MOST_LONGER = FASTEST  # times as many steps, at most, as the reference is given: a speed-up counts no further either


class Harness:
    """Runs the problems of a suite and stores every run as it is done.

    All runs of a problem train the same architecture: see
    :class:`~learned_optim.meta_train.benchmark.evaluation.Problem`.

    Args:
        suite: problems, and the grid of rates.
        baselines: hand-designed optimizers that run on all problems.
        rules: names or paths of learned rules; None: those that each problem names. They are taken as they are.
        cache: where runs are stored.
        device: where trainings run.
        seconds: measure the seconds of a step as well, and train the reference for as long as the slowest optimizer.

    Raises:
        ValueError: a rule that cannot be loaded; before anything is run.
    """

    def __init__(
        self,
        suite: Suite,
        baselines: Sequence[Contender],
        rules: Sequence[str | Path] | None = None,
        *,
        cache: Cache,
        device: torch.device | str = "cpu",
        seconds: bool = False,
    ) -> None:
        self.suite, self.cache, self.device, self.seconds = suite, cache, torch.device(device), seconds
        self.contenders = {
            problem.name: [*baselines, *learned_rules(problem.rules if rules is None else rules)]
            for problem in suite.problems
        }

    def results(self, bar: Bar) -> Iterator[list[Result]]:
        """The results of each problem when it is done, in the order of the contenders."""
        for problem in self.suite.problems:
            runs = _Runs(problem, self.cache, self.device, bar)
            group = [self._result(contender, runs, bar) for contender in self.contenders[problem.name]]
            yield self._with_seconds(group, runs, bar) if self.seconds else group

    def planned_steps(self) -> int:
        """Training steps to do if nothing is stored and no grid has to be continued."""
        return sum(
            self._steps(problem, contender)
            for problem in self.suite.problems
            for contender in self.contenders[problem.name]
        )

    def _steps(self, problem: SuiteProblem, contender: Contender) -> int:
        rates = len(self._rates(contender)) * max(1, len(contender.variants)) if contender.is_tuned else 0
        return problem.steps * (rates * _blocks(problem, problem.tuning_seeds) + _blocks(problem, problem.seeds))

    def _rates(self, contender: Contender) -> tuple[float, ...]:
        return contender.grid or self.suite.rates

    def _result(self, contender: Contender, runs: "_Runs", bar: Bar) -> Result:
        tuned, setting = None, ""
        if contender.is_tuned:
            contender, tuned = self._best(contender, runs, bar)
            setting = contender.setting
        rate = contender.rate if tuned is None else tuned.rate
        bar.say(f"{runs.problem.label}: running {contender.name}")
        blocks = runs.comparison(contender, rate)
        return Result(
            runs.problem,
            contender.name,
            is_rule=contender.is_rule,
            rate=rate,
            edge=tuned.edge if tuned else None,
            tuning=tuned.scores if tuned else {},
            not_held_out=runs.hold_out.absent,
            seconds=sum(float(block["seconds"].sum()) if "seconds" in block else math.nan for block in blocks),
            setting=setting,
            **_joined(blocks),
        )

    def _with_seconds(self, group: Sequence[Result], runs: "_Runs", bar: Bar) -> list[Result]:
        """The results with the seconds of their steps, and with the reference's losses after equal seconds."""
        problem, contenders = runs.problem, self.contenders[runs.problem.name]
        bar.say(f"{problem.label}: measuring seconds")
        makers = {
            contender.name: functools.partial(
                contender.for_module, rate=contender.rate or TIMED_RATE, steps=problem.steps
            )
            for contender in contenders
        }
        timings = time_steps(comparison_task(runs.family, problem.split, problem.draw), makers, self.device)
        timed = [dataclasses.replace(result, timing=timings[result.optimizer]) for result in group]
        (place,) = (place for place, result in enumerate(timed) if result.optimizer == REFERENCE)
        reference = timed[place]
        costs = [cost(result, reference) or 1.0 for result in timed]
        longer = self._longer(reference, contenders[place], max(each for each in costs if each <= MOST_LONGER), runs)
        return [
            dataclasses.replace(result, equal_seconds=at_equal_seconds(result, reference, longer)) for result in timed
        ]

    def _longer(self, reference: Result, contender: Contender, factor: float, runs: "_Runs") -> Result:
        """The reference's runs with so many times as many steps, in whole multiples, so that they are found again."""
        times = math.ceil(factor)
        if times == 1:
            return reference
        longer = runs.of_length(times * reference.problem.steps)
        runs.bar.say(f"{longer.problem.label}: running {contender.name}")
        runs.bar.plan(longer.problem.steps * _blocks(longer.problem, longer.problem.seeds))
        blocks = longer.comparison(contender, reference.rate)
        return dataclasses.replace(reference, problem=longer.problem, **_joined(blocks))

    def _best(self, contender: Contender, runs: "_Runs", bar: Bar) -> tuple[Contender, Tuned]:
        """The variant with the lowest score, of equals the first, at its best rate."""
        found = []
        for variant in contender.variants or (contender,):
            with_setting = f"{variant.name}{f', {variant.setting},' if variant.setting else ''}"
            bar.say(f"{runs.problem.label}: tuning {with_setting} over {len(self._rates(variant))} rates")
            found.append((variant, self._tune(variant, runs, bar)))
        return min(found, key=lambda pair: pair[1].scores[pair[1].rate])

    def _tune(self, contender: Contender, runs: "_Runs", bar: Bar) -> Tuned:
        tried = 0

        def score(rate: float) -> float:
            nonlocal tried
            tried += 1
            if tried > len(self._rates(contender)):
                bar.plan(runs.problem.steps * _blocks(runs.problem, runs.problem.tuning_seeds))
            return runs.tuning_score(contender, rate)

        return tune(score, self._rates(contender))


class _Runs:
    """Trainings of one problem, from the cache or done now."""

    def __init__(self, problem: SuiteProblem, cache: Cache, device: torch.device, bar: Bar) -> None:
        self.cache, self.device, self.bar = cache, device, bar
        self.family = problem.build()
        self.fingerprint = problem_fingerprint(self.family, problem.split, problem.draw)
        self.hold_out = hold_out_of(problem, self.family)
        self.problem = dataclasses.replace(problem, held_out=self.hold_out.rows)
        self.built: dict[tuple[int, int, int], Problem] = {}

    def of_length(self, steps: int) -> "_Runs":
        """The same problem with another number of steps."""
        other = copy.copy(self)
        other.problem, other.built = dataclasses.replace(self.problem, steps=steps), {}
        return other

    def comparison(self, contender: Contender, rate: float | None) -> list[Mapping[str, np.ndarray]]:
        """Block by block "losses" ``(steps + 1, seeds)``, and what :class:`HeldOut` records where data are held out."""
        return list(self._blocks(contender, rate, COMPARISON_SEED, self.problem.seeds, "losses"))

    def tuning_score(self, contender: Contender, rate: float) -> float:
        """Mean final loss on the tuning seeds."""
        blocks = self._blocks(contender, rate, TUNING_SEED, self.problem.tuning_seeds, "final")
        return float(np.concatenate([block["final"] for block in blocks]).mean())

    def _blocks(
        self, contender: Contender, rate: float | None, seed: int, seeds: int, kept: Literal["losses", "final"]
    ) -> Iterator[Mapping[str, np.ndarray]]:
        size = self.problem.instances or seeds
        for block, first in enumerate(range(0, seeds, size)):
            instances = min(size, seeds - first)
            key = {
                "problem": self.fingerprint,
                "steps": self.problem.steps,
                "seed": seed,
                "block": block,
                "instances": instances,
                "optimizer": contender.identity,
                "rate": rate,
                "kept": kept,
                "device": self.device.type,
            }
            if self.problem.held_out:  # no entry where not, as runs were stored before there was one
                key["held_out"] = self.problem.held_out
            if self.hold_out.fingerprint and kept == "losses":
                key["measured"] = self.hold_out.fingerprint
            done = self.bar.done
            train = functools.partial(self._train, contender, rate, (seed, block, instances), kept)
            yield self.cache.get(key, train)
            self.bar.plan(self.bar.done - done - self.problem.steps)  # fewer where stored or diverged

    def _train(
        self, contender: Contender, rate: float | None, runs: tuple[int, int, int], kept: str
    ) -> dict[str, np.ndarray]:
        if runs not in self.built:
            seed, block, instances = runs
            self.built = {  # the latest only: tuning takes the same one through all rates
                runs: Problem(
                    self.family,
                    instances,
                    self.problem.steps,
                    seed,
                    self.problem.split,
                    self.problem.draw,
                    block,
                    self.device,
                    self.hold_out.rows,
                )
            }
        problem, make_optimizer = self.built[runs], contender.maker(rate, self.problem.steps)
        if kept == "final":
            return {kept: final_loss(problem.run(make_optimizer, self.bar.step, by_tensor=contender.is_rule))}
        began = time.perf_counter()
        if problem.has_held_out:
            held_out = HeldOut(problem)
            losses = problem.run(make_optimizer, self.bar.step, by_tensor=contender.is_rule, look=held_out.look)
            arrays = {"losses": losses, **held_out.arrays()}
        else:
            arrays = {"losses": problem.run(make_optimizer, self.bar.step, by_tensor=contender.is_rule)}
        return arrays | {"seconds": np.array([time.perf_counter() - began])}


def _joined(blocks: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Losses, and what was measured on data held out, of all seeds, by their names in :class:`Result`."""
    names = [name for name in ("losses", "held_out", "accuracy") if name in blocks[0]]
    return {name: np.concatenate([block[name] for block in blocks], axis=1) for name in names}


def _blocks(problem: SuiteProblem, seeds: int) -> int:
    return math.ceil(seeds / (problem.instances or seeds))
