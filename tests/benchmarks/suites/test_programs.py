"""Training programs: rows once for each run, and a summary that compares what it says."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.results import Row
from benchmarks.suites import programs
from benchmarks.suites.program_games import LONGEST, cart_pole_episodes, frechet, moments, moved_cart
from benchmarks.suites.program_list import PROGRAMS
from benchmarks.suites.program_loop import TrainingOutcome, batches, end_of, evaluate, fit
from benchmarks.suites.programs import COLUMNS, UNTUNED, main, read, summary

SMALL = ("cancer", "friedman", "policy-gradient")  # of tables and a cart: no data set is needed


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small programs, six steps long."""
    pytest.importorskip("sklearn")
    short = {name: PROGRAMS[name]._replace(steps=6) for name in SMALL}
    monkeypatch.setattr(programs, "PROGRAMS", short)


def row(program: str, optimizer: str, seed: int = 0, **values: float) -> Row:
    """What a run would have written."""
    given = {"program": program, "optimizer": optimizer, "seed": seed, "training_loss": 1.0, **values}
    return {column: str(given.get(column, "")) for column in COLUMNS}


@pytest.mark.usefixtures("few_steps")
def test_every_program_and_optimizer_has_a_row_and_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--output", str(tmp_path), "--programs", ",".join(SMALL)]
    main(["baselines", *place])
    main(["learned", "--lr", "0.5", *place])
    rows = read(tmp_path)
    expected = [*itertools.product(SMALL, programs.baselines("")), *itertools.product(SMALL, ["default, lr 0.5"])]
    assert [(row["program"], row["optimizer"]) for row in rows] == expected
    for found in rows:
        assert math.isfinite(float(found["training_loss"]))
        assert (found["held_out_loss"] == "") == (found["program"] == "policy-gradient") == (found["score"] != "")
        assert (found["accuracy"] != "") == (found["program"] == "cancer")
        if found["held_out_loss"]:
            assert float(found["best_held_out_loss"]) <= float(found["held_out_loss"])
    capsys.readouterr()
    main(["summary", *place])
    text = capsys.readouterr().out
    assert text.startswith("default, lr 0.5 | untuned Adam")
    assert all(f"\n{name}" in text for name in SMALL)


@pytest.mark.usefixtures("few_steps")
def test_stored_run_is_repeated_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count(1)
    monkeypatch.setattr(programs, "trained", lambda *_: TrainingOutcome(next(count)))
    command = ["learned", "--programs", "friedman", "--output", str(tmp_path)]
    main(command)
    main(command)
    assert [row["training_loss"] for row in read(tmp_path)] == ["1"]
    main([*command, "--again"])
    assert [row["training_loss"] for row in read(tmp_path)] == ["2"]
    main([*command, "--seeds", "0,1", "--label", "other"])
    assert [(row["optimizer"], row["seed"]) for row in read(tmp_path)[1:]] == [("other", "0"), ("other", "1")]


def test_same_seed_gives_the_same_run() -> None:
    pytest.importorskip("sklearn")
    make = programs.adam(1e-3)
    first, again, other = (programs.trained(PROGRAMS["friedman"]._replace(steps=6), make, seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_only_given_settings_reach_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []
    monkeypatch.setattr(programs, "LearnedOptimizer", lambda parameters, rule, **settings: given.append(settings))
    programs.learned("default", {}, total_steps=False)([], 7)
    programs.learned("default", {"averaging": False}, total_steps=True)([], 7)
    assert given == [{}, {"averaging": False, "total_steps": 7}]


def test_program_without_its_data_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("LEARNED_OPTIM_DATA", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    main(["baselines", "--programs", "digits,adversarial", "--output", str(tmp_path)])
    assert capsys.readouterr().out.count("skipped: data set 'mnist' not found") == 2
    assert read(tmp_path) == []


def test_unknown_program_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["learned", "--programs", "fashoin"])
    assert "unknown programs: fashoin" in capsys.readouterr().err


def test_summary_compares_with_untuned_and_best_adam() -> None:
    rows = [
        row("digits", UNTUNED, best_held_out_loss=0.2, held_out_loss=0.4, accuracy=0.9),
        row("digits", "Adam@0.01", best_held_out_loss=0.1, held_out_loss=0.8, accuracy=0.8),
        row("digits", "new", best_held_out_loss=0.1, held_out_loss=0.4, accuracy=0.89),
        row("narrow", UNTUNED, best_held_out_loss=0.1, held_out_loss=0.1, accuracy=0.9),
        row("narrow", "new", best_held_out_loss=0.2, held_out_loss=0.4, accuracy=0.96),
        row("adversarial", UNTUNED, score=50, entropy=2),
        row("adversarial", programs.FOR_GAMES, score=20, entropy=2.1),
        row("adversarial", "new", score=30, entropy=2.2),
        row("policy-gradient", UNTUNED, score=50),
        row("policy-gradient", "Adam@0.01", score=300),
        row("policy-gradient", "new", score=200),
        row("fashion", UNTUNED, held_out_loss=1, best_held_out_loss=1),  # which the new one has not been run on
    ]
    text = summary(rows, "new")
    assert "least held-out loss: 1.000 of untuned Adam's, 1.414 of best Adam's" in text
    assert "held-out loss at the end: 2.000 of untuned Adam's, 2.000 of best" in text
    assert "at most 5% above untuned Adam's on 1 of 2, the most 2.000" in text
    assert "accuracy at the end: +2.50 points" in text
    assert "lower on 1 of 2, least -1.0" in text
    assert "Frechet distance 30, untuned Adam 50, best Adam 20" in text
    assert "return 200, untuned Adam 50, best Adam 300" in text
    assert "fashion" not in text


def test_summary_takes_the_same_seeds_of_all_optimizers() -> None:
    losses = {UNTUNED: (0.5, 0.1), "Adam@0.01": (0.2,), "new": (0.25, 0.15)}
    rows = [
        row("digits", name, seed, held_out_loss=loss, best_held_out_loss=loss)
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    (one,) = programs.compared(rows, "new")
    assert one.learned["held_out_loss"] == pytest.approx(0.2)
    assert one.untuned["held_out_loss"] == one.best["held_out_loss"] == pytest.approx(0.3)


def test_diverged_training_counts_as_the_worst() -> None:
    assert end_of([1.0] * 19 + [math.nan]) == math.inf
    module = nn.Linear(1, 1)
    nn.init.constant_(module.weight, math.nan)
    assert evaluate(module, (torch.ones(3, 1), torch.ones(3, 1)), nn.functional.mse_loss)[0] == math.inf


def test_evaluation_preserves_the_random_state_of_training() -> None:

    class Sampled(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs) + torch.randn(len(inputs), 1)

    module, rows = Sampled(1, 1), (torch.ones(3, 1), torch.ones(3, 1))
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    losses = [evaluate(module, rows, nn.functional.mse_loss)[0] for _ in range(2)]
    assert losses[0] == losses[1]
    assert torch.equal(torch.rand(1), expected)


def test_evaluations_cover_the_run_and_its_end() -> None:
    seen = []

    class Held(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            seen.append(self.training)
            return super().forward(inputs)

    rows = torch.randn(8, 2), torch.randint(3, (8,))
    fit(Held(2, 3), torch.optim.Adam, 90, batches(rows, 4), rows)
    ends = [place for place, training in enumerate(seen) if not training]
    assert [end - before for before, end in itertools.pairwise([-1, *ends])] == [6] * 18


def test_epoch_has_each_row_once() -> None:
    rows = torch.arange(10)
    drawn = [batch for (batch,) in itertools.islice(batches([rows], 3), 6)]
    assert all(len(torch.cat(drawn[first : first + 3]).unique()) == 9 for first in (0, 3))


def test_frechet_distance_of_normal_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    wider = 4 * spread  # tr(A + B - 2 (A B)^(1/2)) = tr A (1 + 4 - 4) = 14
    zero, shift = torch.zeros(3, dtype=torch.float64), torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    assert frechet(zero, spread, shift, wider) == pytest.approx(25 + 14)
    sample = moments(torch.randn(100, 3, generator=generator))
    assert frechet(*sample, *sample) == pytest.approx(0, abs=1e-9)  # float64, from eigenvalues of about 1


def test_cart_moves_as_gym_moves_it() -> None:
    # gymnasium's CartPole-v1, 1.2: env.unwrapped.state = (0.1, -0.2, 0.05, 0.3); env.step(1), computed by hand here
    state = torch.tensor([[0.1, -0.2, 0.05, 0.3]])
    push = (10 + 0.05 * 0.09 * math.sin(0.05)) / 1.1
    turn = (9.8 * math.sin(0.05) - math.cos(0.05) * push) / (0.5 * (4 / 3 - 0.1 * math.cos(0.05) ** 2 / 1.1))
    expected = [
        0.1 - 0.02 * 0.2,
        -0.2 + 0.02 * (push - 0.05 * turn * math.cos(0.05) / 1.1),
        0.05 + 0.02 * 0.3,
        0.3 + 0.02 * turn,
    ]
    torch.testing.assert_close(moved_cart(state, torch.tensor([1]))[0], torch.tensor(expected))


def test_episode_ends_where_the_pole_falls() -> None:
    always_right = nn.Linear(4, 2)
    with torch.no_grad():
        always_right.weight.zero_()
        always_right.bias.copy_(torch.tensor([-100.0, 100.0]))
    states, actions, alive = cart_pole_episodes(always_right)
    assert bool((actions == 1).all())
    lengths = alive.sum(0)
    assert 7 <= lengths.min() <= lengths.max() <= 12 < LONGEST  # Gym's: 8 to 10 from the usual starts
    fallen = states[:, :, 2].abs() >= math.radians(12)
    assert not bool((fallen & alive.bool()).any())
