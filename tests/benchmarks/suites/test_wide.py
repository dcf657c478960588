"""The benchmark by which the default rule's constants are chosen: its figures, constants and suites."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.results import read, read_parts
from benchmarks.suites import wide
from learned_optim import LearnedOptimizer, load_rule, save_rule
from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.benchmark.scores import Result
from learned_optim.meta_train.benchmark.suites import Suite, SuiteProblem, load_suite, suite_from_tables
from learned_optim.rules import ScheduleFreeLSTM, schedule_free_lstm

HALVES = ("first", "second")
STEPS = 20


def result(optimizer: str, last: float, *, family: str = "mlp", held_out: float | None = None) -> Result:
    losses = np.linspace(2.0, last, STEPS + 1)[:, None].repeat(2, 1)
    looks = None if held_out is None else np.array([[2.0, 2.0], [held_out / 2, held_out / 2], [held_out, held_out]])
    return Result(SuiteProblem("p", family, STEPS, seeds=2), optimizer, losses, held_out=looks, seconds=3.0)


def group(ours: float, **others: Any) -> list[Result]:
    names = {"Adam": 1.0, "AdamW-cosine": 0.8, "Adam@0.001": 1.6, "mine": ours}
    return [result(name, last, **others) for name, last in names.items()]


def own_row(ours: float, **others: Any) -> wide.ProblemRow:
    return wide.rows(group(ours, **others))[-1]


class TestFigures:
    def test_unreached_target_counts_as_a_quarter_in_strict_speedups(self) -> None:
        behind, ahead = own_row(1.05), own_row(0.5)
        assert behind.strict == 0.25 < behind.speedup < 1
        assert ahead.strict == ahead.speedup > 1
        assert own_row(1.0).strict == 1

    def test_ratios_are_to_adam_the_schedule_and_untuned_adam(self) -> None:
        results = group(0.5, held_out=1.0)
        results[2] = result("Adam@0.001", 1.6, held_out=4.0)
        row = wide.rows(results)[-1]
        finals = [each.final[0] for each in results]
        assert row.to_adam == finals[3] / finals[0]
        assert row.to_scheduled == finals[3] / finals[1]
        assert (row.held_out_end, row.held_out_best) == (0.25, 0.25)
        assert math.isnan(own_row(0.5).held_out_end)

    def test_summary_counts_problems_lower_behind_and_diverged(self) -> None:
        found = [*wide.rows(group(0.5)), *wide.rows(group(1.01)), *wide.rows(group(1.5, family="quadratic"))]
        broken = result("mine", 1.0)
        broken.losses[STEPS // 2 :] = math.inf
        found += wide.rows([*group(1.0)[:3], broken])
        lines = {tuple(line[:2]): dict(zip(wide.summary(found)[0], line, strict=True)) for line in wide.summary(found)}
        everything, networks = lines["mine", "4 all"], lines["mine", "3 networks"]
        assert [everything[name] for name in ("lower", "behind 2%", "diverged", "seconds")] == ["1", "2", "1", "12"]
        assert [networks[name] for name in ("lower", "behind 2%", "diverged", "seconds")] == ["1", "1", "1", "9"]
        assert lines["Adam", "4 all"]["speed-up"] == "1.000"

    def test_geometric_mean_is_bounded_and_ignores_nan(self) -> None:
        assert wide.geometric_mean([2.0, 8.0, math.nan]) == pytest.approx(4.0)
        assert wide.geometric_mean([1e-30, math.inf]) == pytest.approx(1.0)
        assert math.isnan(wide.geometric_mean([math.nan]))


class TestConstants:
    @pytest.fixture(autouse=True)
    def _restored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("GAIN", "TIME_SCALES"):
            monkeypatch.setattr(schedule_free_lstm, name, getattr(schedule_free_lstm, name))

    def test_constant_changes_the_step_and_the_identity(self) -> None:
        def loss() -> float:
            weights = torch.ones(3, requires_grad=True)
            optimizer = LearnedOptimizer([weights], load_rule("default"), fused=False)
            for _ in range(30):
                weights.grad = weights.detach().clone()
                optimizer.step()
            return float(weights.detach().square().sum())

        before, settings = loss(), wide.parsed(["GAIN=0.5"])
        plain = wide.contender("default", {})
        wide.set_constants(settings)
        changed = wide.contender("default", settings)
        assert schedule_free_lstm.GAIN == 0.5
        assert loss() != before
        assert changed.identity == {**plain.identity, "constants": {"GAIN": 0.5}}
        assert (plain.name, changed.name) == ("default", "default GAIN=0.5")

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("GIAN=0.3", "no constant 'GIAN'; it has .*GAIN"),
            ("GAIN=(1, 2)", r"GAIN is 0.2, and cannot be \(1, 2\)"),
            ("GAIN='much'", "GAIN is 0.2, and cannot be 'much'"),
            ("GAIN", "--set takes NAME=VALUE"),
            ("GAIN=much", "--set takes NAME=VALUE"),
        ],
    )
    def test_invalid_constant_is_refused(self, setting: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            wide.set_constants(wide.parsed([setting]))

    def test_rule_setting_is_checked_and_changes_the_identity(self) -> None:
        changed, plain = wide.contender("default", {"rate": 0.06}), wide.contender("default", {})
        assert changed.identity != plain.identity
        with pytest.raises(ValueError, match="rule default has no setting 'rote'; it has hidden_size, rate"):
            wide.contender("default", {"rote": 0.06})

    def test_zeroed_outputs_have_another_identity(self, tmp_path: Path) -> None:
        steered = ScheduleFreeLSTM()
        torch.nn.init.ones_(steered.output_bias)
        save_rule(steered, tmp_path / "steered.safetensors")
        source = str(tmp_path / "steered.safetensors")
        rule = wide.zeroed(load_rule("default"))
        assert not any(parameter.any() for name, parameter in rule.named_parameters() if name.startswith("output"))
        assert wide.contender(f"{source}@0", {}).identity != wide.contender(source, {}).identity
        del rule.output_weight, rule.output_bias
        with pytest.raises(ValueError, match="no output layer"):
            wide.zeroed(rule)

    def test_total_steps_is_passed_on_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[dict[str, Any]] = []
        monkeypatch.setattr(wide, "LearnedOptimizer", lambda parameters, rule, **options: given.append(options))
        monkeypatch.setattr(wide, "code_fingerprint", lambda *classes: "code")
        for told in (True, False):
            contender = wide.contender("default", {}, total_steps=told)
            contender.build([], 0.0, 70)
            assert contender.identity.get("total_steps") == ("code" if told else None)
        assert given == [{"total_steps": 70}, {}]

    def test_rules_of_two_runs_are_shown_under_different_names(self) -> None:
        names = [wide.shown_name(f"runs/{run}/best.safetensors@0", {}, False) for run in ("one", "two")]
        assert names == ["one/best@0", "two/best@0"]


class TestSuites:
    def test_halves_have_the_same_families(self) -> None:
        first, second = (load_suite(f"wide-{half}") for half in HALVES)
        assert len(first.problems) >= 14
        assert len(second.problems) >= 14
        assert {problem.family for problem in first.problems} == {problem.family for problem in second.problems}

    def test_halves_share_no_problem(self) -> None:
        first, second = ([problem.build() for problem in load_suite(f"wide-{half}").problems] for half in HALVES)
        assert not [family for family in first if family in second]

    def test_first_half_uses_no_evaluation_data(self) -> None:
        first = load_suite("wide-first")
        assert "test" not in {problem.split for problem in first.problems}
        assert not [problem.name for problem in first.problems if "fashion-mnist" in problem.options.values()]

    def test_baselines_are_those_that_the_table_needs(self) -> None:
        for half in HALVES:
            assert set(load_suite(f"wide-{half}").baselines) == {"Adam", wide.SCHEDULED, "Adam@1e-3"}


def test_run_prints_its_table_and_writes_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wide, "load_suite", lambda name: tiny())
    wide.main(["default,default@0", "--cache", str(tmp_path / "cache"), "--csv", str(tmp_path / "rows.csv")])
    shown = capsys.readouterr().out
    assert "default@0" in shown
    assert "2 networks" not in shown
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["optimizer"] for row in rows] == ["Adam", "AdamW-cosine", "Adam@0.001", "default", "default@0"]
    assert Cache(tmp_path / "cache").folder is not None
    assert isinstance(SimpleNamespace(**rows[-1]).final, str)


def test_saved_rows_replace_those_of_the_same_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "load_suite", lambda name: tiny())
    monkeypatch.setattr(wide, "RESULTS", tmp_path)
    for half, rules in (("first", "default"), ("second", "default"), ("first", "default@0,default")):
        wide.main([rules, "--half", half, "--cache", str(tmp_path / "cache"), "--save"])
    path = tmp_path / "wide" / "wide.csv"
    shown = [(row["half"], row["optimizer"]) for row in read(path)]
    baselines = ["Adam", "AdamW-cosine", "Adam@0.001"]
    assert sorted(shown) == sorted(
        [(half, name) for half in HALVES for name in [*baselines, "default"]] + [("first", "default@0")]
    )
    assert len(read_parts(path.with_suffix(".json"))) == 3


def tiny() -> Suite:
    problem = {"name": "q", "family": "quadratic", "steps": 5, "seeds": 2, "tuning_seeds": 1, "dimensions": [3, 3]}
    baselines = ["Adam", "AdamW-cosine", "Adam@1e-3"]
    return suite_from_tables({"name": "tiny", "rates": [0.1], "baselines": baselines, "problems": [problem]})
