"""Speed-ups in seconds: those in steps, times the reference's seconds of a step over the optimizer's own."""

import csv
from pathlib import Path

import pytest

from benchmarks.suites import readme_table, wide_seconds
from benchmarks.suites.wide_seconds import HEADER, steps_of
from helpers.wide_rows import write_rows

SLOWER = {"default": 2.0, "Prodigy@1": 0.5}  # than Adam: milliseconds of a step, of which half are the model's


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Seconds beside the rows: a large model and a small one, and one of which not all rivals have rows."""
    write_rows(tmp_path)
    names = ("default", "Prodigy@1", "Muon@0.003", "Muon@0.01", "Adam@0.001", "Adam", "AdamW-cosine")
    lines = [
        (problem, name, size, 0.5, SLOWER.get(name, 1.0) - 0.5, 15, 0.0)
        for problem, size in (("perceptron", 100_000), ("valleys", 4), ("gru", 1))
        for name in names
    ]
    with (tmp_path / "seconds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *lines])
    return tmp_path


def test_a_slow_step_costs_its_share_of_the_speed_up(root: Path) -> None:
    head, _, *lines = wide_seconds.table(root).splitlines()
    assert head == "| | in steps | in seconds | in seconds, 1 models of 100,000 parameters and more |"
    assert lines == [
        "| default rule | **2.00** | 1.00 | 2.00 |",
        "| Prodigy | 1.00 | **2.00** | **4.00** |",
        "| Muon, 0.003 | 0.13 | 0.13 | 0.13 |",
        "| Muon, 0.01 | 0.25 | 0.25 | 0.25 |",
        "| Adam, 0.001 | 0.25 | 0.25 | 0.25 |",
        "| AdamW-cosine, tuned | 1.50 | 1.50 | 1.50 |",
    ]


def test_readme_shows_of_each_rival_its_better_rate_and_where_each_is_ahead(root: Path) -> None:
    _, _, *lines = readme_table.table(root).splitlines()
    assert lines == [
        "| default rule, nothing set | **2.00** | 1.00 | 0.50 | 2.00 |  |",
        "| Prodigy | 1.00 | **2.00** | 0.50 | 2.00 | 1 of 2 |",
        "| Muon, 0.01 | 0.25 | 0.25 | 2.00 | 2.00 | 0 of 2 |",
        "| Adam, 0.001 | 0.25 | 0.25 | 4.00 | 2.00 | 0 of 2 |",
        "| Adam, tuned | 1.00 | 1.00 | 1.00 | **1.00** | 0 of 2 |",
        "| AdamW-cosine, tuned | 1.50 | 1.50 | **0.40** | 1.50 | 2 of 2 |",
    ]


def test_readme_has_at_most_eight_rows_and_does_not_hide_a_rival_that_is_ahead() -> None:
    _, _, *lines = readme_table.table().splitlines()
    assert len(lines) <= 8
    assert any(int(line.split("|")[-2].split()[0]) > 0 for line in lines[1:])


def test_steps_are_timed_and_rows_of_other_problems_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_seconds, "RESULTS", tmp_path)
    monkeypatch.setattr(wide_seconds, "measured", lambda rows: ["default"])
    for problem in ("valleys", "deep-linear", "valleys"):
        wide_seconds.main(["--problems", problem])
    with (tmp_path / "seconds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["problem"], row["parameters"]) for row in rows if row["optimizer"] == "default"] == [
        ("valleys", "4"),
        ("deep-linear", "228"),
    ]
    assert {row["optimizer"] for row in rows} == {"default", "Adam", "AdamW-cosine"}
    assert all(seconds > 0 for seconds in steps_of(rows).values())
