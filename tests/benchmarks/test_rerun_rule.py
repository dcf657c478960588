"""Running a rule again replaces its rows and no others."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks import rerun_rule
from benchmarks.rerun_rule import read, replaced, rerun
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
    return tmp_path, [result for group in results.values() for result in group if result.is_rule]


def test_the_same_rule_gives_the_same_rows(committed: tuple[Path, list[Result]]) -> None:
    folder, _ = committed
    before = read(folder)
    rerun(folder, str(folder / "suite.toml"), "default", [], Cache(None))
    after = read(folder)
    for name, rows in before.items():  # but for their place: a problem's rows of the rule stay among the problem's
        assert sorted(map(str, after[name])) == sorted(map(str, rows))
    assert "default" in (folder / "provenance.json").read_text(encoding="utf-8")


def test_speedups_that_are_drawn_are_those_of_the_rows(
    committed: tuple[Path, list[Result]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = committed
    (folder / "speedup.png").touch()
    drawn: list[Speeds] = []

    def figure(speeds: Speeds) -> Figure:
        drawn.append(speeds)
        return Figure()

    monkeypatch.setattr(rerun_rule, "speedup_figure", figure)
    rerun_rule.redraw(folder, load_suite(folder / "suite.toml"))
    (speeds,) = drawn
    shown = [(label.partition(",")[0], speed.optimizer, speed.factor) for label in speeds for speed in speeds[label]]
    rows = read(folder)["summary"]
    assert shown == [(row["problem"], row["optimizer"], float(str(row["speedup"]))) for row in rows]
    assert (folder / "speedup.png").stat().st_size > 0
    assert not (folder / "profile.png").exists()


def test_other_rules_and_problems_stay(committed: tuple[Path, list[Result]]) -> None:
    folder, results = committed
    before = read(folder)
    changed = next(result for result in results if result.optimizer == "default" and result.problem.name == "small")
    after = replaced(before, Result(changed.problem, "default", changed.losses / 2, is_rule=True))
    for name, rows in before.items():
        others = [row for row in rows if (row["problem"], row["optimizer"]) != ("small", "default")]
        assert [row for row in after[name] if row in others] == others
        assert after[name] != rows


def test_a_rule_without_rows_is_refused(committed: tuple[Path, list[Result]]) -> None:
    folder, results = committed
    tables = {name: [row for row in rows if row["optimizer"] != "default"] for name, rows in read(folder).items()}
    with pytest.raises(ValueError, match="no rows of default on small"):
        replaced(tables, results[0])
