"""The comparison behind every published figure: baselines are tuned fairly, and what is doubtful is said."""

import csv
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from learned_optim.meta_train import benchmark
from learned_optim.meta_train.benchmark import Comparison, Curve, compare, save_results, table
from learned_optim.meta_train.evaluation import Edge, Problem
from learned_optim.meta_train.plots import comparison_figure
from learned_optim.meta_train.seeds import torch_generator
from learned_optim.meta_train.tasks import QuadraticFamily

STEPS = 5
NOISY = Comparison("noisy quadratics", QuadraticFamily((2, 50), condition=(1.0, 30.0), noise=0.1), STEPS, ("default",))


def curve(optimizer: str, rate: float | None, edge: Edge | None = None) -> Curve:
    flat = np.ones(STEPS + 1)
    return Curve(optimizer, rate, flat, flat, flat, 1.0, 1.0, 1.0, edge)


def test_tuning_sees_nothing_of_the_comparison_but_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[Problem] = []

    class Recorded(Problem):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            problems.append(self)

    monkeypatch.setattr(benchmark, "Problem", Recorded)
    compare(NOISY, [], seeds=3, baselines=["SGD"], rates=(0.1, 0.01))
    assert len({problem.task.coordinates for problem in problems}) == 1

    def first_batch(problem: Problem) -> Tensor:
        batch: Tensor = problem.task.batch(torch_generator(problem.seed, "comparison batches"))
        return batch

    for draws in (
        [problem.task.initial_parameters for problem in problems],
        [problem.task.buffers["module.matrix"].flatten(1) for problem in problems],
        [first_batch(problem) for problem in problems],
    ):
        tuning, comparison = ({tuple(row.tolist()) for row in draw} for draw in draws)
        assert len(tuning) == len(comparison) == 3
        assert tuning & comparison == set()


def test_rate_at_an_edge_is_flagged_in_the_table_and_the_csv(tmp_path: Path) -> None:
    curves = [curve("SGD", 30.0, "upper"), curve("Adam", 0.01), curve("NAG", 1e-5, "lower"), curve("mine", None)]
    text = table(curves)
    notes = [line for line in text.splitlines() if line.startswith("*")]
    assert [note.split(":")[0] for note in notes] == ["* SGD", "* NAG"]
    assert "upper edge" in notes[0]
    assert "lower edge" in notes[1]
    assert all("may be understated" in note for note in notes)
    assert "30* " in text
    assert "0.01 " in text

    save_results({"problem": curves}, tmp_path, {})
    with (tmp_path / "summary.csv").open(newline="") as file:
        edges = {row["optimizer"]: row["edge"] for row in csv.DictReader(file)}
    assert edges == {"SGD": "upper", "Adam": "", "NAG": "lower", "mine": ""}


@pytest.mark.parametrize(
    ("rates", "edge"), [((1e-9, 0.1, 1e3), None), ((1e-9, 1e-8, 1e3), None), ((0.1, 1e3), "lower")], ids=str
)
def test_comparison_carries_the_edge_of_the_tuning(rates: tuple[float, ...], edge: str | None) -> None:
    (found,) = compare(NOISY, [], seeds=2, baselines=["SGD"], rates=rates)
    assert found.edge == edge


@pytest.mark.parametrize("problems", [1, 2, 3, 4, 5])
def test_figure_has_no_empty_panel(problems: int) -> None:
    names = [f"problem {number}" for number in range(problems)]
    figure = comparison_figure({name: [curve("Adam", 0.1)] for name in names}, {name: name for name in names})
    assert [panel.get_title() for panel in figure.axes if panel.get_visible()] == names
