"""Rivals as they come out of the box: tables show where they are ahead, and count only problems that all ran."""

from pathlib import Path

import pytest

from benchmarks.suites import rival_tables
from benchmarks.suites.wide import rivals_of
from helpers.wide_rows import write_rows
from learned_optim.meta_train.benchmark.rivals import RIVALS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    return tmp_path


def test_means_are_over_the_problems_that_all_ran(root: Path) -> None:
    _, _, *lines = rival_tables.means_table(root).splitlines()
    assert lines == [
        "| default rule | **2.00** | **4.00** | **1.00** | **0.50** | **2.00** | **2.00** |  |",
        "| Prodigy | 1.00 | 2.00 | 0.50 | **0.50** | **2.00** | **2.00** | 1 of 2 |",
        "| Muon, 0.003 | 0.13 | 0.13 | 0.06 | 8.00 | **2.00** | **2.00** | 2 of 2 |",
        "| Muon, 0.01 | 0.25 | 0.25 | 0.13 | 2.00 | **2.00** | **2.00** | 2 of 2 |",
        "| Adam, 0.001 | 0.25 | 0.25 | 0.13 | 4.00 | **2.00** | **2.00** | 2 of 2 |",
    ]


def test_rival_that_is_ahead_on_a_problem_is_bold_there(root: Path) -> None:
    head, _, *lines = rival_tables.problems_table(root).splitlines()
    assert head == "| problem | default rule | Prodigy | Muon, 0.003 | Muon, 0.01 | Adam, 0.001 | Adam, tuned |"
    assert [line.split("|", 2)[2] for line in lines] == [
        " 0.5 | **0.25** | 8 | 2 | 4 | 1 |",
        " **0.5** | 1 | 8 | 2 | 4 | 1 |",
    ]


def test_claim_counts_the_problems_on_which_a_rival_ends_lower(root: Path) -> None:
    text = " ".join(rival_tables.claim(root).split())
    assert "on 2 problems, the default rule is 2.00 times as fast as Adam" in text
    assert "the fastest rival, Prodigy, is 1.00 times as fast" in text
    assert "below the default rule on 1 of them: Prodigy on 1; Muon, 0.003 on 0; Muon, 0.01 on 0." in text


def test_rivals_are_named_or_asked_for_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [each.name for each in rivals_of("Muon@0.01,Muon")] == ["Muon@0.01", "Muon"]
    assert rivals_of("") == []
    monkeypatch.setattr("benchmarks.suites.wide.rival_names", lambda kind: ["Muon"] if kind == "tuned" else [])
    assert [each.name for each in rivals_of("tuned")] == ["Muon"]


def test_every_untuned_rival_has_a_name_in_the_tables() -> None:
    for name, rival in RIVALS.items():
        for rate in rival.untuned:
            assert f"{name}@{rate:g}" in rival_tables.TITLES
