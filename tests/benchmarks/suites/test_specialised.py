"""The table of worked specialisations: rows are taken from runs, and replaced by those of a later run."""

import json
from pathlib import Path

import pytest

from benchmarks.results import read_parts
from benchmarks.suites.specialised import add, table
from learned_optim import save_rule
from learned_optim.rules import ScheduleFreeLSTM

HEADER = "optimizer,speedup,low,high,in_seconds,final_loss\n"


def finished_run(folder: Path, speedup: float) -> Path:
    (folder / "comparison").mkdir(parents=True, exist_ok=True)
    rows = f"Adam,0.5,0.4,0.6,0.7,2\nAdamW-cosine,0.8,0.7,0.9,0.9,1.5\nspecialised,{speedup},1.4,1.7,1.6,0.6\n"
    (folder / "comparison" / "gain.csv").write_text(HEADER + rows)
    (folder / "comparison" / "provenance.json").write_text(json.dumps({"date": str(speedup)}))
    provenance = {"seconds": 600.0, "config": {"steps": 20}}
    save_rule(ScheduleFreeLSTM(), folder / "specialised.safetensors", provenance)
    return folder


def test_later_run_replaces_the_rows_of_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    add("specialised-pictures", finished_run(tmp_path / "first", 1.2), path)
    add("specialised-mnist", finished_run(tmp_path / "other", 1.9), path)
    add("specialised-pictures", finished_run(tmp_path / "second", 1.5), path)
    _, _, pictures, mnist = table(path).splitlines()
    assert "| 10 | 1.50 (1.40 to 1.70) | 1.60 | 0.60 |  |  | 0.50 | 0.80 |" in pictures
    assert "1.90 (" in mnist
    compared = {name: part["date"] for name, part in read_parts(path.with_suffix(".json")).items()}
    assert compared == {"specialised-pictures": "1.5", "specialised-mnist": "1.9"}


def test_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="finish the run with learned-optim specialise --resume"):
        add("specialised-mnist", tmp_path, tmp_path / "rows.csv")
