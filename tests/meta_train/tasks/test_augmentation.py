"""Task augmentation: loss factors, label noise and batch sizes, in every family that supports them."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from helpers.draws import SIGMAS, generator
from helpers.small_families import SMALL_FAMILIES
from learned_optim.meta_train.config.load import ConfigError, config_from_tables
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import (
    Augmentation,
    MLPFamily,
    QuadraticFamily,
    Split,
    Task,
    TaskFamily,
)
from learned_optim.meta_train.tasks.softmax_regression import SoftmaxRegressionTask


@dataclass(frozen=True)
class _Labelled(TaskFamily):
    def sample(self, rng: np.random.Generator, split: Split) -> Task:
        rows = torch.arange(1000.0)[:, None], torch.arange(1000) // 250
        return SoftmaxRegressionTask(rows, 500, 0.0, 1.0)


class TestAugmentation:
    def test_empty_augmentation_returns_the_family(self) -> None:
        family = _Labelled()
        assert Augmentation().of(family) is family
        assert Augmentation(loss_factor=(2.0, 2.0)).of(MLPFamily(dataset="fashion-mnist")).evaluation_only

    @pytest.mark.parametrize(
        "name", [name for name in SMALL_FAMILIES if name not in ("neural-art", "implicit-picture")]
    )
    def test_loss_factor_multiplies_the_loss_of_every_family(self, name: str) -> None:
        family = SMALL_FAMILIES[name]
        losses = []
        for each in (family, Augmentation(loss_factor=(5.0, 5.0)).of(family)):
            task = VectorizedTask(each.sample(np.random.default_rng(0), "test"), 2, seed=0)
            losses.append(task.losses(task.initial_parameters, task.batch(generator())))
        torch.testing.assert_close(losses[1], 5 * losses[0])

    def test_loss_factors_fill_their_range(self) -> None:
        family = Augmentation(loss_factor=(1e-3, 1e3)).of(_Labelled())
        factors = [family.sample(np.random.default_rng(seed), "train").loss_factor for seed in range(300)]  # type: ignore[attr-defined]
        assert 1e-3 <= min(factors) < 2e-3
        assert 5e2 < max(factors) <= 1e3

    def test_loss_factor_multiplies_the_bound(self) -> None:
        task = Augmentation(loss_factor=(3.0, 3.0)).of(_Labelled()).sample(np.random.default_rng(0), "train")
        assert task.loss_bound == pytest.approx(3 * 1.5 * math.log(4))

    def test_label_noise_replaces_its_share_of_labels(self) -> None:
        task = Augmentation(label_noise=(0.4, 0.4)).of(_Labelled()).sample(np.random.default_rng(0), "train")
        inputs, labels = task.batch(20, generator())
        true = (inputs.squeeze(-1) // 250).long()
        wrong = float((labels != true).float().mean())
        assert wrong == pytest.approx(0.4 * 0.75, abs=SIGMAS * math.sqrt(0.3 * 0.7 / labels.numel()))
        plain_inputs, plain_labels = _Labelled().sample(np.random.default_rng(0), "train").batch(20, generator())
        assert torch.equal(plain_labels, (plain_inputs.squeeze(-1) // 250).long())
        assert torch.equal(inputs, plain_inputs)

    def test_batch_sizes_are_drawn_from_their_range(self) -> None:
        family = Augmentation(batch_size=(2, 4)).of(_Labelled())
        sizes = {len(family.sample(np.random.default_rng(s), "train").batch(1, generator())[1][0]) for s in range(30)}
        assert sizes == {2, 3, 4}
        language = Augmentation(batch_size=(2, 2)).of(SMALL_FAMILIES["language-model"])
        assert language.sample(np.random.default_rng(0), "train").batch(3, generator()).shape[:2] == (3, 2)

    def test_rows_are_drawn_at_random_with_their_labels(self) -> None:
        family = Augmentation(rows=(20, 40)).of(_Labelled())
        tasks = [family.sample(np.random.default_rng(seed), "train").task for seed in range(20)]  # type: ignore[attr-defined]
        counts = {len(task.data[0]) for task in tasks}
        assert min(counts) >= 20
        assert max(counts) <= 40
        assert len(counts) > 5
        for inputs, labels in (task.data for task in tasks):
            assert len(inputs) == len(inputs.unique())
            assert torch.equal(inputs.squeeze(-1).long() // 250, labels)
        everything = Augmentation(rows=(5000, 5000)).of(_Labelled()).sample(np.random.default_rng(0), "train")
        assert len(everything.task.data[0]) == 1000  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("augmentation", "message"),
        [
            (Augmentation(rows=(10, 20)), "augment.rows: QuadraticTask has no rows of data"),
            (Augmentation(label_noise=(0.1, 0.2)), "augment.label_noise: QuadraticTask has no labels"),
            (Augmentation(batch_size=(4, 4)), "augment.batch_size: QuadraticTask has no mini-batches"),
        ],
    )
    def test_inapplicable_augmentation_is_refused(self, augmentation: Augmentation, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            augmentation.of(QuadraticFamily()).sample(np.random.default_rng(0), "train")

    def test_configuration_reads_augment_beside_the_options(self) -> None:
        entry = {"family": "mlp", "dataset": "digits", "augment": {"loss_factor": [0.1, 10.0]}}
        config = config_from_tables({"steps": 1, "tasks": [entry]})
        assert config.tasks[0].augment == Augmentation(loss_factor=(0.1, 10.0))
        assert config.tasks[0].build() == Augmentation((0.1, 10.0)).of(MLPFamily(dataset="digits"))
        with pytest.raises(ConfigError, match=r"'tasks.0.augment.los_factor' \(did you mean 'loss_factor'\?\)"):
            config_from_tables({"steps": 1, "tasks": [entry | {"augment": {"los_factor": [1.0, 1.0]}}]})
