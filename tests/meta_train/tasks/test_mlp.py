"""The MLP family: architectures, data, bounds and initial parameters, as documented."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from helpers.draws import assert_normal, generator
from helpers.small_families import SMALL_FAMILIES
from learned_optim.meta_train.common.seeds import fixed_global_state
from learned_optim.meta_train.data import datasets as data
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import MLPFamily, Split
from learned_optim.meta_train.tasks.mlp import MLPTask

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class TestMLP:
    @pytest.mark.usefixtures("mnist")
    def test_default_is_the_base_network_of_the_paper(self) -> None:
        task = MLPFamily().sample(np.random.default_rng(0), "train")
        vectorized = VectorizedTask(task, 2, seed=0)
        assert vectorized.coordinates == 15_910  # 784 * 20 + 20 + 20 * 10 + 10
        assert_normal(vectorized.initial_parameters, 0.01)
        images, labels = vectorized.batch(generator())
        assert images.shape == (2, 128, 784)
        assert labels.shape == (2, 128)
        assert float(images.min()) == 0.0
        assert float(images.max()) == 1.0
        losses = vectorized.losses(vectorized.initial_parameters, (images, labels))
        # Ten logits of size 0.01 differ little from none at all: log 10 nats.
        torch.testing.assert_close(losses, torch.full((2,), math.log(10)), rtol=0, atol=0.05)

    def test_architectures_fill_their_ranges(self) -> None:
        family = MLPFamily(
            dataset="digits",
            layers=(0, 2),
            width=(3, 5),
            activations=("tanh", "relu", "elu"),
            batch_size=(2, 4),
            gain=(0.5, 2.0),
            layer_norm=0.5,
        )
        rng = np.random.default_rng(0)
        tasks = [task for _ in range(300) if isinstance(task := family.sample(rng, "train"), MLPTask)]
        assert {len(task.widths) for task in tasks} == {0, 1, 2}
        assert {width for task in tasks for width in task.widths} == {3, 4, 5}
        assert {task.activation for task in tasks} == {"tanh", "relu", "elu"}
        assert {task.batch_size for task in tasks} == {2, 3, 4}
        assert {task.layer_norm for task in tasks} == {False, True}
        gains = [task.gain for task in tasks]
        assert 0.5 <= min(gains) < 0.55
        assert 1.8 < max(gains) <= 2.0

    def test_module_is_the_architecture_that_was_drawn(self) -> None:
        images = torch.zeros(20, 6), torch.arange(20) % 4
        plain = MLPTask(images, 8, [5, 3], "elu", initial="torch", gain=1.0, layer_norm=False).module()
        normed = MLPTask(images, 8, [5], "gelu", initial="torch", gain=1.0, layer_norm=True).module()
        assert [type(layer) for layer in plain.children()] == [nn.Linear, nn.ELU, nn.Linear, nn.ELU, nn.Linear]
        assert [type(layer) for layer in normed.children()] == [nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear]
        shapes = [tuple(parameter.shape) for parameter in plain.parameters()]
        assert shapes == [(5, 6), (5,), (3, 5), (3,), (4, 3), (4,)]

    def test_gain_multiplies_torchs_initial_parameters(self) -> None:
        images = torch.zeros(20, 6), torch.arange(20) % 4
        with fixed_global_state(5):
            expected = [parameter.detach() for parameter in nn.Linear(6, 4).parameters()]
        with fixed_global_state(5):
            module = MLPTask(images, 8, [], "tanh", initial="torch", gain=3.0, layer_norm=False).module()
        for parameter, unscaled in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.detach(), 3.0 * unscaled, rtol=0, atol=0)

    @pytest.mark.parametrize(("gain", "bound"), [(1.0, 0.1), (0.5, 0.05)])
    def test_xavier_draws_weights_within_its_bound_and_leaves_biases_at_zero(self, gain: float, bound: float) -> None:
        images = torch.zeros(600, 500), torch.arange(600) % 100  # sqrt(6 / (500 + 100)) = 0.1
        with fixed_global_state(5):
            layer = (
                MLPTask(images, 8, [], "tanh", initial="xavier", gain=gain, layer_norm=False)
                .module()
                .get_submodule("0")
            )
        weight, bias = (parameter.detach() for parameter in layer.parameters())
        assert 0.99 * bound < float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)  # of 50,000 draws
        assert not bias.any()

    def test_unknown_initialisation_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"initial must be some of normal, torch, xavier, got \['kaiming'\]"):
            MLPFamily(initial="kaiming")  # type: ignore[arg-type]

    def test_splits_share_no_image(self) -> None:
        family = MLPFamily(dataset="digits")
        rows = []
        for split in SPLITS:
            task = family.sample(np.random.default_rng(0), split)
            assert isinstance(task, MLPTask)
            pixels, labels = task.data
            expected = data.load("digits", split)
            assert torch.equal((pixels * 255).round().to(torch.uint8), expected.images.flatten(1))
            assert torch.equal(labels, expected.labels)
            rows.append({image.tobytes() for image in pixels.numpy()})
        assert rows[0].isdisjoint(rows[1])
        assert rows[0].isdisjoint(rows[2])
        assert rows[1].isdisjoint(rows[2])

    def test_hold_out_divides_the_rows_of_the_split(self) -> None:
        task = SMALL_FAMILIES["mlp"].sample(np.random.default_rng(0), "train")
        assert isinstance(task, MLPTask)
        kept, held_out = task.hold_out()
        assert isinstance(kept, MLPTask)
        assert isinstance(held_out, MLPTask)
        for whole, *parts in zip(task.data, kept.data, held_out.data, strict=True):
            assert torch.equal(whole, torch.cat(parts))
        assert (len(kept.data[0]), len(held_out.data[0])) == (800, 200)
        for part in (kept, held_out):
            assert part.module().state_dict().keys() == task.module().state_dict().keys()
            assert part.classes == 10

    def test_loss_bound_is_half_above_that_of_a_zero_network(self) -> None:
        task = SMALL_FAMILIES["mlp"].sample(np.random.default_rng(0), "train")
        module = task.module()
        for parameter in module.parameters():
            torch.nn.init.zeros_(parameter)
        batch = tuple(tensor[0] for tensor in task.batch(1, generator()))
        assert task.loss_bound == pytest.approx(1.5 * float(task.loss(module, batch).detach()))

    def test_images_keep_their_labels_and_all_are_drawn(self) -> None:
        rows = torch.arange(7.0)[:, None], torch.tensor([0, 1, 2, 0, 1, 2, 0])
        images, labels = MLPTask(rows, 50, [], "tanh", "torch", 1.0, layer_norm=False).batch(3, generator())
        assert torch.equal(labels, rows[1][images.squeeze(-1).long()])
        assert all(set(own.flatten().tolist()) == set(range(7)) for own in images)
        assert not torch.equal(images[0], images[1])

    def test_images_are_pooled_to_the_given_size(self) -> None:
        task = MLPFamily(dataset="digits", image_size=4).sample(np.random.default_rng(0), "train")
        assert isinstance(task, MLPTask)
        pixels, _ = task.data
        images = data.load("digits", "train").images.float() / 255
        assert pixels.shape == (1000, 16)
        torch.testing.assert_close(pixels[:, 0], images[:, 0, :2, :2].mean((1, 2)))
