"""The code in the README runs as it stands."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import readme_tables
from helpers.paths import ROOT
from learned_optim import cli

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_readme_code_runs() -> None:
    promise, training, _ = blocks("python")
    exec(compile(promise, "README.md", "exec"), {"model": torch.nn.Linear(2, 1)})
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(training, "README.md", "exec"), names)
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor)
    assert float(loss.detach()) < 0.9  # targets are N(0, 1): learning nothing leaves 1


def test_readme_task_meta_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_tasks.py").write_text(blocks("python")[2])
    (tmp_path / "my_rule.toml").write_text(blocks("toml")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as for an installed command
    short = ["--set", "steps=4", "--set", "validation.horizon=5"]
    assert cli.main(["meta-train", "my_rule.toml", *short]) == 0
    assert (tmp_path / "runs" / "my_rule" / "best.safetensors").is_file()
    assert "best validation" in capsys.readouterr().out


def test_links_to_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


class TestTables:
    def test_tables_show_the_committed_results(self) -> None:
        results = readme_tables.read_results()
        for document in readme_tables.TABLES:
            text = (readme_tables.ROOT / document).read_text(encoding="utf-8")
            assert readme_tables.updated(document, text, results) == text, "run python -m benchmarks.readme_tables"

    def test_check_reports_stale_documents_and_changes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "README.md"
        stale = re.sub(r"\*\*0\.\d+\*\*", "**0.001**", README, count=1)
        for document in readme_tables.TABLES:
            (tmp_path / document).parent.mkdir(exist_ok=True)
            shutil.copy(readme_tables.ROOT / document, tmp_path / document)
        monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
        monkeypatch.setattr(sys, "argv", ["readme_tables.py", "--check"])
        assert readme_tables.main() == 0
        path.write_text(stale)
        assert readme_tables.main() == 1
        assert path.read_text() == stale
        assert "results: README.md; run python -m benchmarks.readme_tables" in capsys.readouterr().err
        monkeypatch.setattr(sys, "argv", ["readme_tables.py"])
        assert readme_tables.main() == 0
        assert path.read_text() == README

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
        assert readme_tables.baselines_of(results, ["p"]) == ["Adam", "SGD", "NAG"]
        cells = readme_tables.baseline_cells(results, "p", ["Adam", "RMSprop", "SGD", "NAG"])
        assert cells == ["0.2 (0.01)", "", r"0.123 (30\*)", r"0.5 (1\*)"]  # RMSprop was not run
        assert readme_tables.rule_cell(results, "p", "good") == "**0.1**"
        assert readme_tables.rule_cell(results, "p", "between") == "0.15"

    def test_duplicate_results_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(readme_tables, "FOLDERS", ("first", "second"))
        for folder in readme_tables.FOLDERS:
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "summary.csv").write_text("problem,optimizer,rate,final_loss\nmnist,Adam,0.1,1\n")
        with pytest.raises(ValueError, match=r"mnist.* stands in two of first, second"):
            readme_tables.read_results(tmp_path)

    def test_missing_marker_is_named(self) -> None:
        with pytest.raises(ValueError, match="must hold '<!-- paper table"):
            readme_tables.updated(
                "README.md", README.replace("<!-- paper table", "<!-- table"), readme_tables.read_results()
            )
