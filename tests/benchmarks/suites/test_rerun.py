"""Running a rule again replaces its rows and no others."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks.results import SuiteResults, read, read_suite, with_result, write_suite
from benchmarks.suites import figures
from benchmarks.suites.rerun import rerun
from learned_optim import load_rule, save_rule
from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.benchmark.contenders import baselines
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.report import save_results
from learned_optim.meta_train.benchmark.scores import Result
from learned_optim.meta_train.benchmark.suites import load_suite
from learned_optim.meta_train.reports.plots import Speeds

pytestmark = pytest.mark.slow
SUITE = """
seeds = 3
tuning_seeds = 2
rates = [0.1, 0.01]
steps = 30

[[problems]]
name = "small"
family = "quadratic"

[[problems]]
name = "wide"
family = "quadratic"
dimensions = [20, 20]
"""


@pytest.fixture
def committed(tmp_path: Path) -> tuple[Path, list[Result]]:
    """A folder with results of Adam and two rules, and those of the rules."""
    (tmp_path / "suite.toml").write_text(SUITE, encoding="utf-8")
    names = ["default", "lstm-l2l-quadratic"]
    harness = Harness(load_suite(tmp_path / "suite.toml"), baselines(["Adam"]), names, cache=Cache(None))
    with Bar(harness.planned_steps()) as bar:
        results = {group[0].problem.name: group for group in harness.results(bar)}
    save_results(results, tmp_path, {})
    write_suite(tmp_path, read_suite(tmp_path))
    return tmp_path, [result for group in results.values() for result in group if result.is_rule]


def tables(folder: Path) -> dict[str, list[Any]]:
    return {name: list(read(folder / f"{name}.csv")) for name in ("summary", "curves")}


def test_same_rule_gives_the_same_rows(committed: tuple[Path, list[Result]]) -> None:
    folder, _ = committed
    before = tables(folder)
    rerun(folder, str(folder / "suite.toml"), "default", [], Cache(None))
    assert tables(folder) == before
    assert "default" in (folder / "provenance.json").read_text(encoding="utf-8")


def test_drawn_speedups_are_those_of_the_rows(
    committed: tuple[Path, list[Result]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = committed
    (folder / "speedup.png").touch()
    drawn: list[Speeds] = []

    def figure(speeds: Speeds) -> Figure:
        drawn.append(speeds)
        return Figure()

    monkeypatch.setattr(figures, "speedup_figure", figure)
    figures.redraw(folder, load_suite(folder / "suite.toml"))
    (speeds,) = drawn
    shown = [(label.partition(",")[0], speed.optimizer, speed.factor) for label in speeds for speed in speeds[label]]
    rows = read_suite(folder).summary
    assert shown == [(row["problem"], row["optimizer"], float(str(row["speedup"]))) for row in rows]
    assert (folder / "speedup.png").stat().st_size > 0
    assert not (folder / "profile.png").exists()


def test_speedup_lies_within_its_bar(committed: tuple[Path, list[Result]]) -> None:
    folder, _ = committed
    results = read_suite(folder)
    for group in figures.drawn_results(results, load_suite(folder / "suite.toml")).values():
        for each in group:
            speed = figures.speed(results, each)
            assert speed.low <= speed.factor <= speed.high


def test_rows_of_other_rules_and_problems_are_kept(committed: tuple[Path, list[Result]]) -> None:
    folder, rules = committed
    before = read_suite(folder)
    changed = next(result for result in rules if result.optimizer == "default" and result.problem.name == "small")
    after = with_result(before, Result(changed.problem, "default", changed.losses / 2, is_rule=True))
    own = [(row["problem"], row["optimizer"]) == ("small", "default") for row in before.summary]
    assert [old == new for old, new in zip(before.summary, after.summary, strict=True)] == [not each for each in own]
    assert after.tuning == before.tuning
    for problem, curves in before.curves.items():
        for optimizer, points in curves.items():
            same = (after.curves[problem][optimizer] == points).all()
            assert same == ((problem, optimizer) != ("small", "default"))


def test_new_rule_takes_its_place_behind_the_rows_of_the_problem(committed: tuple[Path, list[Result]]) -> None:
    folder, rules = committed
    before = read_suite(folder)
    fresh = Result(rules[0].problem, "new", rules[0].losses, is_rule=True)
    after = with_result(before, fresh)
    small = [row["optimizer"] for row in before.summary if row["problem"] == "small"]
    assert [row["optimizer"] for row in after.summary][: len(small) + 1] == [*small, "new"]
    assert [row for row in after.summary if row["optimizer"] != "new"] == before.summary
    assert list(after.curves["small"]) == [*before.curves["small"], "new"]
    write_suite(folder, after)
    assert read_suite(folder).summary == after.summary


def test_weights_file_is_run_under_its_stem(committed: tuple[Path, list[Result]]) -> None:
    folder, _ = committed
    suite, weights = str(folder / "suite.toml"), folder / "mine.safetensors"
    save_rule(load_rule("default"), weights)
    with pytest.raises(ValueError, match=r"mine has no rows in .*: name the problems that it is to run on"):
        rerun(folder, suite, str(weights), [], Cache(None))
    rerun(folder, suite, str(weights), ["wide"], Cache(None))
    losses = {(row["problem"], row["optimizer"]): row["final_loss"] for row in read_suite(folder).summary}
    assert losses["wide", "mine"] == losses["wide", "default"]
    assert ("small", "mine") not in losses
    assert '"mine"' in (folder / "provenance.json").read_text(encoding="utf-8")


def test_problem_without_baselines_is_refused(committed: tuple[Path, list[Result]]) -> None:
    folder, rules = committed
    results = read_suite(folder)
    others = [row for row in results.summary if row["problem"] != "small"]
    with pytest.raises(ValueError, match="no rows of problem 'small' beside which default could stand"):
        with_result(SuiteResults(others, results.tuning, results.curves), rules[0])


def test_trainings_on_other_data_are_refused(committed: tuple[Path, list[Result]]) -> None:
    folder, rules = committed
    results = read_suite(folder)
    looks = np.linspace(2.0, 0.5, 26)[:, None].repeat(3, axis=1)
    held_out = dataclasses.replace(rules[0], held_out=looks)
    with pytest.raises(ValueError, match="are of trainings on all of the data"):
        with_result(results, held_out)
    key = (rules[0].problem.name, rules[0].optimizer)
    summary = [
        {**row, "held_out_end": "0.7"} if (row["problem"], row["optimizer"]) == key else row for row in results.summary
    ]
    before = SuiteResults(summary, results.tuning, results.curves)
    with pytest.raises(ValueError, match="are of trainings on four fifths of the data"):
        with_result(before, rules[0])
    after = with_result(before, held_out).summary
    (row,) = (row for row in after if (row["problem"], row["optimizer"]) == key)
    assert (row["held_out_end"], row["held_out_best"], row["held_out_best_step"]) == ("0.5", "0.5", "30")
