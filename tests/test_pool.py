"""The pool of inner trainings: stages, turns, ends, and what its members' course depends on."""

import math
from pathlib import Path

import pytest
import torch

from learned_optim.meta_train import pool as pool_module
from learned_optim.meta_train.estimators import Trajectory
from learned_optim.meta_train.pool import InnerTraining
from learned_optim.meta_train.seeds import torch_generator
from learned_optim.meta_train.trainer import Trainer
from small_runs import L2L, STEPS, configuration, drifting, plain, run

pytestmark = pytest.mark.usefixtures("one_thread")


def redraw(trainer: Trainer) -> list[InnerTraining]:
    """New members in all places: at first those of a pool that begins, then their successors."""
    pool = trainer.pool
    horizon = trainer.config.unroll.horizon
    members = [pool.draw(trainer.rule, index, horizon) for index in range(len(pool.members))]
    pool.members = list(members)
    return members


def test_first_members_are_under_way_and_later_ones_start_at_the_beginning() -> None:
    trainer = Trainer(plain(steps=480, unroll={"pool": 40, "horizon": [20, 20]}, validation={"every": 1000}))
    after_first_window: dict[int, float] = {}
    for _ in trainer.run():
        for member in trainer.pool.members:
            if member is not None:
                assert member.horizon == 20
                after_first_window.setdefault(member.draw, float(member.state.step))
    first = [after_first_window[draw] for draw in range(1, 41)]
    later = [stage for draw, stage in after_first_window.items() if draw > 40]
    assert set(first) == {2.0 * window for window in range(1, 11)}  # of 40 draws, one of 10 is missing in 14%
    assert len(later) >= 40
    assert set(later) == {2.0}


def test_late_stages_are_met_as_often_in_the_first_round_as_later() -> None:
    """In a pool under way a window's stage, over its own horizon, is uniform, and long trainings come often."""
    draws = 300
    trainer = Trainer(plain(unroll={"pool": draws, "truncation": 1, "horizon": [2, 200]}))
    members = redraw(trainer)
    horizons = torch.tensor([float(member.horizon) for member in members])
    fractions = torch.tensor([(float(member.state.step) + 0.5) / member.horizon for member in members])
    # Uniform on 2 ... 200 and 0 ... 1: standard deviations 57.4 and 0.289.
    assert float(horizons.mean()) == pytest.approx(101, abs=5 * 57.4 / draws**0.5)
    assert float(fractions.mean()) == pytest.approx(0.5, abs=5 * 0.289 / draws**0.5)
    later = torch.tensor([float(member.horizon) for member in redraw(trainer)])
    assert float(later.log().mean()) == pytest.approx(math.log(20), abs=0.4)  # log-uniform, as configured


def test_member_that_runs_ahead_into_divergence_starts_at_its_beginning() -> None:
    config = plain(rule=L2L, unroll={"pool": 20, "horizon": [20, 20]})
    members = redraw(Trainer(config, rule=drifting(1e4)))
    assert {float(member.state.step) for member in members} == {0.0}
    assert not any(member.finished for member in members)


@pytest.mark.parametrize(("instances", "later_draws"), [(1, 11), (3, 11)])
def test_member_that_is_far_off_but_finite_is_given_up(instances: int, later_draws: int) -> None:
    unroll = {"horizon": [1000, 1000], "instances": instances}
    trainer = Trainer(plain(rule=L2L, unroll=unroll, validation={"every": 1000}), rule=drifting(1e4))
    run(trainer)
    assert trainer.pool.members[0] is not None
    assert trainer.pool.members[0].draw == 1 + later_draws  # a new one after every window


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
    losses: list[list[float]], initial: list[float], diverged: bool
) -> None:
    config = plain()
    (member,) = redraw(Trainer(config))
    inner = member.state.inner._replace(initial_loss=torch.tensor(initial))
    member.advance(Trajectory(inner, {}), torch.tensor(losses))
    assert member.finished == member.diverged == diverged


def test_divergence_is_not_forgotten_by_a_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(plain(), tmp_path)
    next(trainer.run())
    member = trainer.pool.members[0]
    assert isinstance(member, InnerTraining)
    member.diverged = True
    trainer.save_checkpoint()
    restored = Trainer.resume(tmp_path).pool.members[0]
    assert restored is not None
    assert restored.finished


def test_single_member_is_not_cut_short() -> None:
    trainer = Trainer(plain(unroll={"horizon": [20, 20]}))
    next(trainer.run())
    assert trainer.pool.members[0] is not None
    assert trainer.pool.members[0].horizon == 20


def test_members_take_turns() -> None:
    config = plain(steps=3, unroll={"pool": 3, "windows_per_step": 2, "horizon": [100, 100], "stagger": False})
    trainer = Trainer(config)
    stages = [[float(member.state.step) if member else 0.0 for member in trainer.pool.members] for _ in trainer.run()]
    assert stages == [[2, 2, 0], [4, 2, 2], [4, 4, 4]]


@pytest.mark.parametrize(("horizon", "ends"), [(3, (4,)), (8, (4, 8)), (9, (4, 8, 12))])
def test_inner_training_ends_with_the_window_that_reaches_its_horizon(horizon: int, ends: tuple[int, ...]) -> None:
    unroll = {"truncation": 4, "horizon": [horizon, horizon]}
    trainer = Trainer(plain(steps=3 * len(ends), unroll=unroll, validation={"every": 1000}))
    stages = []
    for _ in trainer.run():
        assert trainer.pool.members[0] is not None
        stages.append((trainer.pool.members[0].draw, float(trainer.pool.members[0].state.step)))
    assert stages == [(draw, step) for draw in (1, 2, 3) for step in ends]


def test_no_two_draws_share_their_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def recording(seed: int, purpose: str, *counters: int) -> torch.Generator:
        drawn.append((seed, purpose, *counters))
        return torch_generator(seed, purpose, *counters)

    monkeypatch.setattr(pool_module, "torch_generator", recording)
    run(Trainer(configuration(validation={"every": 99})))
    assert sum(purpose == "window" for _, purpose, *_ in drawn) == 2 * STEPS
    assert len(set(drawn)) == len(drawn)


def test_weights_decide_how_often_a_family_is_drawn() -> None:
    tasks = [
        {"family": "quadratic", "dimensions": [2, 2], "weight": 3.0},
        {"family": "quadratic", "dimensions": [3, 3], "weight": 1.0},
    ]
    trainer = Trainer(plain(tasks=tasks))
    sizes = [trainer.pool.build_task(draw).coordinates for draw in range(400)]
    assert set(sizes) == {2, 3}
    assert sizes.count(2) / 400 == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / 400))


def test_rescaling_is_as_frequent_and_as_wide_as_asked_for() -> None:
    unroll = {"rescale": 0.25, "rescale_range": [0.1, 10.0], "instances": 3}
    trainer = Trainer(plain(unroll=unroll, tasks=[{"family": "quadratic"}]))
    scales = [trainer.pool.build_task(draw).scale for draw in range(400)]
    drawn = torch.stack([scale for scale in scales if scale is not None])
    assert len(drawn) / 400 == pytest.approx(0.25, abs=5 * math.sqrt(0.75 * 0.25 / 400))
    assert drawn.shape[1:] == (3, 1)
    assert 0.1 <= float(drawn.min()) < 0.13
    assert 7.5 < float(drawn.max()) <= 10.0
    # 300 logarithms, uniform over 2 decades: their mean scatters by 2 / sqrt(12 * 300).
    assert float(drawn.log10().mean()) == pytest.approx(0.0, abs=5 * 2 / math.sqrt(12 * drawn.numel()))
