"""The code in the README runs as it stands; the tables of the documents show the committed results."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import readme_tables
from helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "docs" / "results.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_code_for_users_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn: the extra 'demo'")
    promise, training = blocks("python")
    exec(compile(promise, "README.md", "exec"), {"model": torch.nn.Linear(2, 1)})
    exec(compile(training, "README.md", "exec"), {})
    (accuracy,) = re.findall(r"^test accuracy (\d+\.\d)%$", capsys.readouterr().out, flags=re.MULTILINE)
    (promised,) = re.findall(r"gets about (\d+)% of the test images right", README)
    assert float(accuracy) == pytest.approx(float(promised), abs=1.5)  # 450 images: one of them is 0.2%


def test_configuration_of_the_readme_is_that_of_the_tutorial() -> None:
    tutorial = (ROOT / "docs" / "meta-training.md").read_text()
    (configuration,) = blocks("toml")
    assert f"```toml\n{configuration}```" in tutorial


def test_links_to_files_are_not_broken() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


class TestTables:
    def test_show_the_committed_results(self) -> None:
        results = readme_tables.read_results()
        for document in readme_tables.TABLES:
            text = (readme_tables.ROOT / document).read_text(encoding="utf-8")
            assert readme_tables.updated(document, text, results) == text, "run python -m benchmarks.readme_tables"

    def test_check_says_what_is_out_of_date_and_changes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "docs" / "results.md"
        fresh = RESULTS.read_text()
        stale = re.sub(r"\*\*0\.\d+\*\*", "**0.001**", fresh, count=1)
        for document in readme_tables.TABLES:
            (tmp_path / document).parent.mkdir(exist_ok=True)
            shutil.copy(readme_tables.ROOT / document, tmp_path / document)
        monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
        monkeypatch.setattr(sys, "argv", ["readme_tables.py", "--check"])
        assert readme_tables.main() == 0
        path.write_text(stale)
        assert readme_tables.main() == 1
        assert path.read_text() == stale
        assert "results: docs/results.md; run python -m benchmarks.readme_tables" in capsys.readouterr().err
        monkeypatch.setattr(sys, "argv", ["readme_tables.py"])
        assert readme_tables.main() == 0
        assert path.read_text() == fresh

    def test_cells_say_what_is_won_what_is_lost_and_what_is_doubtful(self) -> None:
        def row(loss: float, rate: str = "", **others: str) -> dict[str, str]:
            return {"final_loss": str(loss), "rate": rate, **others}

        results = {
            ("p", "Adam"): row(0.2, "0.01", edge=""),
            ("p", "SGD"): row(0.12345, "30", edge="upper"),
            ("p", "NAG"): row(0.5, "1"),  # from before there was a column "edge": the end of the fixed grid
            ("p", "good"): row(0.1),
            ("p", "between"): row(0.15),
        }
        assert readme_tables.baselines_of(results, ["p"]) == ["Adam", "SGD", "NAG"]
        cells = readme_tables.baseline_cells(results, "p", ["Adam", "RMSprop", "SGD", "NAG"])
        assert cells == ["0.2 (0.01)", "", r"0.123 (30\*)", r"0.5 (1\*)"]  # RMSprop was not run
        assert readme_tables.rule_cell(results, "p", "good") == "**0.1**"
        assert readme_tables.rule_cell(results, "p", "between") == "0.15"

    def test_results_that_stand_in_two_places_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(readme_tables, "FOLDERS", ("first", "second"))
        for folder in readme_tables.FOLDERS:
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "summary.csv").write_text("problem,optimizer,rate,final_loss\nmnist,Adam,0.1,1\n")
        with pytest.raises(ValueError, match=r"mnist.* stands in two of first, second"):
            readme_tables.read_results(tmp_path)

    def test_missing_marker_is_named(self) -> None:
        text = (ROOT / "docs" / "reproduction.md").read_text()
        with pytest.raises(ValueError, match="must hold '<!-- paper table"):
            readme_tables.updated(
                "docs/reproduction.md", text.replace("<!-- paper table", "<!-- table"), readme_tables.read_results()
            )
