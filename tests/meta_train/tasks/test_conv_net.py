"""The convolutional family: architectures, data and initial parameters, as documented."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.draws import generator
from learned_optim.meta_train.common.seeds import fixed_global_state
from learned_optim.meta_train.data import datasets as data
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import ConvNetFamily
from learned_optim.meta_train.tasks.conv_net import ConvNetTask


def pictures(labels: int = 4, channels: int = 2, size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(20, channels, size, size, generator=generator()), torch.arange(20) % labels


class TestConvNet:
    @pytest.mark.usefixtures("cifar10")
    def test_default_is_the_network_of_the_paper(self) -> None:
        task = ConvNetFamily().sample(np.random.default_rng(0), "test")
        vectorized = VectorizedTask(task, 2, seed=0)
        convolutions = 25 * (3 * 16 + 16 * 16 + 16 * 16) + 3 * 2 * 16  # weights, and scale and shift of the norms
        linear = 16 * 4 * 4 * 32 + 2 * 32 + 32 * 10 + 10  # 32 pixels a side are halved three times
        assert vectorized.coordinates == convolutions + linear
        images, labels = vectorized.batch(generator())
        assert images.shape == (2, 128, 3, 32, 32)
        assert labels.shape == (2, 128)
        losses = vectorized.losses(vectorized.initial_parameters, (images, labels))
        # Logits of small random weights: not far above the log 10 nats of none at all.
        assert ((losses > 2.2) & (losses < 3.2)).all()

    @pytest.mark.parametrize("norm", ["none", "batch", "layer"])
    def test_module_is_the_architecture_that_was_drawn(self, norm: str) -> None:
        module = ConvNetTask(pictures(), 4, 8, [5, 3], 3, hidden=6, activation="elu", norm=norm, gain=1.0).module()
        kinds = [type(layer) for layer in module.children()]
        norms: dict[str, list[type[nn.Module]]] = {"none": [], "batch": [nn.BatchNorm2d], "layer": [nn.GroupNorm]}
        last: dict[str, list[type[nn.Module]]] = {"none": [], "batch": [nn.BatchNorm1d], "layer": [nn.GroupNorm]}
        block = [nn.Conv2d, *norms[norm], nn.ELU, nn.MaxPool2d]
        assert kinds == [*block, *block, nn.Flatten, nn.Linear, *last[norm], nn.ELU, nn.Linear]
        weights = [tuple(parameter.shape) for parameter in module.parameters() if parameter.dim() > 1]
        assert weights == [(5, 2, 3, 3), (3, 5, 3, 3), (6, 3 * 2 * 2), (4, 6)]
        biases = [layer.bias is not None for layer in module.children() if isinstance(layer, nn.Conv2d | nn.Linear)]
        assert biases == [norm == "none"] * 3 + [True]

    def test_pooling_stops_at_a_single_pixel(self) -> None:
        task = ConvNetTask(pictures(), 4, 8, [2] * 5, 3, hidden=None, activation="relu", norm="none", gain=1.0)
        module = task.module()
        assert sum(isinstance(layer, nn.MaxPool2d) for layer in module.children()) == 3
        assert module(pictures()[0]).shape == (20, 4)

    def test_batch_norm_keeps_no_state_between_batches(self) -> None:
        task = ConvNetTask(pictures(), 4, 8, [3], 3, hidden=4, activation="relu", norm="batch", gain=1.0)
        assert not list(task.module().buffers())

    def test_gain_multiplies_weights_but_not_norms(self) -> None:
        def network(gain: float) -> nn.Module:
            with fixed_global_state(5):
                return ConvNetTask(pictures(), 4, 8, [3], 3, None, "relu", "batch", gain).module()

        for (name, parameter), unscaled in zip(network(3.0).named_parameters(), network(1.0).parameters(), strict=True):
            factor = 1.0 if name.startswith("1.") else 3.0  # the layer behind the convolution is the norm
            torch.testing.assert_close(parameter, factor * unscaled, rtol=0, atol=0)

    def test_chosen_classes_are_renumbered_in_order(self) -> None:
        task = ConvNetFamily(dataset="digits", classes=(7, 0, 3)).sample(np.random.default_rng(0), "train")
        assert isinstance(task, ConvNetTask)
        pixels, labels = task.data
        every = data.load("digits", "train")
        for number, label in enumerate((7, 0, 3)):
            expected = every.images[every.labels == label].float() / 255
            assert torch.equal(pixels[labels == number], expected)
        assert len(labels) == sum(int((every.labels == label).sum()) for label in (7, 0, 3))
        assert VectorizedTask(task, 1, seed=0).skeleton.module[-1].out_features == 3  # type: ignore[index]

    def test_choices_fill_their_ranges(self) -> None:
        family = ConvNetFamily(
            dataset="digits",
            image_size=(8, 8),
            layers=(1, 3),
            channels=(2, 4),
            kernel_sizes=(1, 3),
            hidden=(3, 4),
            activations=("tanh", "relu"),
            norms=("none", "batch", "layer"),
            batch_size=(2, 4),
            gain=(0.5, 2.0),
        )
        rng = np.random.default_rng(0)
        tasks = [task for _ in range(300) if isinstance(task := family.sample(rng, "train"), ConvNetTask)]
        assert {len(task.channels) for task in tasks} == {1, 2, 3}
        assert {channels for task in tasks for channels in task.channels} == {2, 3, 4}
        assert {task.kernel_size for task in tasks} == {1, 3}
        assert {task.hidden for task in tasks} == {3, 4}
        assert {task.activation for task in tasks} == {"tanh", "relu"}
        assert {task.norm for task in tasks} == {"none", "batch", "layer"}
        assert {task.batch_size for task in tasks} == {2, 3, 4}
        assert 0.5 <= min(task.gain for task in tasks) < 0.55
        assert 1.8 < max(task.gain for task in tasks) <= 2.0

    def test_examples_are_drawn_anew_for_every_task(self) -> None:
        family, rng = ConvNetFamily(dataset="digits", examples=300), np.random.default_rng(0)
        everything = {image.tobytes() for image in (data.load("digits", "train").images.float() / 255).numpy()}
        drawn = []
        for _ in range(2):
            task = family.sample(rng, "train")
            assert isinstance(task, ConvNetTask)
            drawn.append({image.tobytes() for image in task.data[0].numpy()})
            assert task.data[0].shape == (300, 1, 8, 8)
            assert drawn[-1] <= everything
            assert len(drawn[-1]) > 290  # a few of the digits look alike to the last pixel
        assert drawn[0] != drawn[1]
        assert family.sample(np.random.default_rng(0), "validation").data[0].shape[0] == 300  # type: ignore[attr-defined]

    @pytest.mark.usefixtures("mnist")
    def test_image_sizes_are_drawn_from_their_range(self) -> None:
        family = ConvNetFamily(dataset="mnist", image_size=(8, 10))
        rng = np.random.default_rng(0)
        tasks = [task for _ in range(20) if isinstance(task := family.sample(rng, "test"), ConvNetTask)]
        assert {tuple(task.data[0].shape) for task in tasks} == {(10_000, 1, size, size) for size in (8, 9, 10)}

    def test_evaluation_only_data_is_marked(self) -> None:
        assert "evaluation only" in ConvNetFamily(dataset="fashion-mnist").evaluation_only
        assert not ConvNetFamily().evaluation_only
