"""Bias and variance of the estimators, from measurement to figure, at a size of seconds."""

from pathlib import Path

import pytest
import torch

from benchmarks.estimators import bias_variance, figures
from benchmarks.estimators.toy_problems import RateSchedule, RuggedPlane
from benchmarks.results import RESULTS, read, read_parts
from learned_optim.meta_train.inner.vectorize import VectorizedTask

NAMES = ["TBPTT", "RP", "combined", "combined, paper's weights", "ES", "PES", "ES-Single"]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sizes = {"HORIZON": 6, "GRADIENT_PAIRS": 4, "LOSS_PAIRS": 8, "REFERENCE_PAIRS": 16, "TOY_META_STEPS": 20}
    for name, value in sizes.items():
        monkeypatch.setattr(bias_variance, name, value)
    monkeypatch.setattr(bias_variance, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_lengths_that_are_done_by_themselves_make_one_table(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bias_variance.unrolls([3])
    assert "reference in" in capsys.readouterr().out
    bias_variance.unrolls([1, 3])
    assert "reference in" not in capsys.readouterr().out  # it was kept
    rows = read(small / "unrolls.csv")
    assert [(row["unroll"], row["estimator"]) for row in rows] == [(each, name) for each in "31" for name in NAMES]
    assert {row["estimator"] for row in rows if row["es_weight_mean"]} == set(NAMES[2:4])
    assert list(read_parts(small / "unrolls.json")) == ["reference", "3", "1"]
    figures.draw_unrolls()
    assert (small / "unrolls.png").stat().st_size > 10_000


@pytest.mark.slow
def test_plane_and_paths_are_written_and_drawn(small: Path) -> None:
    bias_variance.toy()
    rows, surface = read(small / "toy.csv"), read(small / "toy-surface.csv")
    assert [row["meta_step"] for row in rows] == ["0", "20"] * 4
    assert (len(surface), len(surface[0])) == (80, 81)
    assert list(read_parts(small / "toy.json")) == ["path", "surface"]
    committed = read(RESULTS / "estimators" / "toy-surface.csv")
    assert list(surface[0]) == list(committed[0])
    figures.draw_toy()
    assert (small / "toy.png").stat().st_size > 10_000


def test_committed_rows_are_those_of_all_lengths_and_estimators() -> None:
    rows = read(RESULTS / "estimators" / "unrolls.csv")
    shown = [(int(row["unroll"]), row["estimator"]) for row in rows]
    assert shown == [(length, name) for length in bias_variance.UNROLLS for name in NAMES]


def test_schedules_that_run_side_by_side_are_each_as_if_alone() -> None:
    rule, task = RateSchedule(), VectorizedTask(RuggedPlane(), 1, seed=0)
    weights = torch.tensor([[-4.0, -4.0], [-3.0, 0.0], [-1.0, -2.0]])
    together = bias_variance.schedule_losses(rule, task, weights)
    alone = [bias_variance.schedule_losses(rule, task, row[None]) for row in weights]
    torch.testing.assert_close(together, torch.cat(alone))
