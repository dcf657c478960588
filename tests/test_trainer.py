"""The meta-training loop does what its settings say, and learns from nothing that is not finite."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learned_optim.meta_train import progress as progress_module
from learned_optim.meta_train import trainer as trainer_module
from learned_optim.meta_train.estimators import Estimate, Trajectory
from learned_optim.meta_train.progress import run_with_progress
from learned_optim.meta_train.seeds import torch_generator
from learned_optim.meta_train.trainer import DIVERGED, SOLVED, InnerTraining, Trainer, is_finite
from learned_optim.meta_train.unroll import InnerState
from learned_optim.rules import LSTML2L, RuleState
from small_runs import L2L, QUADRATIC, STEPS, configuration, drifting, plain, run, weights

pytestmark = pytest.mark.usefixtures("one_thread")


class TestStep:
    @pytest.mark.parametrize("replay_coordinates", [None, 1], ids=["all", "sampled"])
    def test_window_with_an_infinite_loss_is_skipped_although_its_gradient_is_finite(
        self, replay_coordinates: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        infinite: list[bool] = []

        def recording(*arguments: Any) -> Estimate:
            window = estimate(*arguments)
            assert all(bool(grad.isfinite().all()) for grad in window.grads)
            infinite.append(not bool(window.losses.isfinite().all()))
            return window

        config = plain(
            steps=20,
            tasks=[{"family": "user_tasks:OverflowingOffsetFamily"}],
            estimator={"replay_coordinates": replay_coordinates},
            validation={"every": 1000},
        )
        trainer = Trainer(config)
        estimate = trainer.estimator.window
        monkeypatch.setattr(trainer.estimator, "window", recording)
        skipped = [not math.isfinite(progress.grad_norm) for progress in trainer.run()]
        assert skipped == infinite
        assert 3 <= sum(skipped) <= 17  # half the windows of two batches hold an infinite one

    @pytest.mark.parametrize("place", ["losses", "parameters", "grad", "meta-gradient", None])
    def test_whatever_is_not_finite_in_a_window_counts(self, place: str | None) -> None:
        def values(name: str) -> Tensor:
            return torch.tensor([[1.0, math.nan if place == name else 2.0]])

        state = InnerState(values("parameters"), values("grad"), {}, torch.zeros(()), torch.ones(1))
        grads = (torch.zeros(3), values("meta-gradient"))
        window = Estimate(grads, torch.zeros(()), values("losses"), Trajectory(state, {}), {})
        assert is_finite(window) == (place is None)

    def test_logarithm_of_a_negative_loss_is_refused(self) -> None:
        tasks = [{"family": "user_tasks:PlaneFamily", "offset": -100.0}]
        with pytest.raises(ValueError, match=r"meta_loss = \"log\" .* must be positive; Plane starts at -\d"):
            run(Trainer(plain(tasks=tasks, estimator={"meta_loss": "log"})))

    def test_score_of_a_negative_loss_is_refused(self) -> None:
        tasks = [{"family": "user_tasks:PlaneFamily", "offset": -100.0}]
        with pytest.raises(ValueError, match=r"a validation score is relative .* must be positive; Plane starts at"):
            run(Trainer(plain(tasks=tasks)))

    def test_update_that_is_not_finite_is_skipped_and_counted(self) -> None:
        config = plain(
            steps=40,
            tasks=[{"family": "user_tasks:OverflowingFamily"}],
            unroll={"horizon": [1000, 1000]},  # given up once the parameters are lost, not at its end
            validation={"every": 1000},
        )
        trainer = Trainer(config)
        before, skipped = weights(trainer.rule), 0
        for progress in trainer.run():
            after = weights(trainer.rule)
            skipped += not math.isfinite(progress.grad_norm)
            assert progress.skipped == trainer.skipped == skipped
            assert torch.equal(before, after) == (not math.isfinite(progress.grad_norm))
            before = after
        assert 5 <= skipped <= 35  # half the windows of two batches hold an infinite one
        assert bool(before.isfinite().all())

    @pytest.mark.parametrize("schedule", ["constant", "cosine"])
    def test_rate_follows_the_schedule(self, schedule: str) -> None:
        trainer = Trainer(plain(steps=4, meta_optimizer={"lr": 0.25, "schedule": schedule}))
        rates = [trainer.meta_optimizer.param_groups[0]["lr"] for _ in trainer.run()]
        factors = [1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4] if schedule == "cosine" else [1.0] * 4
        assert rates == pytest.approx([0.25 * factor for factor in factors])

    def test_first_update_is_a_step_of_adam_against_the_gradient(self) -> None:
        trainer = Trainer(plain(meta_optimizer={"lr": 1e-3}))
        before = weights(trainer.rule)
        next(trainer.run())
        grad = torch.cat(
            [
                (parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)).flatten()
                for parameter in trainer.rule.parameters()
            ]
        )
        moved = weights(trainer.rule) - before
        pushed = grad.abs() > 1e-5  # where Adam's epsilon, 1e-8, does not count
        assert int(pushed.sum()) >= 5
        torch.testing.assert_close(moved[pushed], -1e-3 * grad[pushed].sign(), rtol=0.01, atol=0)

    @pytest.mark.parametrize("bound", [1e-3, 1e6])
    def test_gradient_is_clipped_to_its_bound_and_reported_unclipped(self, bound: float) -> None:
        trainer = Trainer(plain(steps=3, meta_optimizer={"clip_norm": bound}))
        for progress in trainer.run():
            assert progress.grad_norm > 1e-3
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.rule.parameters() if p.grad is not None))
            assert norm == pytest.approx(min(bound, progress.grad_norm), rel=1e-5)

    @pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
    def test_average_is_exponential_with_a_short_memory_at_the_start(self, decay: float) -> None:
        trainer = Trainer(plain(steps=8, meta_optimizer={"average": decay}))
        expected = torch.zeros_like(weights(trainer.rule))
        for progress in trainer.run():
            done = progress.meta_step - 1
            keep = min(decay, done / (done + 10))
            expected = keep * expected + (1 - keep) * weights(trainer.rule)
            torch.testing.assert_close(weights(trainer.averaged), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(weights(trainer.averaged), weights(trainer.rule)) == (decay == 0)

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


class TestPool:
    def test_first_members_are_under_way_and_later_ones_start_at_the_beginning(self) -> None:
        trainer = Trainer(plain(steps=480, unroll={"pool": 40, "horizon": [20, 20]}, validation={"every": 1000}))
        after_first_window: dict[int, float] = {}
        for _ in trainer.run():
            for member in trainer.pool:
                if member is not None:
                    assert member.horizon == 20
                    after_first_window.setdefault(member.draw, float(member.state.step))
        first = [after_first_window[draw] for draw in range(1, 41)]
        later = [after_first_window[draw] for draw in range(41, max(after_first_window) + 1)]
        assert set(first) == {2.0 * window for window in range(1, 11)}  # of 40 draws, one of 10 is missing in 14%
        assert len(later) >= 40
        assert set(later) == {2.0}

    def test_late_stages_are_met_as_often_in_the_first_round_as_later(self) -> None:
        """In a pool under way a window's stage, over its own horizon, is uniform, and long trainings come often."""
        trainer = Trainer(plain(unroll={"pool": 2, "truncation": 1, "horizon": [2, 200]}))
        draws = 300
        members = [trainer._draw(first=True) for _ in range(draws)]
        horizons = torch.tensor([float(member.horizon) for member in members])
        fractions = torch.tensor([(float(member.state.step) + 0.5) / member.horizon for member in members])
        # Uniform on 2 ... 200 and 0 ... 1: standard deviations 57.4 and 0.289.
        assert float(horizons.mean()) == pytest.approx(101, abs=5 * 57.4 / draws**0.5)
        assert float(fractions.mean()) == pytest.approx(0.5, abs=5 * 0.289 / draws**0.5)
        later = torch.tensor([float(trainer._draw(first=False).horizon) for _ in range(draws)])
        assert float(later.log().mean()) == pytest.approx(math.log(20), abs=0.4)  # log-uniform, as configured

    def test_member_that_runs_ahead_into_divergence_starts_at_its_beginning(self) -> None:
        config = plain(rule=L2L, unroll={"pool": 3, "horizon": [20, 20]})
        trainer = Trainer(config, rule=drifting(1e4))
        members = [trainer._draw(first=True) for _ in range(20)]
        assert {float(member.state.step) for member in members} == {0.0}
        assert not any(member.finished for member in members)

    @pytest.mark.parametrize(("instances", "later_draws"), [(1, 11), (3, 11)])
    def test_member_that_is_far_off_but_finite_is_given_up(self, instances: int, later_draws: int) -> None:
        unroll = {"horizon": [1000, 1000], "instances": instances}
        trainer = Trainer(plain(rule=L2L, unroll=unroll, validation={"every": 1000}), rule=drifting(1e4))
        run(trainer)
        assert trainer.draws == 1 + later_draws  # a new one after every window

    @pytest.mark.parametrize(
        ("losses", "initial", "diverged"),
        [
            ([[11.0, 1.0], [11.0, 1.0]], [1.0, 1.0], True),
            ([[11.0, 1.0], [9.0, 11.0]], [1.0, 1.0], False),  # not for the whole window
            ([[9.0, 9.0], [9.0, 9.0]], [1.0, 1.0], False),
            ([[-1.0], [-1.0]], [-1.0], False),  # no multiple of a negative loss is above it
        ],
    )
    def test_diverged_is_a_whole_window_above_ten_initial_losses(
        self, losses: list[list[float]], initial: list[float], diverged: bool
    ) -> None:
        config = plain()
        member = Trainer(config)._draw(first=False)
        inner = member.state.inner._replace(initial_loss=torch.tensor(initial))
        member.advance(Trajectory(inner, {}), torch.tensor(losses))
        assert member.finished == member.diverged == diverged

    def test_divergence_is_not_forgotten_by_a_checkpoint(self, tmp_path: Path) -> None:
        trainer = Trainer(plain(), tmp_path)
        next(trainer.run())
        member = trainer.pool[0]
        assert isinstance(member, InnerTraining)
        member.diverged = True
        trainer.save_checkpoint()
        restored = Trainer.resume(tmp_path).pool[0]
        assert restored is not None
        assert restored.finished

    def test_single_member_is_not_cut_short(self) -> None:
        trainer = Trainer(plain(unroll={"horizon": [20, 20]}))
        next(trainer.run())
        assert trainer.pool[0] is not None
        assert trainer.pool[0].horizon == 20

    def test_members_take_turns(self) -> None:
        config = plain(steps=3, unroll={"pool": 3, "windows_per_step": 2, "horizon": [100, 100], "stagger": False})
        trainer = Trainer(config)
        stages = [[float(member.state.step) if member else 0.0 for member in trainer.pool] for _ in trainer.run()]
        assert stages == [[2, 2, 0], [4, 2, 2], [4, 4, 4]]

    @pytest.mark.parametrize(("horizon", "ends"), [(3, (4,)), (8, (4, 8)), (9, (4, 8, 12))])
    def test_inner_training_ends_with_the_window_that_reaches_its_horizon(
        self, horizon: int, ends: tuple[int, ...]
    ) -> None:
        unroll = {"truncation": 4, "horizon": [horizon, horizon]}
        trainer = Trainer(plain(steps=3 * len(ends), unroll=unroll, validation={"every": 1000}))
        stages = []
        for _ in trainer.run():
            assert trainer.pool[0] is not None
            stages.append((trainer.pool[0].draw, float(trainer.pool[0].state.step)))
        assert stages == [(draw, step) for draw in (1, 2, 3) for step in ends]

    def test_no_two_draws_share_their_random_numbers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn = []

        def recording(seed: int, purpose: str, *counters: int) -> torch.Generator:
            drawn.append((seed, purpose, *counters))
            return torch_generator(seed, purpose, *counters)

        monkeypatch.setattr(trainer_module, "torch_generator", recording)
        run(Trainer(configuration(validation={"every": 99})))
        assert sum(purpose == "window" for _, purpose, *_ in drawn) == 2 * STEPS
        assert len(set(drawn)) == len(drawn)

    def test_weights_decide_how_often_a_family_is_drawn(self) -> None:
        tasks = [
            {"family": "quadratic", "dimensions": [2, 2], "weight": 3.0},
            {"family": "quadratic", "dimensions": [3, 3], "weight": 1.0},
        ]
        trainer = Trainer(plain(tasks=tasks))
        sizes = [trainer._build_task(draw).coordinates for draw in range(400)]
        assert set(sizes) == {2, 3}
        assert sizes.count(2) / 400 == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / 400))

    def test_rescaling_is_as_frequent_and_as_wide_as_asked_for(self) -> None:
        unroll = {"rescale": 0.25, "rescale_range": [0.1, 10.0], "instances": 3}
        trainer = Trainer(plain(unroll=unroll, tasks=[{"family": "quadratic"}]))
        scales = [trainer._build_task(draw).scale for draw in range(400)]
        drawn = torch.stack([scale for scale in scales if scale is not None])
        assert len(drawn) / 400 == pytest.approx(0.25, abs=5 * math.sqrt(0.75 * 0.25 / 400))
        assert drawn.shape[1:] == (3, 1)
        assert 0.1 <= float(drawn.min()) < 0.13
        assert 7.5 < float(drawn.max()) <= 10.0
        # 300 logarithms, uniform over 2 decades: their mean scatters by 2 / sqrt(12 * 300).
        assert float(drawn.log10().mean()) == pytest.approx(0.0, abs=5 * 2 / math.sqrt(12 * drawn.numel()))


class TestValidation:
    def test_is_the_same_at_every_call(self) -> None:
        trainer = Trainer(configuration())
        torch.manual_seed(1)
        first = trainer.validate(trainer.averaged)
        torch.manual_seed(2)
        assert trainer.validate(trainer.averaged) == first
        assert trainer.validate(trainer.averaged, "test") != first

    def test_does_not_disturb_meta_training(self) -> None:
        often, never = Trainer(configuration(validation={"every": 1})), Trainer(configuration(validation={"every": 99}))
        run(often)
        run(never)
        assert torch.equal(weights(often.rule), weights(never.rule))

    @pytest.mark.parametrize("output_bias", [300.0, 1e20, math.nan], ids=["far-off", "overflow", "not-a-number"])
    def test_diverged_counts_as_ten_times_the_initial_loss(self, output_bias: float) -> None:
        trainer = Trainer(plain(validation={"tasks": 3, "instances": 4, "horizon": 30}))
        still = LSTML2L(2)
        torch.nn.init.zeros_(still.output_weight)
        assert trainer.validate(still) == pytest.approx(1.0, rel=1e-5)  # without noise, nothing moves the loss
        moving = LSTML2L(2)
        torch.nn.init.zeros_(moving.output_weight)
        torch.nn.init.constant_(moving.output_bias, output_bias)
        assert trainer.validate(moving) == pytest.approx(DIVERGED, rel=1e-5)

    def test_solved_counts_as_a_thousandth_of_the_initial_loss(self) -> None:
        class Descent(LSTML2L):
            def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
                return -0.5 * grad, state  # reaches the minimum of ||x - optimum||^2 in one step

        spheres = QUADRATIC | {"condition": [1.0, 1.0]}
        assert Trainer(plain(tasks=[spheres])).validate(Descent(2)) == pytest.approx(SOLVED)

    def test_score_is_the_geometric_mean_over_tasks_of_the_last_tenth(self) -> None:
        """A rule that moves every coordinate by the same amount: its losses can be written out."""
        config = plain(tasks=[QUADRATIC, QUADRATIC | {"dimensions": [7, 7]}], validation={"horizon": 20, "tasks": 2})
        trainer = Trainer(config)
        drift = LSTML2L(2)
        torch.nn.init.zeros_(drift.output_weight)
        torch.nn.init.constant_(drift.output_bias, 0.1)  # times the output scale 0.1: 0.01 a step
        logarithms = []
        for task, _ in trainer._validation_tasks("validation"):
            batch = task.batch(torch.Generator())
            finals = [task.losses(task.initial_parameters + 0.01 * step, batch) for step in (19, 20)]
            initial = task.losses(task.initial_parameters, batch)
            assert bool((torch.stack(finals).mean(0) < DIVERGED * initial).all())
            logarithms.append(math.log(float(torch.stack(finals).mean() / initial.mean())))
        assert len(logarithms) == 4
        expected = math.exp(sum(logarithms) / 4)
        assert trainer.validate(drift.requires_grad_(False)) == pytest.approx(expected, rel=1e-4)


def test_interruption_while_progress_is_shown_saves_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    run_with_progress(Trainer(configuration(), tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["meta-step 4", "meta-step 8", "meta-step 12"]
    assert all(re.search(r": validation \S+ \(best", line) for line in lines)
    assert "best so far" in lines[0]
