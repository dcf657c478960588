"""Tables of README.md and docs/ are those of the committed rows, wherever their markers stand."""

import re
import shutil
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.results import SUITES, Row
from benchmarks.suites import summary_tables
from benchmarks.suites.summary_tables import Results
from helpers.paths import ROOT
from learned_optim.meta_train.benchmark.suites import load_suite


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with the documents alone, which the command takes for the checkout's."""
    for path in tables.documents(ROOT):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", tables.documents(), ids=lambda path: path.name)
def test_tables_show_the_committed_results(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert tables.updated(path.name, text) == text, "run python -m benchmarks.tables"


def test_every_table_stands_in_a_document_once() -> None:
    found = [name for path in tables.documents() for name in tables.names_in(path.read_text(encoding="utf-8"))]
    assert len(found) == len(set(found))
    assert set(tables.TABLES) == set(found)


def test_check_reports_stale_documents_and_changes_nothing(copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copies / "docs" / "results.md"
    fresh = path.read_text(encoding="utf-8")
    begin = fresh.index(tables.BEGIN.format("robustness"))
    stale = fresh[:begin] + re.sub(r"\*\*\d\S*\*\*", "**0.001**", fresh[begin:], count=1)
    assert stale != fresh
    assert tables.main(["--check"]) == 0
    path.write_text(stale, encoding="utf-8")
    assert tables.main(["--check"]) == 1
    assert path.read_text(encoding="utf-8") == stale
    assert "results: docs/results.md; run python -m benchmarks.tables" in capsys.readouterr().err
    assert tables.main([]) == 0
    assert path.read_text(encoding="utf-8") == fresh


def test_table_is_written_into_whichever_page_holds_its_markers(copies: Path) -> None:
    page = copies / "docs" / "new.md"
    page.write_text(f"# New\n\n{tables.BEGIN.format('readme')}\n{tables.END}\n\nEnd.\n", encoding="utf-8")
    assert tables.main([]) == 0
    begin, end = (marker.format("readme") for marker in (tables.BEGIN, tables.END))
    expected = f"# New\n\n{begin}\n{tables.TABLES['readme']()}\n{end}\n\nEnd.\n"
    assert page.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (tables.BEGIN.format("nothing") + "\n" + tables.END, "page.md asks for a table 'nothing'; there are claim, "),
        (tables.BEGIN.format("claim") + "\n", "must hold '<!-- end of the table -->' after '<!-- claim table"),
        (
            "\n".join([tables.BEGIN.format("claim"), tables.BEGIN.format("wide"), tables.END]),
            "must hold '<!-- end of the table -->' after '<!-- claim table",
        ),
    ],
    ids=["unknown", "no-end", "end-of-another"],
)
def test_wrong_marker_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables.updated("page.md", text)


class TestSummaryTables:
    def test_cells_mark_the_best_rule_and_rates_at_an_edge(self) -> None:
        def row(loss: float, rate: str = "", **others: str) -> dict[str, str]:
            return {"final_loss": str(loss), "rate": rate, **others}

        results = {
            ("p", "Adam"): row(0.2, "0.01", edge=""),
            ("p", "SGD"): row(0.12345, "30", edge="upper"),
            ("p", "NAG"): row(0.5, "1"),  # from before there was a column "edge": the end of the fixed grid
            ("p", "good"): row(0.1),
            ("p", "between"): row(0.15),
        }
        assert summary_tables.baselines_of(results, ["p"]) == ["Adam", "SGD", "NAG"]
        cells = summary_tables.baseline_cells(results, "p", ["Adam", "RMSprop", "SGD", "NAG"])
        assert cells == ["0.2 (0.01)", "", r"0.123 (30\*)", r"0.5 (1\*)"]  # RMSprop was not run
        assert summary_tables.rule_cell(results, "p", "good") == "**0.1**"
        assert summary_tables.rule_cell(results, "p", "between") == "0.15"

    def test_duplicate_results_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(summary_tables, "FOLDERS", ("first", "second"))
        for folder in summary_tables.FOLDERS:
            (tmp_path / folder).mkdir()
            rows = "phase,problem,optimizer,rate,final_loss\ncomparison,mnist,Adam,0.1,1\ntuning,mnist,Adam,0.1,1\n"
            (tmp_path / folder / "summary.csv").write_text(rows)
        with pytest.raises(ValueError, match=r"mnist.* stands in two of first, second"):
            summary_tables.read_results(tmp_path)

    @staticmethod
    def rows(**more: str) -> Results:
        """Rows of the default rule and Adam on all problems of ``larger``; the first has further columns."""
        rows: dict[tuple[str, str], Row] = {}
        for problem in summary_tables.LARGER:
            for optimizer, loss in (("default", "0.5"), ("Adam", "1")):
                own = {column: value.split()[len(rows) % 2] for column, value in more.items()} if len(rows) < 2 else {}
                rows[problem, optimizer] = {"final_loss": loss, "rate": "0.1", "edge": "", "speedup": "2"} | own
        return rows

    def test_columns_that_rows_do_not_have_are_left_out(self) -> None:
        head, _, first, *_ = summary_tables.speedup_table(self.rows(), "larger").splitlines()
        assert head == "| problem | default rule | Adam | speed-up |"
        assert first.endswith("| **0.5** | 1 (0.1) | 2.00 |")

    def test_columns_about_seconds_and_held_out_data_are_shown_where_rows_have_them(self) -> None:
        more = {
            "held_out_end": "0.71234 0.81234",
            "accuracy_end": "0.9123 0.9023",
            "speedup_in_seconds": "1.51 1",
        }
        head, _, first, second, *_ = summary_tables.speedup_table(self.rows(**more), "larger").splitlines()
        names = ["speed-up in seconds", "held-out loss at the end (Adam, tuned)", "accuracy at the end (Adam, tuned)"]
        assert head.endswith(f"| speed-up | {' | '.join(names)} |")
        assert first.endswith("| 2.00 | 1.51 | 0.712 (0.812) | 91.2% (90.2%) |")
        assert second.endswith("| 2.00 |  |  |  |")

    @pytest.mark.parametrize("folder", list(summary_tables.TITLES))
    def test_problems_stand_in_the_order_of_the_suite_and_so_of_its_figures(self, folder: str) -> None:
        suite = load_suite(SUITES.get(folder, folder))
        order = [problem.name for problem in suite.problems]
        shown = list(summary_tables.TITLES[folder])
        assert shown == [name for name in order if name in shown]
