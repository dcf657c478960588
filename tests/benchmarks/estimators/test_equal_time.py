"""Meta-training with every estimator for equal time, at a size of seconds."""

from pathlib import Path

import pytest

from benchmarks.estimators import equal_time
from benchmarks.results import read


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sizes = {
        "RESULTS": tmp_path,
        "ROWS": tmp_path / "equal_time.csv",
        "PILOT": 0.001,
        "WHOLE": 0.002,
        "VALIDATIONS": 1,
        "RATES": (1e-3,),
        "SEEDS": (0, 1),
        "TASKS": {"quadratics": equal_time.TASKS["quadratics"]},
    }
    for name, value in sizes.items():
        monkeypatch.setattr(equal_time, name, value)
    return tmp_path


def test_every_estimator_has_a_configuration_for_every_kind_of_task() -> None:
    for tasks in equal_time.TASKS:
        for name in equal_time.NAMES:
            config = equal_time.configuration(tasks, name, 1e-3, 0)
            assert config.rule.build(0).name == "schedule-free-lstm"


@pytest.mark.slow
def test_runs_are_made_once_and_become_a_table_and_a_figure(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["es", equal_time.CONSTANTS]
    equal_time.run(equal_time.TASKS, names)
    assert len(capsys.readouterr().out.splitlines()) == len(names) * (1 + 2)  # a pilot, and two seeds
    rows = read(small / "equal_time.csv")
    equal_time.run(equal_time.TASKS, equal_time.NAMES)
    assert read(small / "equal_time.csv")[: len(rows)] != []
    ends = [own[-1][1] for own in equal_time.gains(read(small / "equal_time.csv"), "quadratics", "es")]
    assert len(ends) == 2
    assert "| ES | " in equal_time.table()
    assert equal_time.table().splitlines()[-1].startswith("| tuned Adam | ")
    equal_time.figure()
    assert (small / "equal_time.png").stat().st_size > 10_000


def test_the_rate_is_that_of_the_best_pilot() -> None:
    rows = [
        dict(zip(equal_time.COLUMNS, ("q", "es", "0.4", rate, "100", "1", step, score, "0"), strict=True))
        for rate, step, score in [
            ("0.1", "0", "0.01"),
            ("0.1", "5", "0.3"),
            ("0.01", "0", "0.01"),
            ("0.01", "7", "0.2"),
        ]
    ]
    assert equal_time.best_rate(rows, "q", "es") == 0.01
