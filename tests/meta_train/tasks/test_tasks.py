"""The quadratic, MLP and convolutional families as documented; sampling and options of every family."""

import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.small_families import SMALL_FAMILIES
from learned_optim.meta_train.common.seeds import derive_seed, fixed_global_state
from learned_optim.meta_train.data import datasets as data
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import (
    FAMILIES,
    ConvNetFamily,
    MLPFamily,
    QuadraticFamily,
    Split,
    Task,
    TaskFamily,
)
from learned_optim.meta_train.tasks.conv_net import ConvNetTask
from learned_optim.meta_train.tasks.mlp import MLPTask
from learned_optim.meta_train.tasks.quadratic import Quadratic, QuadraticTask
from learned_optim.meta_train.tasks.sampling import log_uniform, log_uniform_integer

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SIGMAS = 5.0  # a correct statistic is further off than this once in two million draws


def needs(dataset: str) -> None:
    folder = os.environ.get("LEARNED_OPTIM_DATA")
    if not folder or not (Path(folder) / dataset).is_dir():
        pytest.skip(f"needs real data: set LEARNED_OPTIM_DATA to a folder that holds {dataset}/")


@pytest.fixture
def mnist() -> None:
    needs("mnist")


@pytest.fixture
def cifar10() -> None:
    needs("cifar10")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quadratics(family: QuadraticFamily, instances: int) -> list[Quadratic]:
    task = family.sample(np.random.default_rng(0), "train")
    with fixed_global_state(0):
        modules = [task.module() for _ in range(instances)]
    return [module for module in modules if isinstance(module, Quadratic)]


def assert_normal(values: Tensor, deviation: float) -> None:
    """Mean 0 and standard deviation as given, within the scatter of so many independent draws."""
    count = values.numel()
    assert abs(float(values.mean())) < SIGMAS * deviation / math.sqrt(count)
    assert float(values.std()) == pytest.approx(deviation, rel=SIGMAS / math.sqrt(2 * count))


class TestQuadratic:
    @pytest.mark.parametrize("condition", [1.0, 30.0, 1e4])
    @pytest.mark.usefixtures("double")
    def test_hessian_has_the_given_condition_number(self, condition: float) -> None:
        for module in quadratics(QuadraticFamily((6, 6), (condition, condition)), instances=3):
            eigenvalues = torch.linalg.eigvalsh(module.matrix.T @ module.matrix)
            assert float(eigenvalues[-1]) == pytest.approx(1.0, rel=1e-10)  # float64 at condition 1e4 loses 4 digits
            assert float(eigenvalues[0]) == pytest.approx(1 / condition, rel=1e-10)
            ratios = eigenvalues[1:] / eigenvalues[:-1]
            assert float(ratios.max() / ratios.min()) == pytest.approx(1.0, rel=1e-9)  # geometric

    @pytest.mark.usefixtures("double")
    def test_conditioned_problem_has_its_minimum_zero_at_a_standard_normal_point(self) -> None:
        modules = quadratics(QuadraticFamily((8, 8), (10.0, 10.0)), instances=300)
        optima = torch.stack([torch.linalg.solve(module.matrix, module.target) for module in modules])
        assert_normal(optima, 1.0)
        task = QuadraticTask(8, 10.0, noise=0.0, initial_deviation=1.0)
        with torch.no_grad():
            modules[0].point.copy_(optima[0])
        assert float(task.loss(modules[0], (torch.zeros(1), torch.zeros(1))).detach()) < 1e-20

    def test_default_quadratic_is_that_of_the_paper(self) -> None:
        family = QuadraticFamily()
        modules = quadratics(family, instances=300)
        assert modules[0].matrix.shape == (10, 10)
        assert modules[0].target.shape == modules[0].point.shape == (10,)
        assert_normal(torch.stack([module.matrix for module in modules]), 1.0)
        assert_normal(torch.stack([module.target for module in modules]), 1.0)
        assert_normal(torch.stack([module.point.detach() for module in modules]), 0.01)

    @pytest.mark.usefixtures("double")
    def test_loss_is_the_squared_norm_of_the_residual(self) -> None:
        (module,) = quadratics(QuadraticFamily((3, 3)), instances=1)
        matrix, target, point = (tensor.detach().numpy() for tensor in (module.matrix, module.target, module.point))
        noise = np.array([0.5, -1.0, 2.0])
        expected = float(np.square(matrix @ point - target + noise).sum())
        loss = QuadraticTask(3, None, 1.0, 0.01).loss(module, (torch.from_numpy(noise), torch.zeros(1)))
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-14)

    def test_noise_has_its_deviation_and_is_fresh_at_every_step(self) -> None:
        task = QuadraticTask(50, None, noise=0.3, initial_deviation=0.01)
        source = generator()
        (first, _), (second, _) = task.batch(20, source), task.batch(20, source)
        assert_normal(first, 0.3)
        assert not torch.equal(first, second)
        assert not torch.equal(first[0], first[1])

    def test_dimensions_and_conditions_fill_their_ranges(self) -> None:
        rng = np.random.default_rng(0)
        tasks = [QuadraticFamily((2, 4), (10.0, 1000.0)).sample(rng, "train") for _ in range(200)]
        drawn = [(task.dimension, task.condition) for task in tasks if isinstance(task, QuadraticTask)]
        assert {dimension for dimension, _ in drawn} == {2, 3, 4}
        logarithms = [math.log10(condition) for _, condition in drawn if condition is not None]
        assert 1 <= min(logarithms) < 1.1
        assert 2.9 < max(logarithms) <= 3


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


def test_every_family_has_a_small_example() -> None:
    assert SMALL_FAMILIES.keys() == FAMILIES.keys()
    assert all(type(family) is FAMILIES[name] for name, family in SMALL_FAMILIES.items())


@pytest.mark.usefixtures("neural_art")
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", FAMILIES)
def test_samples_depend_on_the_generator_alone(name: str, split: Split) -> None:
    def draw(seed: int) -> list[list[float]]:
        rng = np.random.default_rng(seed)
        tasks = [family.sample(rng, split) for _ in range(8)]
        return [fingerprint(task) for task in tasks]

    def fingerprint(task: Task) -> list[float]:
        vectorized = VectorizedTask(task, 2, seed=0)
        losses = vectorized.losses(vectorized.initial_parameters, vectorized.batch(generator()))
        return [vectorized.coordinates, *losses.tolist()]

    family = SMALL_FAMILIES[name]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert draw(0) == first
    assert draw(1) != first
    assert len({tuple(entry) for entry in first}) >= 3  # neural art has three styles to draw from


@pytest.mark.parametrize("cls", FAMILIES.values(), ids=FAMILIES)
def test_misspelt_option_is_refused(cls: Callable[..., TaskFamily]) -> None:
    with pytest.raises(TypeError, match="widht"):
        cls(widht=(1, 2))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (QuadraticFamily, {"dimensions": (0, 4)}, r"dimensions .* 1 <= low <= high, got \[0, 4\]"),
        (QuadraticFamily, {"dimensions": (5, 4)}, "dimensions"),
        (QuadraticFamily, {"condition": (0.5, 4.0)}, "condition"),
        (QuadraticFamily, {"condition": (1.0, math.inf)}, "condition"),
        (QuadraticFamily, {"condition": (math.nan, 2.0)}, "condition"),
        (QuadraticFamily, {"noise": -1.0}, "noise"),
        (QuadraticFamily, {"initial_deviation": -0.1}, "initial_deviation"),
        (MLPFamily, {"layers": (-1, 2)}, "layers"),
        (MLPFamily, {"layers": (3, 1)}, "layers"),
        (MLPFamily, {"width": (0, 3)}, "width"),
        (MLPFamily, {"batch_size": (0, 0)}, "batch_size"),
        (MLPFamily, {"gain": (0.0, 1.0)}, "gain .* 0 < low"),
        (MLPFamily, {"layer_norm": 1.5}, "layer_norm"),
        (MLPFamily, {"activations": ()}, "activations"),
        (MLPFamily, {"activations": ("swish",)}, "swish"),
        (ConvNetFamily, {"layers": (0, 2)}, "layers"),
        (ConvNetFamily, {"examples": 0}, "examples"),
        (ConvNetFamily, {"channels": (0, 2)}, "channels"),
        (ConvNetFamily, {"hidden": (0, 2)}, "hidden"),
        (ConvNetFamily, {"batch_size": (1, 8)}, "batch_size"),
        (ConvNetFamily, {"gain": (0.0, 1.0)}, "gain"),
        (ConvNetFamily, {"image_size": (4, 8)}, "image_size"),
        (ConvNetFamily, {"image_size": (8, 64)}, "image_size must be at most 32"),
        (ConvNetFamily, {"kernel_sizes": (4,)}, "kernel_sizes must be odd"),
        (ConvNetFamily, {"kernel_sizes": ()}, "kernel_sizes"),
        (ConvNetFamily, {"activations": ("swish",)}, "swish"),
        (ConvNetFamily, {"norms": ("instance",)}, "norms must be some of none, batch, layer"),
        (ConvNetFamily, {"classes": (3,)}, "classes"),
        (ConvNetFamily, {"classes": (3, 3)}, "classes"),
        (ConvNetFamily, {"classes": (3, 10)}, r"classes .* 0\.\.9, got \[3, 10\]"),
    ],
)
def test_option_out_of_range_is_refused_before_anything_is_drawn(
    cls: Callable[..., TaskFamily], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_log_uniform_draws_are_uniform_in_the_logarithm() -> None:
    rng = np.random.default_rng(0)
    draws = 4000
    logarithms = np.log10([log_uniform(rng, (0.1, 10.0)) for _ in range(draws)])
    assert np.abs(logarithms).max() <= 1
    for quarter in range(4):
        low = -1 + quarter / 2
        share = np.mean((low <= logarithms) & (logarithms < low + 0.5))
        assert abs(share - 0.25) < SIGMAS * math.sqrt(0.25 * 0.75 / draws)
    counts = Counter(log_uniform_integer(rng, (1, 4)) for _ in range(draws))
    for value in range(1, 5):
        expected = math.log((value + 1) / value) / math.log(5)
        assert abs(counts[value] / draws - expected) < SIGMAS * math.sqrt(expected * (1 - expected) / draws)
    assert {log_uniform_integer(rng, (20, 20)) for _ in range(100)} == {20}


def test_seeds_differ_by_purpose_and_by_counter() -> None:
    seeds = {
        derive_seed(seed, purpose, first, second)
        for seed in (0, 1, 2**40)
        for purpose in ("task", "horizon")
        for first in range(4)
        for second in range(4)
    }
    assert len(seeds) == 3 * 2 * 4 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "task", 2, 3) == 993517027948791374  # a resumed run relies on it
