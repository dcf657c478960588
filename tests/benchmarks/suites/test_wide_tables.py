"""The claim and the table that are made of the rows of the wide suites."""

import math
from pathlib import Path

import pytest

from benchmarks.suites import wide_tables

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


def test_claim_follows_from_the_rows(root: Path) -> None:
    text = " ".join(wide_tables.claim(root).split())
    assert "On 2 problems" in text
    assert "ends at 1.00 of the loss of AdamW" in text  # of .5 and 2
    assert "(geometric mean; lower on 1), and is 2.00 times as fast as Adam" in text
    assert "lower in the end on 1). Its lowest loss on data held out is 0.80 of" in text
    assert "it ends lower than AdamW with the cosine on 2, and on data held out at 0.90 of its loss" in text


def test_mean_ratio_bounds_each_problem(root: Path) -> None:
    rows = wide_tables.read("second", root)
    ratio = wide_tables.mean_ratio(rows, wide_tables.TOLD, "Adam")
    assert ratio == pytest.approx(0.2)  # of .4 and .001, which counts as .1


def test_table_is_bold_where_the_rule_is_below_all_others(root: Path) -> None:
    lines = wide_tables.table(root=root).splitlines()
    assert len(lines) == 4
    assert lines[2].endswith("| **0.5** | **0.4** | 1 | 1 | 1 | 4.0 |")
    assert lines[3].endswith("| 2 | **0.001** | 1 | 1 | 1 | 1.0 |")
