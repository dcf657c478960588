"""Validation: reproducible, harmless to meta-training, and its score as documented."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.small_runs import QUADRATIC, configuration, metrics, plain, run, weights
from learned_optim.meta_train.trainer.trainer import Trainer
from learned_optim.meta_train.trainer.validation import WORST
from learned_optim.rules import LSTML2L, RuleState

pytestmark = pytest.mark.usefixtures("one_thread")


def test_validation_is_reproducible() -> None:
    trainer = Trainer(configuration())
    torch.manual_seed(1)
    first = trainer.validate(trainer.averaged)
    torch.manual_seed(2)
    assert trainer.validate(trainer.averaged) == first
    assert trainer.validate(trainer.averaged, "test") != first


def test_validation_leaves_meta_training_unchanged() -> None:
    often, never = Trainer(configuration(validation={"every": 1})), Trainer(configuration(validation={"every": 99}))
    run(often)
    run(never)
    assert torch.equal(weights(often.module), weights(never.module))


@pytest.mark.parametrize("output_bias", [300.0, 1e20, math.nan], ids=["far-off", "overflow", "not-a-number"])
def test_diverged_counts_as_ten_times_the_initial_loss(output_bias: float) -> None:
    trainer = Trainer(plain(validation={"tasks": 3, "instances": 4, "horizon": 30}))
    still = LSTML2L(2)
    torch.nn.init.zeros_(still.output_weight)
    assert trainer.validate(still) == pytest.approx(1.0, rel=1e-5)  # without noise, nothing moves the loss
    moving = LSTML2L(2)
    torch.nn.init.zeros_(moving.output_weight)
    torch.nn.init.constant_(moving.output_bias, output_bias)
    assert trainer.validate(moving) == pytest.approx(WORST, rel=1e-5)


def test_solved_counts_as_a_thousandth_of_the_initial_loss() -> None:
    class Descent(LSTML2L):
        def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
            return -0.5 * grad, state  # reaches the minimum of ||x - optimum||^2 in one step

    spheres = QUADRATIC | {"condition": [1.0, 1.0]}
    assert Trainer(plain(tasks=[spheres])).validate(Descent(2)) == pytest.approx(1e-3)


def test_score_is_the_geometric_mean_over_tasks_of_the_last_tenth() -> None:
    """A rule that moves every coordinate by the same amount: its losses can be written out."""
    config = plain(tasks=[QUADRATIC, QUADRATIC | {"dimensions": [7, 7]}], validation={"horizon": 20, "tasks": 2})
    trainer = Trainer(config)
    drift = LSTML2L(2)
    torch.nn.init.zeros_(drift.output_weight)
    torch.nn.init.constant_(drift.output_bias, 0.1)  # times the output scale 0.1: 0.01 a step
    logarithms = []
    for task, _ in trainer.suites["mixture"].vectorized_tasks("validation"):
        batch = task.batch(torch.Generator())
        finals = [task.losses(task.initial_parameters + 0.01 * step, batch) for step in (19, 20)]
        initial = task.losses(task.initial_parameters, batch)
        assert bool((torch.stack(finals).mean(0) < WORST * initial).all())
        logarithms.append(math.log(float(torch.stack(finals).mean() / initial.mean())))
    assert len(logarithms) == 4
    expected = math.exp(sum(logarithms) / 4)
    assert trainer.validate(drift.requires_grad_(False)) == pytest.approx(expected, rel=1e-4)


SUITES = [
    {"name": "near"},
    {"name": "far", "horizon": 12, "tasks": 2, "instances": 3},
    {"name": "kinds", "families": [QUADRATIC | {"dimensions": [7, 7]}, {"family": "helpers.user_tasks:DropoutFamily"}]},
]


class TestSuites:
    def test_suites_have_their_own_families_horizon_and_counts(self) -> None:
        suites = Trainer(plain(validation={"suites": SUITES})).suites
        assert [(suite.horizon, suite.tasks, suite.instances) for suite in suites.values()] == [
            (4, 1, 2),
            (12, 2, 3),
            (4, 1, 2),
        ]
        sizes = [[task.coordinates for task, _ in suite.vectorized_tasks("validation")] for suite in suites.values()]
        assert len(sizes[1]) == 2
        assert sizes[2] == [7, 4]

    def test_mixture_score_is_independent_of_its_name(self) -> None:
        alone, named = Trainer(configuration()), Trainer(configuration(validation={"suites": SUITES}))
        assert named.suites["near"].score(named.module) == alone.validate(alone.module)
        assert named.suites["far"].score(named.module) != alone.validate(alone.module)

    @pytest.mark.parametrize("select", [None, "far", "kinds"])
    def test_selected_suite_chooses_the_best_weights_and_all_are_logged(
        self, select: str | None, tmp_path: Path
    ) -> None:
        validation = {"every": 1, "suites": SUITES, "select": select}
        trainer = Trainer(plain(steps=6, meta_optimizer={"lr": 0.5}, validation=validation), tmp_path)
        kept = []
        for progress in trainer.run():
            assert progress.validation == progress.details[f"validation/{select or 'near'}"]
            kept.append(weights(trainer.averaged))
        rows = metrics(tmp_path)
        scores = {name: [float(row[f"validation/{name}"]) for row in rows] for name in ("near", "far", "kinds")}
        assert len({tuple(values) for values in scores.values()}) == 3
        chosen = scores[select or "near"]
        assert trainer.best_validation == min(chosen)
        assert torch.equal(weights(trainer.best), kept[chosen.index(min(chosen))])
