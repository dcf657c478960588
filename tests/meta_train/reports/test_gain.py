"""What a specialised rule gains: the draws that it is compared on, the interval, and the verdict."""

import dataclasses

import numpy as np
import pytest

from helpers.benchmarks import timing
from learned_optim.meta_train.benchmark.held_out import ROWS, hold_out_of
from learned_optim.meta_train.benchmark.scores import Result
from learned_optim.meta_train.benchmark.suites import SuiteProblem
from learned_optim.meta_train.reports.gain import DRAWS, SEEDS, Gain, gain_rows, gain_table, of, problems_of, ratio
from learned_optim.meta_train.tasks.lookup import build_family


def result(optimizer: str, factor: float, draw: int = 0) -> Result:
    """Losses that fall exponentially, with some noise of the seeds."""
    noise = np.random.default_rng(draw).uniform(0.99, 1.01, 8)
    losses = np.exp(-factor * np.linspace(0, 1, 101))[:, None] * noise
    return Result(SuiteProblem(f"draw-{draw}", "quadratic", 100), optimizer, losses)


class TestProblems:
    def test_draws_of_a_family_come_from_the_test_split(self) -> None:
        options = {"dimensions": [2, 99]}
        problems = problems_of("quadratic", options, build_family("quadratic", options, "task"), 50)
        assert [(problem.draw, problem.split, problem.seeds) for problem in problems] == [
            (draw, "test", SEEDS) for draw in range(DRAWS)
        ]
        assert all(problem.steps == 50 and problem.build() for problem in problems)

    def test_family_of_one_task_has_all_seeds_on_it(self) -> None:
        name = "helpers.odd_families:OddFamily"
        (problem,) = problems_of(name, {}, build_family(name, {}, "task"), 50)
        assert (problem.draw, problem.seeds) == (0, DRAWS * SEEDS)

    def test_data_are_held_out_where_the_task_has_them(self) -> None:
        for name, rows in {"table": ROWS, "helpers.odd_families:OddFamily": 0}.items():
            family = build_family(name, {}, "task")
            assert {hold_out_of(each, family).rows for each in problems_of(name, {}, family, 50)} == {rows}


class TestGain:
    @pytest.mark.parametrize(
        ("low", "high", "words"), [(1.01, 1.5, "is better"), (0.9, 1.2, "is not shown"), (0.5, 0.9, "is worse")]
    )
    def test_verdict_follows_from_the_interval(self, low: float, high: float, words: str) -> None:
        gain = Gain((low * high) ** 0.5, low, high, 0.8)
        assert words in gain.verdict
        assert gain.better == (words == "is better")

    def test_interval_that_touches_one_is_no_gain(self) -> None:
        assert not Gain(1.2, 1.0, 1.4, 0.9).better

    def test_table_is_over_the_default(self) -> None:
        results = {
            f"draw-{draw}": [result("Adam", 2, draw), result("default", 4, draw), result("mine", 8, draw)]
            for draw in range(2)
        }
        costs = {"Adam": 1.0, "default": 4.0, "mine": 8.0}
        timed = {
            name: [dataclasses.replace(each, timing=timing(costs[each.optimizer])) for each in group]
            for name, group in results.items()
        }
        header, adam, default, mine = gain_table(gain_rows(timed)).splitlines()
        assert "speed-up in steps" in header
        assert "held-out" not in header
        assert adam.split()[1] < default.split()[1] == "1.00" < mine.split()[1]
        assert float(mine.split()[5]) == pytest.approx(float(mine.split()[1]) / 2, abs=0.02)  # steps that cost twice
        assert ratio(of(results, "mine"), of(results, "default")) < 0.1
