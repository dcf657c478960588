"""Run a suite: tune each baseline on runs of its own, then take baselines and rules through the same fresh ones."""

import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from learned_optim.meta_train.benchmark.cache import Cache, problem_fingerprint
from learned_optim.meta_train.benchmark.contenders import Contender
from learned_optim.meta_train.benchmark.contenders import rules as learned_rules
from learned_optim.meta_train.benchmark.evaluation import Problem, Tuned, final_loss, tune
from learned_optim.meta_train.benchmark.held_out import HeldOut
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.scores import Result
from learned_optim.meta_train.benchmark.suites import Suite, SuiteProblem

TUNING_SEED, COMPARISON_SEED = 1, 2  # the same architecture, other starting points, batches and random problems


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
    ) -> None:
        self.suite, self.cache, self.device = suite, cache, torch.device(device)
        self.contenders = {
            problem.name: [*baselines, *learned_rules(problem.rules if rules is None else rules)]
            for problem in suite.problems
        }

    def results(self, bar: Bar) -> Iterator[list[Result]]:
        """The results of each problem when it is done, in the order of the contenders."""
        for problem in self.suite.problems:
            runs = _Runs(problem, self.cache, self.device, bar)
            yield [self._result(contender, runs, bar) for contender in self.contenders[problem.name]]

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
            np.concatenate([block["losses"] for block in blocks], axis=1),
            contender.is_rule,
            rate,
            tuned.edge if tuned else None,
            tuned.scores if tuned else {},
            np.concatenate([block["held_out"] for block in blocks], axis=1) if "held_out" in blocks[0] else None,
            sum(float(block["seconds"].sum()) if "seconds" in block else math.nan for block in blocks),
            setting,
        )

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
        self.problem, self.cache, self.device, self.bar = problem, cache, device, bar
        self.family = problem.build()
        self.fingerprint = problem_fingerprint(self.family, problem.split, problem.draw)
        self.built: dict[tuple[int, int, int], Problem] = {}

    def comparison(self, contender: Contender, rate: float | None) -> list[Mapping[str, np.ndarray]]:
        """Block by block "losses" ``(steps + 1, seeds)``; "held_out" ``(looks, seeds)`` where data are held out."""
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
                    self.problem.held_out,
                )
            }
        problem, make_optimizer = self.built[runs], contender.maker(rate, self.problem.steps)
        if kept == "final":
            return {kept: final_loss(problem.run(make_optimizer, self.bar.step, by_tensor=contender.is_rule))}
        began = time.perf_counter()
        if problem.has_held_out:
            held_out = HeldOut(problem)
            losses = problem.run(make_optimizer, self.bar.step, by_tensor=contender.is_rule, look=held_out.look)
            arrays = {"losses": losses, "held_out": held_out.losses}
        else:
            arrays = {"losses": problem.run(make_optimizer, self.bar.step, by_tensor=contender.is_rule)}
        return arrays | {"seconds": np.array([time.perf_counter() - began])}


def _blocks(problem: SuiteProblem, seeds: int) -> int:
    return math.ceil(seeds / (problem.instances or seeds))
