"""The curriculum: when a stage ends, by which evaluations, and when the run ends."""

from pathlib import Path

import pytest

from helpers.small_runs import metrics, plain, run
from learned_optim.meta_train.config.settings import CurriculumConfig
from learned_optim.meta_train.trainer.curriculum import Curriculum
from learned_optim.meta_train.trainer.trainer import Trainer
from learned_optim.meta_train.trainer.validation import ValidationSuite

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = CurriculumConfig(horizons=(2, 4, 8), every=5, evaluations=3)


def after(scores: list[float]) -> Curriculum:
    """The state after a yardstick and evaluations every five meta-steps."""
    curriculum = Curriculum(SETTINGS)
    for index, score in enumerate(scores):
        curriculum.record(score, 5 * index)
    return curriculum


@pytest.mark.parametrize(
    ("scores", "stage", "finished"),
    [
        ([1.0, 0.9, 0.8], 0, False),
        ([1.0, 0.9, 0.95], 0, False),  # no better, but the second evaluation only
        ([1.0, 0.9, 0.95, 0.93], 1, False),
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], 0, False),  # still improving
        ([1.0, 0.9, 0.8, 0.7, 0.7], 1, False),
        ([1.0, 1.1, 1.2], 0, False),
        ([1.0, 1.1, 1.2, 1.0], 0, True),  # never improved on its beginning
        ([1.0, 1.1, 1.2, 0.9], 0, False),
    ],
)
def test_stage_ends_when_its_third_or_later_evaluation_is_no_better(
    scores: list[float], stage: int, finished: bool
) -> None:
    curriculum = after(scores)
    assert (curriculum.stage, curriculum.finished) == (stage, finished)


def test_each_stage_has_its_own_baseline_and_the_last_ends_the_run() -> None:
    curriculum = after([1.0, 0.9, 0.8, 0.8])
    assert (curriculum.horizon, curriculum.next_horizon, curriculum.began) == (4, 8, 15)
    assert (curriculum.best, curriculum.evaluations, curriculum.improved) == (None, 0, False)
    for meta_step, score in [(15, 5.0), (20, 4.0), (25, 3.0), (30, 3.5)]:
        curriculum.record(score, meta_step)
    assert (curriculum.horizon, curriculum.next_horizon) == (8, 8)
    for meta_step, score in [(30, 2.0), (35, 1.0), (40, 1.0), (45, 1.0)]:
        assert not curriculum.finished
        curriculum.record(score, meta_step)
    assert (curriculum.stage, curriculum.finished) == (2, True)


def test_run_evaluates_at_the_next_horizon_and_trains_at_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int | None]] = []
    scores = iter([1.0, 0.9, 0.8, 0.8, 5.0, 5.0, 5.0, 5.0])  # the second stage never improves

    def scripted(self: ValidationSuite, rule: object, split: str = "validation", horizon: int | None = None) -> float:
        asked.append((trainer.meta_step, horizon))
        return next(scores) if horizon is not None else 1.0

    monkeypatch.setattr(ValidationSuite, "score", scripted)
    config = plain(
        steps=100,
        unroll={"horizon": [100, 100]},
        validation={"every": 1000, "baselines": False},
        curriculum={"horizons": [2, 6, 8], "every": 2, "evaluations": 3},
    )
    trainer = Trainer(config, tmp_path)
    progress = run(trainer)
    assert [entry.meta_step for entry in progress] == list(range(1, 13))  # 3 evaluations each, every 2 meta-steps
    assert asked == [(0, 6), (2, 6), (4, 6), (6, 6), (6, 8), (8, 8), (10, 8), (12, 8), (12, None)]
    rows = metrics(tmp_path)
    assert [row["curriculum/horizon"] for row in rows] == ["2"] * 6 + ["6"] * 6
    assert [row["curriculum/score"] for row in rows if row["curriculum/score"]] == ["0.9", "0.8", "0.8"] + ["5.0"] * 3
    assert progress[-1].validation == 1.0  # a run that ends early is validated at its end
    member = trainer.pool.members[0]
    assert member is not None
    assert member.horizon == 6
    assert Trainer.resume(tmp_path).finished
