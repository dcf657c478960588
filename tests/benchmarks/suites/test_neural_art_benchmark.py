"""The grid of pictures: every optimizer paints every pair, and Adam's best rate is what is shown."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.suites import neural_art as benchmark


@pytest.fixture
def small(neural_art: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run on small pictures writes to."""
    for name, value in {"PICTURE_SIZE": 32, "STEPS": 3, "ADAM_RATES": (0.001, 0.1), "RESULTS": tmp_path}.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "PICTURES", benchmark.PICTURES[:2])
    return tmp_path


def test_every_picture_is_painted_by_every_optimizer(small: Path) -> None:
    benchmark.main()
    with (small / "losses.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = [(*pair, optimizer) for pair in benchmark.PICTURES for optimizer in benchmark.OPTIMIZERS]
    assert [(row["content"], row["style"], row["optimizer"]) for row in rows] == expected
    assert {row["rate"] for row in rows if row["optimizer"] == "adam"} <= {"0.001", "0.1"}
    assert {row["rate"] for row in rows if row["optimizer"] != "adam"} == {""}
    assert json.loads((small / "losses.json").read_text(encoding="utf-8"))["size"] == 32
    with Image.open(small / "pictures.png") as picture:
        assert picture.width > 5 * picture.height // 2  # two rows of six


def test_adam_is_shown_at_its_best_rate(small: Path) -> None:
    content, style = benchmark.PICTURES[0]
    losses = {rate: benchmark.painted(content, style, "adam", rate).loss for rate in benchmark.ADAM_RATES}
    best = benchmark.best(content, style, "adam")
    assert (best.rate, best.loss) == min(losses.items(), key=lambda item: item[1])
