"""The claim and the table that are made of the rows of the wide suites."""

import math
import statistics
from pathlib import Path

import pytest

from benchmarks.suites import wide_tables
from learned_optim.meta_train.benchmark.rivals import RIVALS
from learned_optim.meta_train.benchmark.suites import load_suite

HEADER = (
    'half,problem,optimizer,final,Adam,cosine,speed-up,strict,/ Adam,/ cosine,"held out, end",best,seconds,diverged'
)


def row(problem: str, optimizer: str, final: float, speedup: float = 1.0, held_out: float = 1.0) -> str:
    return f"second,{problem},{optimizer},{final},1,1,{speedup},1,1,1,{held_out},{held_out},1,0"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    names = ("Adam", "AdamW-cosine", "Adam@0.001")
    others = [row(problem, name, 1.0) for problem in ("perceptron", "physics") for name in names]
    own = [row("perceptron", "default", 0.5, 4.0, 0.8), row("physics", "default", 2.0, 1.0, math.nan)]
    told = [
        row("perceptron", "default total steps", 0.4, held_out=0.9),
        row("physics", "default total steps", 0.001, held_out=math.nan),
    ]
    first = [line.replace("second,", "first,").replace(",1.0,", ",7.0,") for line in (*others, *own)]
    (tmp_path / "wide.csv").write_text("\n".join([HEADER, *first, *others, *own, *told]))
    return tmp_path


def test_claim_says_what_the_rows_do(root: Path) -> None:
    text = " ".join(wide_tables.claim(root).split())
    assert "On 2 problems" in text
    assert "ends at 1.00 of the loss of AdamW" in text  # of .5 and 2
    assert "(geometric mean; lower on 1), and is 2.00 times as fast as Adam" in text
    assert "lower in the end on 1). Its lowest loss on data held out is 0.80 of" in text
    assert "it ends lower than AdamW with the cosine on 2, and on data held out at 0.90 of its loss" in text


def test_single_problem_does_not_decide_a_mean(root: Path) -> None:
    rows = wide_tables.read("second", root)
    ratio = wide_tables.mean_ratio(rows, wide_tables.TOLD, "Adam")
    assert ratio == pytest.approx(0.2)  # of .4 and .001, which counts as .1


def test_table_is_bold_where_the_rule_is_below_all_others(root: Path) -> None:
    lines = wide_tables.table(root=root).splitlines()
    assert len(lines) == 4
    assert lines[2].endswith("| **0.5** | **0.4** | 1 | 1 | 1 | 4.0 |")
    assert lines[3].endswith("| 2 | **0.001** | 1 | 1 | 1 | 1.0 |")


def test_readme_shows_every_loss_and_no_more_than_eight_problems() -> None:
    suite = load_suite("wide-second")
    families = {problem.name: problem.family for problem in suite.problems}
    rows = wide_tables.read("second")
    chosen = wide_tables.chosen_for_readme(rows, families)
    assert len(chosen) <= 8
    assert chosen == [name for name in families if name in chosen]
    lost = {name for name in families if float(rows[name, "default"]["final"]) > float(rows[name, "Adam"]["final"])}
    assert lost  # else the table would say that there is nothing that it is bad at
    assert lost <= set(chosen)
    others = [families[name] for name in chosen if name not in lost]
    assert len(others) == len(set(others))


def test_readme_table_marks_the_lowest_loss_of_a_line_whoever_has_it() -> None:
    head, _, *lines = wide_tables.readme_table().splitlines()
    own = " | ".join(wide_tables.IN_README.values())
    assert head.startswith(f"| problem | {own} | speed-up |")
    last = 1 + len(wide_tables.IN_README)
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        losses = [float(cell.strip("*")) for cell in cells[1:last]]
        bold = [cell.startswith("**") for cell in cells[1:last]]
        assert bold == [loss == min(losses) for loss in losses] or losses.count(min(losses)) > 1


def test_readme_shows_of_each_rival_the_rate_that_is_better_in_the_mean() -> None:
    rows = wide_tables.read("second")
    problems = wide_tables.problems_of(rows)

    def mean(name: str) -> float:
        return statistics.geometric_mean(float(rows[problem, name]["speed-up"]) for problem in problems)

    for shown in wide_tables.IN_README:
        kind = shown.partition("@")[0]
        if kind in RIVALS:
            assert mean(shown) == max(mean(f"{kind}@{rate:g}") for rate in RIVALS[kind].untuned)
