"""Trainings of few-shot learning put their rows beside those of others."""

from pathlib import Path

import pytest

from benchmarks.few_shot import figures, run
from benchmarks.few_shot.trainings import sinusoid_config
from benchmarks.results import read, read_parts
from learned_optim.meta_train.few_shot.model import FewShotModel

pytestmark = pytest.mark.slow


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "EPISODES", 4)
    monkeypatch.setattr(run, "RATES", (0.01,))
    monkeypatch.setattr(run, "trained", lambda config, folder, as_is: FewShotModel.of(config))
    return tmp_path


def test_rows_and_provenance_of_every_training_stay(small: Path) -> None:
    for names in (["scratch", "pre-training"], ["scratch"]):
        run.sinusoid(names, [5, 10], small / "runs", False)
    keys = [(row["algorithm"], row["shots"]) for row in read(small / "sinusoid.csv")]
    expected = [(name, shots) for name in ("scratch", "pre-training") for shots in ("5", "10")]
    assert keys == [key for key in expected for _ in range(run.STEPS + 1)]
    parts = read_parts(small / "sinusoid.json")
    assert set(parts) == {*(", ".join(key) for key in expected), "waves of pre-training"}
    assert parts["scratch, 5"]["config"]["task"]["options"]["shots"] == 5


def test_waves_that_are_not_drawn_are_not_kept(small: Path) -> None:
    run.sinusoid(["scratch", "pre-training", "maml"], [5, 10], small / "runs", False)
    run.sinusoid(["pre-training"], [10], small / "runs", False)
    rows = read(small / "waves.csv")
    assert list(dict.fromkeys(row["algorithm"] for row in rows)) == ["pre-training", "maml"]
    own = [row for row in rows if row["algorithm"] == "maml"]
    assert len(own) == 10 + 200
    assert [len(figures.points(own, kind)[0]) for kind in ("support", "truth", "step 0", "step 10")] == [
        10,
        200,
        200,
        200,
    ]
    assert len(list(small.glob("*.csv"))) == 2


def test_wave_is_the_same_whenever_it_is_drawn() -> None:
    model = FewShotModel.of(sinusoid_config("maml", 10))
    assert run.wave(model, "maml") == run.wave(model, "maml")
