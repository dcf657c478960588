"""The pool of inner trainings: staggering, turns, ends, random numbers, and independence of its members."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.small_runs import L2L, QUADRATIC, STEPS, configuration, drifting, plain, run
from learned_optim.meta_train.common.seeds import torch_generator
from learned_optim.meta_train.tasks.mlp import MLPTask
from learned_optim.meta_train.trainer import pool as pool_module
from learned_optim.meta_train.trainer.member import InnerTraining, TrainedShare
from learned_optim.meta_train.trainer.pool import Pool
from learned_optim.meta_train.trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def redraw(trainer: Trainer) -> list[InnerTraining]:
    """New members in all places: at first those of a pool that begins, then their successors."""
    pool = trainer.pool
    horizon = trainer.config.unroll.horizon
    members = [pool.draw(index, horizon) for index in range(len(pool.members))]
    pool.members = list(members)
    return members


def share_of(member: InnerTraining) -> TrainedShare:
    """The instances of a member, all of which are trained in this process."""
    assert member.trained is not None
    return member.trained


@pytest.mark.slow
def test_first_members_are_staggered_and_later_ones_start_at_the_beginning() -> None:
    trainer = Trainer(plain(steps=480, unroll={"pool": 40, "horizon": [20, 20]}, validation={"every": 1000}))
    after_first_window: dict[int, float] = {}
    for _ in trainer.run():
        for member in trainer.pool.members:
            if member is not None:
                assert member.horizon == 20
                after_first_window.setdefault(member.draw, float(member.step))
    first = [after_first_window[draw] for draw in range(1, 41)]
    later = [stage for draw, stage in after_first_window.items() if draw > 40]
    assert set(first) == {2.0 * window for window in range(1, 11)}  # of 40 draws, one of 10 is missing in 14%
    assert len(later) >= 40
    assert set(later) == {2.0}


@pytest.mark.slow
def test_first_members_have_uniform_stages() -> None:
    """In a pool under way a window's stage, over its own horizon, is uniform, and long trainings come often."""
    draws = 200
    trainer = Trainer(plain(unroll={"pool": draws, "truncation": 1, "horizon": [2, 50]}))
    members = redraw(trainer)
    horizons = torch.tensor([float(member.horizon) for member in members])
    fractions = torch.tensor([(float(member.step) + 0.5) / member.horizon for member in members])
    # Uniform on 2 ... 50 and 0 ... 1: standard deviations 14.1 and 0.289.
    assert float(horizons.mean()) == pytest.approx(26, abs=5 * 14.1 / draws**0.5)
    assert float(fractions.mean()) == pytest.approx(0.5, abs=5 * 0.289 / draws**0.5)
    later = torch.tensor([float(member.horizon) for member in redraw(trainer)])
    assert float(later.log().mean()) == pytest.approx(math.log(10), abs=0.3)  # log-uniform, as configured


def test_member_that_diverges_while_staggered_starts_at_the_beginning() -> None:
    config = plain(rule=L2L, unroll={"pool": 20, "horizon": [20, 20]})
    members = redraw(Trainer(config, rule=drifting(1e4)))
    assert {float(member.step) for member in members} == {0.0}
    assert not any(member.finished for member in members)


@pytest.mark.parametrize(("instances", "later_draws"), [(1, 11), (3, 11)])
def test_diverged_finite_member_is_replaced(instances: int, later_draws: int) -> None:
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
def test_divergence_is_a_whole_window_above_ten_initial_losses(
    losses: list[list[float]], initial: list[float], diverged: bool
) -> None:
    config = plain()
    (member,) = redraw(Trainer(config))
    trained = share_of(member)
    trained.advance(trained.inner._replace(initial_loss=torch.tensor(initial)), torch.tensor(losses))
    assert trained.lost == trained.diverged == diverged


def test_checkpoint_restores_divergence(tmp_path: Path) -> None:
    trainer = Trainer(plain(), tmp_path)
    next(trainer.run())
    member = trainer.pool.members[0]
    assert isinstance(member, InnerTraining)
    member.lost = True
    trainer.save_checkpoint()
    restored = Trainer.resume(tmp_path).pool.members[0]
    assert restored is not None
    assert restored.finished


def test_single_member_keeps_its_horizon() -> None:
    trainer = Trainer(plain(unroll={"horizon": [20, 20]}))
    next(trainer.run())
    assert trainer.pool.members[0] is not None
    assert trainer.pool.members[0].horizon == 20


def test_members_take_turns() -> None:
    config = plain(steps=3, unroll={"pool": 3, "windows_per_step": 2, "horizon": [100, 100], "stagger": False})
    trainer = Trainer(config)
    stages = [[float(member.step) if member else 0.0 for member in trainer.pool.members] for _ in trainer.run()]
    assert stages == [[2, 2, 0], [4, 2, 2], [4, 4, 4]]


@pytest.mark.parametrize(("horizon", "ends"), [(3, (4,)), (8, (4, 8)), (9, (4, 8, 12))])
def test_inner_training_ends_with_the_window_that_reaches_its_horizon(horizon: int, ends: tuple[int, ...]) -> None:
    unroll = {"truncation": 4, "horizon": [horizon, horizon]}
    trainer = Trainer(plain(steps=3 * len(ends), unroll=unroll, validation={"every": 1000}))
    stages = []
    for _ in trainer.run():
        assert trainer.pool.members[0] is not None
        stages.append((trainer.pool.members[0].draw, float(trainer.pool.members[0].step)))
    assert stages == [(draw, step) for draw in (1, 2, 3) for step in ends]


def test_draws_use_distinct_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
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
    sizes = [trainer.pool.build_task(draw, 100).coordinates for draw in range(400)]
    assert set(sizes) == {2, 3}
    assert sizes.count(2) / 400 == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / 400))


def test_rescaling_has_its_frequency_and_range() -> None:
    unroll = {"rescale": 0.25, "rescale_range": [0.1, 10.0], "instances": 3}
    trainer = Trainer(plain(unroll=unroll, tasks=[{"family": "quadratic"}]))
    scales = [trainer.pool.build_task(draw, 100).scale for draw in range(400)]
    drawn = torch.stack([scale for scale in scales if scale is not None])
    assert len(drawn) / 400 == pytest.approx(0.25, abs=5 * math.sqrt(0.75 * 0.25 / 400))
    assert drawn.shape[1:] == (3, 1)
    assert 0.1 <= float(drawn.min()) < 0.13
    assert 7.5 < float(drawn.max()) <= 10.0
    # 300 logarithms, uniform over 2 decades: their mean scatters by 2 / sqrt(12 * 300).
    assert float(drawn.log10().mean()) == pytest.approx(0.0, abs=5 * 2 / math.sqrt(12 * drawn.numel()))


@pytest.mark.parametrize("estimator", ["truncated-bptt", "pes"])
@pytest.mark.parametrize("family", ["DropoutFamily", "AttentionFamily"])
def test_members_are_independent_bitwise(estimator: str, family: str) -> None:
    """Members may live in different processes: what one of them does follows from its place and the rule alone."""
    tasks = [QUADRATIC, {"family": f"helpers.user_tasks:{family}"}]
    unroll = {"pool": 3, "horizon": [3, 9], "rescale": 0.5, "truncation_up_to": 4}
    config = plain(tasks=tasks, unroll=unroll, estimator={"name": estimator})
    trainer = Trainer(config)
    horizon = config.unroll.horizon
    together = []
    for meta_step in range(24):
        outcome = trainer.pool.advance([meta_step % 3], meta_step, horizon)
        if meta_step % 3 == 1:
            together.append(outcome)
    alone = Pool(config, torch.device("cpu"), trainer.module)
    for meta_step, expected in zip(range(1, 24, 3), together, strict=True):
        outcome = alone.advance([1], meta_step, horizon)
        assert (outcome.meta_loss, outcome.inner_loss) == (expected.meta_loss, expected.inner_loss)
        assert all(torch.equal(*pair) for pair in zip(outcome.grads, expected.grads, strict=True))
    assert alone.members[1] is not None
    assert trainer.pool.members[1] is not None
    assert torch.equal(share_of(alone.members[1]).inner.parameters, share_of(trainer.pool.members[1]).inner.parameters)
    assert alone.members[1].draw > 3  # it has been drawn anew
    assert alone.members[0] is None


def test_one_diverged_particle_ends_the_member() -> None:
    """The mean over 8 particles would be 3.5 initial losses."""
    config = plain(estimator={"name": "pes", "pairs": 2}, unroll={"instances": 2})
    (member,) = redraw(Trainer(config))
    trained = share_of(member)
    assert trained.inner.initial_loss.shape == (8, 1)
    losses = torch.ones(2, 8, 1) * trained.inner.initial_loss
    trained.advance(trained.inner, losses)
    assert not trained.lost
    losses[:, 5] *= 21
    trained.advance(trained.inner, losses)
    assert trained.lost


class TestWindows:
    def lengths(self, meta_step: int = 0, to_horizon: int = 10**6, **unroll: Any) -> np.ndarray:
        settings = plain(unroll=unroll).unroll
        rng = np.random.default_rng(0)
        return np.array([settings.window(meta_step, to_horizon, rng) for _ in range(400)])

    @pytest.mark.parametrize(("meta_step", "mean"), [(0, 10), (500, 55), (1000, 100), (5000, 100)])
    def test_windows_grow_linearly_with_jitter(self, meta_step: int, mean: int) -> None:
        growth = {"to": 100, "over": 1000}
        lengths = self.lengths(meta_step=meta_step, truncation=10, truncation_growth=growth)
        assert (lengths.min(), lengths.max()) == (round(0.8 * mean), round(1.2 * mean))
        deviation = 0.4 * mean / 12**0.5  # of a uniform factor in 0.8 ... 1.2
        assert lengths.mean() == pytest.approx(mean, abs=5 * deviation / 400**0.5)
        steady = self.lengths(meta_step=meta_step, truncation=10, truncation_growth={**growth, "jitter": 0.0})
        assert set(steady) == {mean}

    def test_windows_are_drawn_log_uniformly(self) -> None:
        lengths = self.lengths(truncation=2, truncation_up_to=200)
        assert lengths.min() >= 2
        assert lengths.max() <= 200
        # 400 logarithms, uniform over ln 100: their mean scatters by 4.6 / sqrt(12 * 400). Rounding moves it by 0.1.
        assert np.log(lengths + 0.5).mean() == pytest.approx(math.log(20), abs=5 * 4.6 / math.sqrt(12 * 400) + 0.1)

    @pytest.mark.parametrize("options", [{"truncation_up_to": 9}, {"truncation_growth": {"to": 9, "over": 1}}])
    def test_varying_windows_end_at_the_horizon(self, options: dict[str, Any]) -> None:
        assert self.lengths(to_horizon=3, meta_step=9, truncation=2, **options).max() == 3
        unroll = {"truncation": 2, "horizon": [20, 20], **options}
        trainer = Trainer(plain(steps=30, unroll=unroll, validation={"every": 1000}))
        ends = set()
        for _ in trainer.run():
            member = trainer.pool.members[0]
            assert member is not None
            assert member.step <= 20
            ends |= {member.step} if member.finished else set()
        assert ends == {20}


def test_outer_split_validation_holds_out_data() -> None:
    tasks = [{"family": "mlp", "dataset": "digits", "width": [3, 3], "layers": [1, 1], "batch_size": [4, 4]}]
    drawn = {}
    for split in ("train", "validation"):
        config = plain(tasks=tasks, estimator={"outer_batches": 1, "outer_split": split})
        task = Trainer(config).pool.build_task(1, 100)
        assert isinstance(task.task, MLPTask)
        assert isinstance(task.outer, MLPTask)
        drawn[split] = (len(task.task.data[0]), len(task.outer.data[0]))
    assert drawn == {"train": (1000, 1000), "validation": (800, 200)}


def test_rules_are_told_the_length_of_their_share_of_trainings() -> None:
    unroll = {"known_length": 0.25, "truncation": 20, "horizon": [30, 50]}
    pool = Trainer(plain(unroll=unroll)).pool
    told = [pool.build_task(draw, 30).total_steps for draw in range(1, 401)]
    assert set(told) == {None, 40}  # two whole windows
    assert told.count(40) / 400 == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 400))


def test_task_tells_the_fraction_of_a_training_that_is_done() -> None:
    task = Trainer(plain(unroll={"known_length": 1.0, "truncation": 20})).pool.build_task(1, 20)
    assert float(task.progress(torch.tensor(1.0))) == pytest.approx(1 / 21)  # as LearnedOptimizer tells it
    assert float(task.progress(torch.tensor(20.0))) == pytest.approx(20 / 21)
    assert Trainer(plain()).pool.build_task(1, 20).progress(torch.tensor(7.0)) == 0.0


def test_balanced_entries_have_an_equal_say() -> None:
    tasks = [{**QUADRATIC, "augment": {"loss_factor": [factor, factor]}} for factor in (1.0, 1000.0)]
    unroll = {"pool": 8, "windows_per_step": 8, "balanced": True}
    trainer = Trainer(plain(steps=20, tasks=tasks, unroll=unroll, estimator={"meta_loss": "mean"}))
    run(trainer)
    small, large = ((total / weight) ** 0.5 for weight, total in trainer.pool.spread)
    assert large > 30 * small
    norms: dict[int, list[float]] = {0: [], 1: []}
    for place, member in enumerate(trainer.pool.members):
        assert member is not None
        entry = trainer.pool.entry(member.draw)
        rms = (small, large)[entry]
        balanced = trainer.pool._balanced(place, [torch.full((4,), rms / 2)])
        norms[entry].append(float(balanced[0].norm()))
    assert all(0.8 < norm < 1.2 for each in norms.values() for norm in each)


def test_agreement_is_the_cosine_between_halves() -> None:
    same = [[torch.tensor([1.0, 0.0]), torch.tensor([2.0])]] * 4
    assert pool_module.agreement(same) == pytest.approx(1.0)
    opposite = [[torch.tensor([1.0, 0.0])], [torch.tensor([-3.0, 0.0])]]
    assert pool_module.agreement(opposite) == pytest.approx(-1.0)
    assert pool_module.agreement(same[:1]) is None
    assert pool_module.agreement([[torch.zeros(2)], [torch.ones(2)]]) is None
