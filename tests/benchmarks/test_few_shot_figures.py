"""The tables of docs/few-shot.md are those of the committed rows."""

import pytest

from benchmarks.few_shot import RESULTS
from benchmarks.few_shot_figures import BEGIN, END, PAGE, cost_table, omniglot_table, read, sinusoid_table


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("sine waves", sinusoid_table(read(RESULTS, "sinusoid-*.csv"))),
        ("Omniglot", omniglot_table(RESULTS)),
        ("cost", cost_table(read(RESULTS, "cost.csv"))),
    ],
    ids=["sine-waves", "omniglot", "cost"],
)
def test_table_is_not_older_than_the_rows(name: str, table: str) -> None:
    assert BEGIN.format(name) + table + END in PAGE.read_text(encoding="utf-8")
