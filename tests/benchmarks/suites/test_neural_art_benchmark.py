"""The grid of pictures: every optimizer paints every pair, and Adam's best rate is what is shown."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.suites import neural_art as benchmark

RATES = (0.001, 0.1)


@pytest.fixture
def small(neural_art: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run on small pictures writes to."""
    for name, value in {"PICTURE_SIZE": 32, "STEPS": 3, "RESULTS": tmp_path}.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setitem(benchmark.OPTIMIZERS, benchmark.TUNED, ("adam", RATES))
    monkeypatch.setattr(benchmark, "PICTURES", benchmark.PICTURES[:2])
    return tmp_path


def test_every_picture_is_painted_by_every_optimizer(small: Path) -> None:
    benchmark.main()
    with (small / "losses.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = [
        (start, *pair, optimizer)
        for start in benchmark.STARTS
        for pair in benchmark.PICTURES
        for optimizer in benchmark.OPTIMIZERS
    ]
    assert [(row["start"], row["content"], row["style"], row["optimizer"]) for row in rows] == expected
    assert {row["rate"] for row in rows if row["optimizer"] == benchmark.TUNED} <= {"0.001", "0.1"}
    assert {row["rate"] for row in rows if "Adam" not in row["optimizer"]} == {""}
    assert {row["to_tuned"] for row in rows if row["optimizer"] == benchmark.TUNED} <= {"1", "2", "3"}
    assert json.loads((small / "losses.json").read_text(encoding="utf-8"))["size"] == 32
    with Image.open(small / "pictures.png") as picture:
        assert picture.width > 5 * picture.height // 2  # two rows of seven
    header, _, tuned, *_ = benchmark.table().splitlines()
    assert header.count("|") == tuned.count("|")
    assert tuned.startswith("| Adam, tuned | 1.00 | ")


def test_adam_is_shown_at_its_best_rate(small: Path) -> None:
    content, style = benchmark.PICTURES[0]
    losses = {rate: benchmark.painted("noise", content, style, "adam", rate).losses[-1] for rate in RATES}
    best = benchmark.best("noise", content, style, benchmark.TUNED)
    assert (best.rate, best.losses[-1]) == min(losses.items(), key=lambda item: item[1])


def test_steps_are_counted_to_the_first_that_is_low_enough() -> None:
    assert benchmark.steps_to([3.0, 2.0, 2.5, 1.0], 2.0) == 1
    assert benchmark.steps_to([3.0, 2.0], 1.0) is None
    rows = [{"to_tuned": each} for each in ("70", "", "90")]
    assert benchmark.span(rows, "to_tuned") == "70 to over 128"
    assert benchmark.span(rows[:1], "to_tuned") == "70"
