"""Seconds: of the steps of real trainings in turn, as part of a comparison, and beside the load of the machine."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers.benchmarks import NOISY, run, suite
from learned_optim.meta_train.benchmark import harness as harness_module
from learned_optim.meta_train.benchmark import timing as timing_module
from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.benchmark.contenders import baselines, rules
from learned_optim.meta_train.benchmark.evaluation import comparison_task, final_loss
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.timing import FEWEST_ROUNDS, Timing, time_steps
from learned_optim.meta_train.common import load
from learned_optim.meta_train.reports.comparison import compare
from learned_optim.meta_train.tasks import Task

CPU = torch.device("cpu")


def task() -> Task:
    return comparison_task(suite().problems[0].build())


class Sleeping(torch.optim.SGD):
    """Its step takes some milliseconds more."""

    milliseconds = 0.0

    def step(self, closure: Any = None) -> Any:
        time.sleep(self.milliseconds / 1e3)
        return super().step(closure)


def sleeping(milliseconds: float) -> Any:
    def make(module: nn.Module) -> Sleeping:
        optimizer = Sleeping(module.parameters(), lr=1e-4)
        optimizer.milliseconds = milliseconds
        return optimizer

    return make


class TestSteps:
    def test_every_optimizer_is_timed_on_the_module_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing_module, "SECONDS_A_ROUND", 0.002)
        contenders = [*baselines(["SGD@0.1", "AdamW-cosine"]), *rules(["default"])]
        makers = {each.name: lambda module, each=each: each.for_module(module, 1e-4, 10) for each in contenders}
        found = time_steps(task(), makers, CPU, rounds=3)
        assert list(found) == [contender.name for contender in contenders]
        for measured in found.values():
            low, high = measured.quartiles
            assert 0 < low <= high
            assert measured.rounds == 3
            assert measured.step == measured.model + measured.optimizer
            assert 0 < measured.share < 1
        assert len({measured.model for measured in found.values()}) == 1

    def test_seconds_of_the_optimizer_are_told_from_those_of_the_model(self) -> None:
        found = time_steps(task(), {"quick": sleeping(0.0), "slow": sleeping(20.0)}, CPU, rounds=3)
        assert found["slow"].optimizer > 0.02
        assert found["slow"].optimizer - found["quick"].optimizer > 0.015  # a sleep is never shorter than asked
        assert found["slow"].share > found["quick"].share

    def test_slow_steps_have_fewer_rounds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing_module, "SECONDS", 0.02)
        monkeypatch.setattr(timing_module, "SECONDS_A_ROUND", 0.001)
        assert time_steps(task(), {"slow": sleeping(20.0)}, CPU)["slow"].rounds == FEWEST_ROUNDS

    def test_optimizers_take_turns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        order: list[str] = []

        class Training:
            def __init__(self, task: object, make: Any, device: object) -> None:
                self.name = make

            def seconds(self, steps: int) -> tuple[float, float]:
                order.append(self.name)
                return 1.0, (3.0 if self.name == "default" else 1.0)

        monkeypatch.setattr(timing_module, "_Training", Training)
        names: Any = {"Adam": "Adam", "default": "default"}
        found = time_steps(task(), names, CPU, rounds=2)
        assert order[-4:] == ["Adam", "default", "Adam", "default"]
        assert (found["Adam"].step, found["default"].step) == (2.0, 4.0)


@pytest.fixture
def _costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the rule takes two and a half times as long as Adam's, one of SGD half as long; others work as well."""
    seconds = {"Adam": 0.1, "SGD": 0.05, "default": 0.25}

    def measured(task: object, makers: Any, device: object) -> dict[str, Timing]:
        return {name: Timing(0.0, seconds[name], (seconds[name],) * 2, 1, others=1.7) for name in makers}

    monkeypatch.setattr(harness_module, "time_steps", measured)


@pytest.mark.usefixtures("_costs")
class TestComparison:
    @pytest.mark.slow
    def test_adam_is_trained_for_the_seconds_of_each_optimizer(self, tmp_path: Path) -> None:
        chosen = suite({**NOISY, "steps": 40})
        harness = Harness(chosen, baselines(["SGD"]), ["default"], cache=Cache(tmp_path), seconds=True)
        with Bar(harness.planned_steps(), live=True) as bar:
            (group,) = harness.results(bar)
            assert bar.bar.n == bar.bar.total
        plain = run(chosen, tmp_path)["noisy"][0]
        adam, sgd, rule = group
        assert np.array_equal(adam.losses, plain.losses)
        longer = run(suite({**NOISY, "steps": 100}, rates=[adam.rate]), names=())["noisy"][0]
        assert longer.rate == adam.rate
        for result, steps in ((adam, 40), (sgd, 20), (rule, 100)):
            assert result.equal_seconds is not None
            assert result.equal_seconds.steps == steps
            expected = float(final_loss(longer.losses[: steps + 1]).mean())
            assert result.equal_seconds.final[0] == pytest.approx(expected, rel=1e-6)

    def test_seconds_are_shown_and_stored_with_the_load(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cache = Cache(tmp_path / "cache")
        compare(suite(), ["default"], ["SGD"], out=tmp_path, cache=cache, settings={}, seconds=True)
        shown = capsys.readouterr()
        assert "seconds to Adam's loss" in shown.out
        (head,) = (line for line in shown.out.splitlines() if "speed-up over tuned Adam in steps" in line)
        assert "in seconds" in head
        assert "in equal seconds" in head
        assert "THE MACHINE IS BUSY: 1.7 of its load average is other work" in shown.err
        provenance = json.loads((tmp_path / "provenance.json").read_text())
        assert provenance["load_of_others_while_timing"] == {"noisy": 1.7}
        assert {"timing.csv", "seconds.png"} <= {path.name for path in tmp_path.iterdir()}

    @pytest.mark.parametrize(("asked", "expected"), [(None, True), (True, True), (False, False)])
    def test_suite_says_whether_seconds_are_measured(
        self, asked: bool | None, expected: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        chosen = suite(seconds=True)
        compare(chosen, ["default"], ["SGD"], out=tmp_path, cache=Cache(None), settings={}, seconds=asked, json=True)
        document = json.loads(capsys.readouterr().out)
        assert (document["scores_in_seconds"] is not None) == expected
        assert ("seconds_to_adam" in document["problems"]["noisy"][0]) == expected


class TestLoad:
    @pytest.mark.parametrize(("average", "others"), [(0.2, 0.0), (1.0, 0.0), (2.5, 1.5)])
    def test_own_work_is_taken_off_the_load(
        self, average: float, others: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "getloadavg", lambda: (average, 0.0, 0.0))
        monkeypatch.setattr(load, "_BEGAN", time.monotonic() - 1e4)  # long ago, and busy with one core since
        monkeypatch.setattr(load, "_SPENT", time.process_time() - 1e4)
        assert load.load_of_others() == pytest.approx(others, abs=0.01)

    def test_young_process_has_hardly_added_to_the_load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "getloadavg", lambda: (1.0, 0.0, 0.0))
        monkeypatch.setattr(load, "_BEGAN", time.monotonic() - 6.0)
        monkeypatch.setattr(load, "_SPENT", time.process_time() - 6.0)
        assert load.load_of_others() == pytest.approx(math.exp(-0.1), abs=0.01)

    def test_quiet_or_unknown_machine_is_no_warning(self) -> None:
        assert load.busy_machine(0.1) == load.busy_machine(None) == ""
        assert load.busy_machine(0.9).startswith("THE MACHINE IS BUSY: 0.9")
