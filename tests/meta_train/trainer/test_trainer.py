"""The meta-training loop follows its settings and skips updates that are not finite."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.small_runs import configuration, plain, run, weights
from learned_optim.meta_train.estimators import Part, TruncatedBPTT
from learned_optim.meta_train.trainer import progress as progress_module
from learned_optim.meta_train.trainer.progress import run_with_progress
from learned_optim.meta_train.trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


class TestStep:
    @pytest.mark.parametrize("replay_coordinates", [None, 1], ids=["all", "sampled"])
    def test_window_with_an_infinite_loss_is_skipped(
        self, replay_coordinates: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        infinite: list[bool] = []

        def recording(*arguments: Any) -> Part:
            part = train_share(*arguments)
            assert bool(part.sums.isfinite().all())
            infinite.append(not bool(part.losses.isfinite().all()))
            return part

        config = plain(
            steps=20,
            tasks=[{"family": "helpers.user_tasks:OverflowingOffsetFamily"}],
            estimator={"replay_coordinates": replay_coordinates},
            validation={"every": 1000},
        )
        trainer = Trainer(config)
        train_share = TruncatedBPTT.train_share
        monkeypatch.setattr(TruncatedBPTT, "train_share", recording)
        skipped = [not math.isfinite(progress.grad_norm) for progress in trainer.run()]
        assert skipped == infinite
        assert 3 <= sum(skipped) <= 17  # half the windows of two batches hold an infinite one

    @pytest.mark.parametrize("place", ["meta-loss", "meta-gradient", None])
    def test_is_finite_checks_meta_loss_and_meta_gradient(
        self, place: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*arguments: Any) -> Part:
            part = train_share(*arguments)
            if place == "meta-gradient":
                part.sums[1] = math.nan
            return part._replace(meta_loss=part.meta_loss * math.nan) if place == "meta-loss" else part

        train_share = TruncatedBPTT.train_share
        monkeypatch.setattr(TruncatedBPTT, "train_share", broken)
        outcome = Trainer(configuration()).pool.meta_gradient(0, (9, 9))
        assert outcome.finite == (place is None)

    def test_logarithm_of_a_negative_loss_is_refused(self) -> None:
        tasks = [{"family": "helpers.user_tasks:PlaneFamily", "offset": -100.0}]
        with pytest.raises(ValueError, match=r"meta_loss = \"log\" .* must be positive; Plane starts at -\d"):
            run(Trainer(plain(tasks=tasks, estimator={"meta_loss": "log"}, validation={"baselines": False})))

    def test_score_of_a_negative_loss_is_refused(self) -> None:
        tasks = [{"family": "helpers.user_tasks:PlaneFamily", "offset": -100.0}]
        with pytest.raises(ValueError, match=r"a validation score is relative .* must be positive; Plane starts at"):
            run(Trainer(plain(tasks=tasks)))

    def test_non_finite_update_is_skipped_and_counted(self) -> None:
        config = plain(
            steps=40,
            tasks=[{"family": "helpers.user_tasks:OverflowingFamily"}],
            unroll={"horizon": [1000, 1000]},  # given up once the parameters are lost, not at its end
            validation={"every": 1000},
        )
        trainer = Trainer(config)
        before, skipped = weights(trainer.module), 0
        for progress in trainer.run():
            after = weights(trainer.module)
            skipped += not math.isfinite(progress.grad_norm)
            assert progress.skipped == trainer.skipped == skipped
            assert torch.equal(before, after) == (not math.isfinite(progress.grad_norm))
            before = after
        assert 5 <= skipped <= 35  # half the windows of two batches hold an infinite one
        assert bool(before.isfinite().all())

    @pytest.mark.parametrize("schedule", ["constant", "cosine"])
    def test_rate_follows_the_schedule(self, schedule: str) -> None:
        trainer = Trainer(plain(steps=4, meta_optimizer={"lr": 0.25, "schedule": schedule}))
        rates = [trainer.meta_optimizer.optimizer.param_groups[0]["lr"] for _ in trainer.run()]
        factors = [1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4] if schedule == "cosine" else [1.0] * 4
        assert rates == pytest.approx([0.25 * factor for factor in factors])

    def test_first_update_is_an_adam_step(self) -> None:
        trainer = Trainer(plain(meta_optimizer={"lr": 1e-3}))
        before = weights(trainer.module)
        next(trainer.run())
        grad = torch.cat(
            [
                (parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)).flatten()
                for parameter in trainer.module.parameters()
            ]
        )
        moved = weights(trainer.module) - before
        pushed = grad.abs() > 1e-5  # where Adam's epsilon, 1e-8, does not count
        assert int(pushed.sum()) >= 5
        torch.testing.assert_close(moved[pushed], -1e-3 * grad[pushed].sign(), rtol=0.01, atol=0)

    @pytest.mark.parametrize("bound", [1e-3, 1e6])
    def test_gradient_is_clipped_to_its_bound_and_reported_unclipped(self, bound: float) -> None:
        trainer = Trainer(plain(steps=3, meta_optimizer={"clip_norm": bound}))
        for progress in trainer.run():
            assert progress.grad_norm > 1e-3
            norm = math.sqrt(
                sum(float(p.grad.square().sum()) for p in trainer.module.parameters() if p.grad is not None)
            )
            assert norm == pytest.approx(min(bound, progress.grad_norm), rel=1e-5)

    @pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
    def test_average_is_exponential_with_a_short_memory_at_the_start(self, decay: float) -> None:
        trainer = Trainer(plain(steps=8, meta_optimizer={"average": decay}))
        expected = torch.zeros_like(weights(trainer.module))
        for progress in trainer.run():
            done = progress.meta_step - 1
            keep = min(decay, done / (done + 10))
            expected = keep * expected + (1 - keep) * weights(trainer.module)
            torch.testing.assert_close(weights(trainer.averaged), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(weights(trainer.averaged), weights(trainer.module)) == (decay == 0)

    def test_meta_training_lowers_the_validation_score(self) -> None:
        """From Adam at 0.003, which goes 0.06 far in 20 steps, towards optima at a distance of 2."""
        config = plain(
            steps=60,
            unroll={"truncation": 10, "horizon": [20, 20], "instances": 8},
            estimator={"meta_loss": "log"},
            meta_optimizer={"lr": 0.02, "clip_norm": 0.1, "schedule": "cosine"},
            validation={"every": 20, "horizon": 20, "instances": 16, "tasks": 2},
        )
        trainer = Trainer(config)
        untrained = trainer.validate(trainer.averaged)
        run(trainer)
        assert trainer.best_validation < 0.5 * untrained
        assert trainer.validate(trainer.best) == trainer.best_validation

    def test_best_weights_are_those_with_the_lowest_score(self) -> None:
        trainer = Trainer(plain(steps=6, meta_optimizer={"lr": 0.5}, validation={"every": 1}))
        scores, kept = [], []
        for progress in trainer.run():
            assert progress.validation is not None
            scores.append(progress.validation)
            kept.append(weights(trainer.averaged))
            assert progress.best_validation == min(scores)
            assert torch.equal(weights(trainer.best), kept[scores.index(min(scores))])
        assert len(set(scores)) > 1


def test_interruption_during_progress_saves_or_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*values: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(progress_module, "print", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        run_with_progress(Trainer(configuration(), tmp_path))
    assert Trainer.resume(tmp_path).meta_step == 4  # the first validation

    def no_space() -> None:
        raise OSError("no space left on device")

    trainer = Trainer.resume(tmp_path)
    monkeypatch.setattr(trainer, "save_checkpoint", no_space)
    with pytest.raises((OSError, KeyboardInterrupt)) as caught:
        run_with_progress(trainer)
    assert str(caught.value) == "no space left on device"


def test_progress_is_a_line_for_each_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_with_progress(Trainer(configuration(validation={"baselines": False}), tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["meta-step 4", "meta-step 8", "meta-step 12"]
    assert all(re.search(r": validation \S+ \(best", line) for line in lines)
    assert "best so far" in lines[0]
