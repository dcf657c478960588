"""The tables of the 2016 paper's experiments: ratios, losses, and which rule is at or below the paper's ratio."""

import pytest

from benchmarks.results import Row
from benchmarks.suites.l2l_2016 import EXPERIMENTS
from benchmarks.suites.l2l_tables import losses_table, ratios_table, reached

LOSSES = {"Adam": 0.4, "NAG": 0.25, "lstm-l2l-mnist": 0.2, "specialised-mnist": 0.18, "default": 0.3}


def cells(table: str) -> list[list[str]]:
    """The cells of a Markdown table, row by row, its header first."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [rows[0], *rows[2:]]


def results(problem: str, losses: dict[str, float]) -> dict[tuple[str, str], Row]:
    """Rows of one problem."""
    return {(problem, name): {"final_loss": str(loss), "rate": "", "edge": ""} for name, loss in losses.items()}


def test_ratios_are_to_the_best_baseline_and_to_adam_and_name_the_rules_that_reach_the_paper() -> None:
    # In the paper .26 over NAG's .34 and Adam's .37, which is .76 and .70.
    header, row = cells(ratios_table(results("mnist", LOSSES)))
    shown = dict(zip(header, row, strict=True))
    assert shown == {
        "problem": "MNIST 784-20-10 sigmoid, 100 steps",
        "lstm-l2l / best": "0.80",
        "specialised / best": "0.72",
        "default / best": "1.20",
        "paper / best": "0.76",
        "at or below the paper": "specialised",
        "lstm-l2l / Adam": "0.50",
        "specialised / Adam": "0.45",
        "default / Adam": "0.75",
        "paper / Adam": "0.70",
    }


def test_cells_of_a_rule_that_has_not_been_run_and_of_figures_that_the_paper_lacks_are_empty() -> None:
    rows = results("cifar-2", {"Adam": 0.4, "lstm-l2l-cifar": 0.2, "default": 0.6})
    header, row = cells(ratios_table(rows))
    shown = dict(zip(header, row, strict=True))
    assert [shown[f"specialised / {reference}"] for reference in ("best", "Adam")] == ["", ""]
    assert (shown["paper / best"], shown["paper / Adam"], shown["at or below the paper"]) == ("below 1", "", "lstm-l2l")
    header, row = cells(losses_table(rows))
    assert row == ["CIFAR-2", "**0.2**", "", "0.6", "0.4", "Adam 0.4", "", "", ""]


def test_losses_stand_beside_those_of_the_papers_figure() -> None:
    _, row = cells(losses_table(results("mnist", LOSSES)))
    assert row[1:] == ["**0.2**", "**0.18**", "0.3", "0.4", "NAG 0.25", "0.26", "0.37", "NAG 0.34"]


@pytest.mark.parametrize(
    ("problem", "rule", "specialised", "expected"),
    [
        ("mnist", 0.764, 0.766, "lstm-l2l"),  # .76 in the paper, and as many decimals as the table shows
        ("mnist", 0.5, 0.5, "lstm-l2l and specialised"),
        ("mnist", 0.9, None, "none"),
        ("mnist-relu", 1.5, 0.99, "specialised"),  # the paper's rule fails there: below the baselines is enough
        ("cifar-10", 1.0, None, "none"),
    ],
)
def test_the_bar_is_the_papers_ratio_or_one(
    problem: str, rule: float, specialised: float | None, expected: str
) -> None:
    assert reached(EXPERIMENTS[problem], rule, specialised) == expected


def test_only_experiments_that_were_run_have_a_row() -> None:
    assert len(cells(ratios_table(results("mnist", LOSSES)))) == 2
    assert len(cells(ratios_table(results("mnist", {"Adam": 1.0})))) == 1
