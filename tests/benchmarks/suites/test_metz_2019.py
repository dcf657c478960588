"""The experiment of Metz et al. 2019 from tuning to figure, at a size of seconds."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.results import COMPARISON, TUNING, read_parts
from benchmarks.suites import metz_2019
from benchmarks.suites.metz_2019 import ImageProblem, Losses, best_rate
from learned_optim.meta_train.config.load import differences, load_config

needs_images = pytest.mark.skipif(
    not (Path(os.environ.get("LEARNED_OPTIM_DATA", "")) / "cifar10").is_dir(),
    reason="needs real data: set LEARNED_OPTIM_DATA to a folder that holds cifar10/",
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(metz_2019, "RESULTS", tmp_path)
    for name, value in {"STEPS": 8, "RECORD": 4, "SEEDS": 2, "TUNING_SEEDS": 2, "ROUNDS": 2}.items():
        monkeypatch.setattr(metz_2019, name, value)
    monkeypatch.setattr(metz_2019, "RATES", (0.01,))
    monkeypatch.setattr(metz_2019, "LADDER", (0.03,))
    return tmp_path


def test_runs_differ_only_in_the_images_of_the_meta_loss() -> None:
    first, second = load_config("metz-train"), load_config("metz-validation")
    assert differences(first, second) == ['estimator.outer_split: "train", not "validation"']


def test_final_loss_is_the_mean_of_the_last_tenth() -> None:
    records = np.arange(21.0)[:, None] * [1.0, 10.0]
    losses = Losses(records, -records)
    np.testing.assert_allclose(losses.final("training"), [19.5, 195.0])
    np.testing.assert_allclose(losses.final("test"), [-19.5, -195.0])


def test_best_rate_belongs_to_the_optimizer_and_the_measure() -> None:
    scores = {
        ("Adam", 0.1): {"training": 3.0, "test": 1.0},
        ("Adam", 0.01): {"training": 1.0, "test": 2.0},
        ("Adam", 0.001): {"training": 2.0, "test": 3.0},
        ("momentum", 1.0): {"training": 0.0, "test": 0.0},
    }
    assert best_rate(scores, "Adam", "training") == (0.01, False)
    assert best_rate(scores, "Adam", "test") == (0.1, True)


@needs_images
def test_recorded_losses_are_those_of_the_run(small: Path) -> None:
    problem = ImageProblem("test", 2, seed=3, steps=8)
    points = [problem.task.initial_parameters]

    def descent(parameters: object) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1)  # type: ignore[arg-type]
        (coordinates,) = optimizer.param_groups[0]["params"]
        optimizer.register_step_post_hook(lambda *_: points.append(coordinates.detach().view(2, -1) + 0))
        return optimizer

    losses = problem.run(descent)
    expected = torch.stack([problem.task.losses(points[step], problem.test_batch) for step in (0, 4, 8)])
    np.testing.assert_allclose(losses.test, expected.numpy(), rtol=1e-6)
    assert losses.training.shape == (3, 2)
    inner, outer = problem.inner.data[0], problem.test_batch[0][0]
    assert (len(inner), len(outer)) == (400, 1600)
    assert not {image.tobytes() for image in inner.numpy()} & {image.tobytes() for image in outer.numpy()}


@pytest.mark.slow
@needs_images
def test_evaluation_writes_table_and_figure_and_tunes_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {"default": "default"}
    metz_2019.evaluate(rules)
    metz_2019.plot()
    before = metz_2019.table()
    rows = [line for line in before.splitlines() if line.startswith(("| Adam", "| RMSprop", "| momentum", "| default"))]
    assert len(rows) == 2 * 3 + 1
    assert (small / "curves.png").stat().st_size > 10_000
    assert {(row["optimizer"], row["rate"]) for row in metz_2019.summary(TUNING)} == {
        (name, rate) for name in metz_2019.METZ_BASELINES for rate in ("0.01", "0.03")
    }  # a best rate at the upper edge draws the next one; the edge is marked
    assert "0.03\\*" in before

    monkeypatch.setattr(ImageProblem, "run", None)
    metz_2019.tune()  # nothing is left to run
    metz_2019.step_times(rules)
    metz_2019.plot()
    assert all(float(row["milliseconds_per_step"]) > 0 for row in metz_2019.summary(COMPARISON))
    assert metz_2019.table() == before
    assert list(read_parts(small / "provenance.json")) == ["tuning", "summary and curves", "step time"]
