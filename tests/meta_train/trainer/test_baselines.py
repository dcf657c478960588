"""The lines of a run: start, default, outputs of zero and tuned Adam are scored, recorded, and change nothing else."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes

from helpers.small_runs import QUADRATIC, configuration, metrics, plain, run, weights
from learned_optim import load_rule
from learned_optim.checkpoint import read_provenance
from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.config.load import Config
from learned_optim.meta_train.reports.run_plots import plot_run
from learned_optim.meta_train.reports.runs import read_run
from learned_optim.meta_train.trainer import baselines, tuned_adam
from learned_optim.meta_train.trainer.log import Progress
from learned_optim.meta_train.trainer.progress import Estimate, run_with_progress
from learned_optim.meta_train.trainer.trainer import Trainer
from learned_optim.rules import ScheduleFreeLSTM, UpdateRule

pytestmark = pytest.mark.usefixtures("one_thread")


def steered(lr: float = 1e-2, **changes: Any) -> Config:
    """A small run of the default's architecture."""
    rule = {"architecture": "schedule-free-lstm", "settings": {}}
    return plain(rule=rule, meta_optimizer={"lr": lr}, estimator={"replay_coordinates": None}, **changes)


class TestScores:
    def test_weights_are_the_same_bits_with_and_without_baselines(self, tmp_path: Path) -> None:
        scored, plainly = (
            Trainer(configuration(validation={"baselines": wanted}), tmp_path / str(wanted)) for wanted in (True, False)
        )
        run(scored)
        run(plainly)
        assert torch.equal(weights(scored.module), weights(plainly.module))
        assert torch.equal(weights(scored.averaged), weights(plainly.averaged))
        columns = [
            [{name: value for name, value in row.items() if name != "best_validation"} for row in metrics(folder)]
            for folder in (tmp_path / "True", tmp_path / "False")
        ]
        assert columns[0] == columns[1]
        assert list(scored.baselines) == ["start", "default", "tuned Adam"]  # this architecture has no outputs
        assert plainly.baselines == {}
        assert plainly.gained is None

    def test_start_and_default_are_scored_like_any_rule(self) -> None:
        trainer = Trainer(steered(steps=1))
        for rule in (trainer.module, trainer.averaged):
            assert isinstance(rule, ScheduleFreeLSTM)
            torch.nn.init.constant_(rule.output_bias, 0.3)
        start = trainer.validate(trainer.averaged)
        run(trainer)
        assert trainer.baselines["start"] == start
        assert trainer.baselines["default"] == trainer.validate(load_rule("default"))
        assert trainer.baselines["outputs of zero"] == trainer.validate(ScheduleFreeLSTM()) != start

    def test_rule_without_an_lstm_has_all_of_them(self) -> None:
        rule = {"architecture": "schedule-free-lstm", "settings": {"hidden_size": 0}}
        trainer = Trainer(plain(rule=rule, estimator={"name": "es", "sigma": 0.01}, steps=1))
        run(trainer)
        assert list(trainer.baselines) == ["start", "default", "outputs of zero", "tuned Adam"]
        assert trainer.baselines["start"] == trainer.baselines["outputs of zero"]

    def test_rules_that_do_the_same_are_scored_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer, scored = Trainer(steered(steps=1)), Counter[str]()
        suite = trainer.suites["mixture"]
        score = suite.score

        def counted(rule: UpdateRule) -> float:
            scored["rules"] += 1
            return score(rule)

        monkeypatch.setattr(suite, "score", counted)
        found, seconds = baselines.score_baselines(trainer.averaged, suite, lambda line: None)
        assert seconds > 0
        assert scored["rules"] == 1
        assert found["start"] == found["default"] == found["outputs of zero"]

    def test_adam_is_at_the_best_rate_for_each_task(self) -> None:
        trainer = Trainer(plain(tasks=[QUADRATIC, QUADRATIC | {"dimensions": [9, 9]}], validation={"horizon": 20}))
        suite = trainer.suites["mixture"]
        drawn = [
            tuned_adam.Drawn(task, seed, number)
            for number, (task, seed) in enumerate(suite.vectorized_tasks("validation"))
        ]
        best = [min(suite.logarithm(task, tuned_adam.adam(rate, 20)) for rate in tuned_adam.RATES) for task in drawn]
        assert suite.adam_score(Cache(None)) == pytest.approx(math.exp(sum(best) / len(best)))

    def test_tuning_is_stored_by_the_content_of_the_tasks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache, trained = Cache(tmp_path), Counter[str]()
        adam = tuned_adam.adam

        def counted(rate: float, steps: int) -> tuned_adam.Train:
            trained["rates"] += 1
            return adam(rate, steps)

        monkeypatch.setattr(tuned_adam, "adam", counted)

        def score(**changes: Any) -> tuple[float, int]:
            before = trained["rates"]
            return Trainer(plain(**changes)).suites["mixture"].adam_score(cache), trained["rates"] - before

        first, trainings = score()
        assert trainings >= 5
        assert score(steps=3) == (first, 0)
        assert score(validation={"horizon": 5})[1] > 0
        assert score(tasks=[QUADRATIC | {"condition": [1.0, 21.0]}])[1] > 0


class TestBestWeights:
    def test_start_is_kept_if_nothing_is_better(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        trainer = Trainer(steered(lr=1e3, steps=4, validation={"every": 1, "horizon": 20}), tmp_path)
        start = weights(trainer.module)
        run_with_progress(trainer)
        assert trainer.gained is False
        assert torch.equal(weights(load_rule(str(tmp_path / "best.safetensors"))), start)
        assert read_provenance(tmp_path / "best.safetensors")["meta_step"] == 0
        assert "warning: no weights validated better than the start" in capsys.readouterr().err

    def test_weights_that_do_not_move_are_no_gain(self) -> None:
        trainer = Trainer(steered(lr=1e-30, steps=2, validation={"every": 1}))
        run(trainer)
        assert trainer.best_validation == trainer.baselines["start"]
        assert trainer.gained is False

    def test_better_weights_replace_the_start(self, capsys: pytest.CaptureFixture[str]) -> None:
        rule = {"architecture": "lstm-l2l", "settings": {"hidden_size": 2}}
        trainer = Trainer(
            plain(rule=rule, steps=40, meta_optimizer={"lr": 0.03}, validation={"every": 10, "horizon": 9})
        )
        run_with_progress(trainer)
        assert trainer.gained
        assert trainer.best_validation < trainer.baselines["start"]
        assert "warning" not in capsys.readouterr().err


class TestRecord:
    def test_baselines_survive_resuming_and_are_not_scored_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = Trainer(configuration(), tmp_path)
        for progress in trainer.run():
            if progress.meta_step == 5:
                break

        def refuse(*arguments: object) -> dict[str, float]:
            raise AssertionError("scored twice")

        monkeypatch.setattr("learned_optim.meta_train.trainer.trainer.score_baselines", refuse)
        resumed = Trainer.resume(tmp_path)
        assert resumed.baselines == trainer.baselines != {}
        run(resumed)
        assert read_provenance(tmp_path / "best.safetensors")["baselines"] == trainer.baselines

    def test_run_without_baselines_is_resumed_without(self, tmp_path: Path) -> None:
        run(Trainer(configuration(validation={"baselines": False}), tmp_path))
        assert Trainer.resume(tmp_path).baselines == {}
        assert read_run(tmp_path).baselines == {}

    def test_baselines_that_are_no_numbers_are_recorded(self, tmp_path: Path) -> None:
        tasks = [{"family": "helpers.user_tasks:NeverFiniteFamily"}]
        run(Trainer(plain(steps=1, tasks=tasks), tmp_path))
        assert all(map(math.isnan, Trainer.resume(tmp_path).baselines.values()))
        assert not (tmp_path / "best.safetensors").exists()

    def test_baselines_are_drawn_beside_the_validation_score(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = Trainer(configuration(), tmp_path)
        run(trainer)
        drawn: list[float] = []
        axhline = Axes.axhline

        def noted(axes: Axes, y: float, **style: Any) -> Any:
            drawn.append(y)
            return axhline(axes, y, **style)

        monkeypatch.setattr(Axes, "axhline", noted)
        plot_run(read_run(tmp_path), tmp_path / "run.png")
        assert sorted(drawn) == sorted(set(trainer.baselines.values()))


class TestEstimate:
    def test_time_of_a_run_is_told_once_after_some_steps(self) -> None:
        estimate = Estimate(1_000)
        seconds = [8.0, 16.0, 24.0, *(24.0 + 0.5 * step for step in range(1, 20))]  # the first steps run ahead
        lines = [estimate.after(_after(step, clock)) for step, clock in enumerate(seconds, 1)]
        told = [line for line in lines if line is not None]
        assert len(told) == 1
        assert "a meta-step takes 0.5 s; all 1,000 take about 9 minutes" in told[0]

    def test_slow_steps_are_not_waited_for(self) -> None:
        estimate = Estimate(100)
        lines = [estimate.after(_after(step, 20.0 * step), validation=20.0) for step in range(1, 5)]
        assert [line is None for line in lines] == [True, True, True, False]
        assert "all 100 take about 65 minutes" in str(lines[-1])  # 80 s, and 96 times 40


def _after(step: int, seconds: float) -> Progress:
    return Progress(step, 0.0, 0.0, 0.0, 0, None, math.inf, seconds)
