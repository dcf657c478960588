"""Task families: gradients against finite differences, what each promises, splits that share nothing."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.small_families import BUILDERS, SMALL_FAMILIES
from learned_optim.meta_train.benchmark.evaluation import train
from learned_optim.meta_train.common.seeds import fixed_global_state
from learned_optim.meta_train.config.load import ConfigError, TaskConfig, config_from_tables
from learned_optim.meta_train.data import datasets as data
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import (
    FAMILIES,
    Augmentation,
    AutoencoderFamily,
    DataTask,
    FactorizationFamily,
    LanguageModelFamily,
    NeuralArtFamily,
    PhysicsFamily,
    QuadraticFamily,
    ResidualFamily,
    SoftmaxRegressionFamily,
    Split,
    Task,
    TaskFamily,
    ValleyFamily,
    language_model,
)
from learned_optim.meta_train.tasks.autoencoder import AutoencoderTask
from learned_optim.meta_train.tasks.factorization import FactorizationTask, Product
from learned_optim.meta_train.tasks.mlp import image_rows
from learned_optim.meta_train.tasks.physics import Field, PhysicsTask
from learned_optim.meta_train.tasks.quadratic import Quadratic, QuadraticTask, conditioned_matrix
from learned_optim.meta_train.tasks.residual import ResidualTask
from learned_optim.meta_train.tasks.softmax_regression import SoftmaxRegressionTask, gaussian_classes
from learned_optim.meta_train.tasks.valleys import Coordinates, ValleyTask
from learned_optim.meta_train.trainer.trainer import Trainer

SPLITS: tuple[Split, ...] = get_args(Split)
SIGMAS = 5.0  # a correct statistic is further off than this once in two million draws


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(task: Task, seed: int = 0) -> Any:
    with fixed_global_state(seed):
        return task.module()


@pytest.mark.usefixtures("double", "neural_art")
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_grads_match_finite_differences(build: Callable[[], Task]) -> None:
    task = VectorizedTask(build(), instances=2, seed=1)
    batch = task.batch(generator())
    points = task.initial_parameters
    _, grads = task.losses_and_grads(points, batch)
    for direction in (torch.randn(points.shape, generator=generator(2)), grads / grads.norm()):
        slopes = (grads * direction).sum(1)
        above, below = (task.losses(points + sign * 1e-6 * direction, batch) for sign in (1, -1))
        # Rounding: 1e-16 of the loss over 1e-6; truncation: 1e-12 of the third derivative.
        torch.testing.assert_close((above - below) / 2e-6, slopes, rtol=1e-6, atol=1e-7 * float(above.max()))
    assert float(slopes.abs().max()) > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("neural_art")
@pytest.mark.parametrize("name", BUILDERS)
def test_adam_lowers_the_loss(name: str) -> None:
    task = VectorizedTask(BUILDERS[name](), instances=4, seed=0)
    losses = train(task, lambda parameters: torch.optim.Adam(parameters, lr=0.03), 100, generator())
    first, last = losses[:10].mean(), losses[-10:].mean()
    assert last < 0.9 * first


@pytest.mark.usefixtures("neural_art")
@pytest.mark.parametrize("second_derivatives", [False, True], ids=["first-order", "second-order"])
@pytest.mark.parametrize("name", [name for name in SMALL_FAMILIES if not SMALL_FAMILIES[name].evaluation_only])
def test_family_can_be_meta_trained_on(name: str, second_derivatives: bool) -> None:
    tables = {
        "steps": 2,
        "tasks": [{"family": name, **vars(SMALL_FAMILIES[name])}],
        "unroll": {"truncation": 2, "horizon": [4, 4], "instances": 2, "rescale": 1.0},
        "estimator": {"second_derivatives": second_derivatives, "meta_loss": "log"},
        "validation": {"horizon": 2, "instances": 2},
    }
    trainer = Trainer(config_from_tables(tables))
    before = [parameter.detach().clone() for parameter in trainer.rule.parameters()]
    *_, last = trainer.run()
    assert last.skipped == 0
    assert math.isfinite(last.best_validation)
    after = list(trainer.rule.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("cls", FAMILIES.values(), ids=FAMILIES)
def test_every_option_is_documented(cls: type[TaskFamily]) -> None:
    described = (cls.__doc__ or "").partition("Args:")[2]
    assert [name for name in getattr(cls, "__dataclass_fields__") if name not in described] == []  # noqa: B009


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (QuadraticFamily, {"condition": (1.0, 9.0), "spectrum": "flat"}, "spectrum must be some of geometric, random"),
        (QuadraticFamily, {"spectrum": "random"}, "need a condition"),
        (QuadraticFamily, {"rotated": False}, "need a condition"),
        (QuadraticFamily, {"coordinate_scale": (0.0, 1.0)}, "coordinate_scale .* 0 < low"),
        (QuadraticFamily, {"gradient_noise": -0.1}, "gradient_noise must not be negative"),
        (ValleyFamily, {"surfaces": ("sphere",)}, "surfaces must be some of rosenbrock, rastrigin"),
        (ValleyFamily, {"dimensions": (1, 4)}, "dimensions"),
        (ValleyFamily, {"steepness": (0.0, 4.0)}, "steepness"),
        (ValleyFamily, {"coordinate_scale": (2.0, 1.0)}, "coordinate_scale"),
        (ValleyFamily, {"initial_deviation": -1.0}, "initial_deviation"),
        (FactorizationFamily, {"size": (1, 4)}, "size"),
        (FactorizationFamily, {"rank": (0, 4)}, "rank"),
        (FactorizationFamily, {"surplus": (0.5, 1.0)}, "surplus"),
        (FactorizationFamily, {"depth": (1, 2)}, "depth"),
        (FactorizationFamily, {"condition": (0.1, 2.0)}, "condition"),
        (FactorizationFamily, {"observed": (0.5, 1.5)}, "observed is a fraction"),
        (FactorizationFamily, {"minibatch": (0.0, 1.0)}, "minibatch"),
        (FactorizationFamily, {"noise": -1.0}, "noise"),
        (FactorizationFamily, {"gain": (0.0, 1.0)}, "gain"),
        (SoftmaxRegressionFamily, {"dimensions": (0, 1)}, "dimensions"),
        (SoftmaxRegressionFamily, {"classes": (1, 2)}, "classes"),
        (SoftmaxRegressionFamily, {"rows": (1, 2)}, "rows"),
        (SoftmaxRegressionFamily, {"separation": (0.0, 2.0)}, "separation"),
        (SoftmaxRegressionFamily, {"condition": (0.0, 2.0)}, "condition"),
        (SoftmaxRegressionFamily, {"batch_size": (0, 2)}, "batch_size"),
        (SoftmaxRegressionFamily, {"weight_decay": -1.0}, "weight_decay"),
        (SoftmaxRegressionFamily, {"initial_deviation": math.nan}, "initial_deviation"),
        (AutoencoderFamily, {"layers": (-1, 2)}, "layers"),
        (AutoencoderFamily, {"width": (0, 2)}, "width"),
        (AutoencoderFamily, {"code": (0, 2)}, "code"),
        (AutoencoderFamily, {"batch_size": (0, 2)}, "batch_size"),
        (AutoencoderFamily, {"gain": (0.0, 2.0)}, "gain"),
        (AutoencoderFamily, {"activations": ()}, "activations"),
        (AutoencoderFamily, {"losses": ("absolute",)}, "losses must be some of squared, cross-entropy"),
        (ResidualFamily, {"blocks": (0, 2)}, "blocks"),
        (ResidualFamily, {"width": (0, 2)}, "width"),
        (ResidualFamily, {"hidden": (0, 2)}, "hidden"),
        (ResidualFamily, {"batch_size": (1, 2)}, "batch_size"),
        (ResidualFamily, {"gain": (0.0, 2.0)}, "gain"),
        (ResidualFamily, {"activations": ("swish",)}, "activations"),
        (ResidualFamily, {"norms": ("group",)}, "norms must be some of none, layer, batch"),
        (ResidualFamily, {"places": ("middle",)}, "places must be some of pre, post"),
        (LanguageModelFamily, {"models": ("mamba",)}, "models must be some of rnn, gru, lstm, transformer"),
        (LanguageModelFamily, {"width": (0, 2)}, "width"),
        (LanguageModelFamily, {"layers": (0, 2)}, "layers"),
        (LanguageModelFamily, {"length": (0, 2)}, "length"),
        (LanguageModelFamily, {"batch_size": (0, 2)}, "batch_size"),
        (NeuralArtFamily, {"size": 31}, "size must be at least 32 pixels, got 31"),
        (NeuralArtFamily, {"styles": ()}, "styles"),
        (NeuralArtFamily, {"styles": ("guernica",)}, "styles must be some of starry_night"),
        (NeuralArtFamily, {"network": "alexnet"}, "network must be some of vgg19"),
        (NeuralArtFamily, {"initial": "black"}, "initial must be some of noise, content"),
        (NeuralArtFamily, {"style_weight": -1.0}, "style_weight"),
        (NeuralArtFamily, {"content_weight": 0.0, "style_weight": 0.0, "variation_weight": 0.0}, "all zero"),
        (PhysicsFamily, {"modes": (0, 1)}, "modes"),
        (PhysicsFamily, {"reaction": -1.0}, "reaction"),
        (PhysicsFamily, {"layers": (0, 1)}, "layers"),
        (PhysicsFamily, {"width": (0, 1)}, "width"),
        (PhysicsFamily, {"points": (0, 1)}, "points"),
        (PhysicsFamily, {"activations": ("relu",)}, "activations must be some of tanh, sine"),
        (PhysicsFamily, {"boundary": -1.0}, "boundary"),
        (Augmentation, {"loss_factor": (0.0, 1.0)}, "loss_factor"),
        (Augmentation, {"label_noise": (0.0, 1.5)}, "label_noise is a probability"),
        (Augmentation, {"batch_size": (0, 1)}, "batch_size"),
    ],
)
def test_option_out_of_range_is_refused(cls: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


@pytest.mark.usefixtures("neural_art")
@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "factorization"])
def test_hold_out_divides_the_data_and_keeps_the_modules(name: str) -> None:
    task = BUILDERS[name]()
    whole: Any = getattr(task, "task", task)
    parts = task.hold_out()
    shapes = [[each.shape for each in drawn(part).parameters()] for part in (task, *parts)]
    assert shapes[0] == shapes[1] == shapes[2]
    inner, outer = (getattr(part, "task", part) for part in parts)
    assert type(inner) is type(outer)
    if isinstance(inner, DataTask) and isinstance(outer, DataTask):
        assert len(inner.data[0]) + len(outer.data[0]) == len(whole.data[0])
    elif isinstance(inner, language_model.LanguageModelTask) and isinstance(outer, language_model.LanguageModelTask):
        assert len(inner.text) + len(outer.text) == len(whole.text)
    else:
        assert inner is outer is whole  # nothing to divide
    assert getattr(parts[1], "label_noise", 0.0) == 0.0


@pytest.mark.usefixtures("neural_art")
@pytest.mark.parametrize("name", BUILDERS)
def test_first_loss_of_a_classifier_is_below_its_bound(name: str) -> None:
    built = BUILDERS[name]()
    task = VectorizedTask(built, instances=4, seed=0)
    losses = task.losses(task.initial_parameters, task.batch(generator()))
    classifies = ("softmax", "mlp", "residual", "conv-net", "vision", "fine-tuning", "language", "lstm", "transformer")
    assert (built.loss_bound is not None) == name.startswith((*classifies, "augmented"))
    assert float(losses.mean()) < (built.loss_bound or math.inf)


class TestQuadratic:
    @pytest.mark.usefixtures("double")
    def test_random_spectrum_keeps_its_extremes_and_differs_between_draws(self) -> None:
        spectra = [torch.linalg.svdvals(conditioned_matrix(6, 100.0, "random", True)).square() for _ in range(2)]
        for spectrum in spectra:
            assert float(spectrum.max()) == pytest.approx(1.0, rel=1e-10)
            assert float(spectrum.min()) == pytest.approx(0.01, rel=1e-10)
        assert not torch.allclose(*spectra)

    def test_unrotated_axes_give_a_diagonal_matrix(self) -> None:
        matrix = conditioned_matrix(4, 100.0, "geometric", rotated=False)
        assert torch.equal(matrix, matrix.diag().diag())

    @pytest.mark.usefixtures("double")
    def test_coordinate_scale_keeps_loss_and_minimum(self) -> None:
        plain = drawn(QuadraticTask(5, 10.0, 0.0, 1.0))
        scaled_task = QuadraticTask(5, 10.0, 0.0, 1.0, coordinate_scale=(0.01, 100.0))
        scaled = drawn(scaled_task)
        torch.testing.assert_close(scaled(), plain())
        ratio = scaled.matrix[0] / plain.matrix[0]
        torch.testing.assert_close(scaled.matrix, plain.matrix * ratio)
        torch.testing.assert_close(scaled.point * ratio, plain.point)
        assert float(ratio.max() / ratio.min()) > 10

    def test_gradient_noise_has_its_deviation_and_keeps_the_loss(self) -> None:
        task = VectorizedTask(QuadraticTask(40, None, 0.0, 1.0, gradient_noise=0.5), 50, seed=0)
        quiet = VectorizedTask(QuadraticTask(40, None, 0.0, 1.0), 50, seed=0)
        points = task.initial_parameters
        losses, grads = task.losses_and_grads(points, task.batch(generator()))
        true_losses, true_grads = quiet.losses_and_grads(points, quiet.batch(generator()))
        torch.testing.assert_close(losses, true_losses)
        noise = grads - true_grads
        assert float(noise.std()) == pytest.approx(0.5, rel=SIGMAS / math.sqrt(2 * noise.numel()))
        assert abs(float(noise.mean())) < SIGMAS * 0.5 / math.sqrt(noise.numel())

    def test_gradient_noise_and_residual_noise_are_drawn_apart(self) -> None:
        residual, gradient = QuadraticTask(3, None, 0.1, 1.0, gradient_noise=0.5).batch(2, generator())
        assert residual.shape == gradient.shape == (2, 3)
        assert not torch.equal(residual, gradient)
        assert isinstance(drawn(QuadraticTask(3, None, 0.1, 1.0)), Quadratic)


class TestValleys:
    @pytest.mark.usefixtures("double")
    @pytest.mark.parametrize("surface", ["rosenbrock", "rastrigin"])
    def test_minimum_is_zero_and_flat(self, surface: Any) -> None:
        task = ValleyTask(surface, 4, 30.0, rotated=True, coordinate_scale=(0.1, 10.0), initial_deviation=1.0)
        module: Coordinates = drawn(task)
        with torch.no_grad():
            module.point.copy_(module.offset / module.scale)
        loss = task.loss(module, torch.zeros(()))
        (grad,) = torch.autograd.grad(loss, module.point)
        assert abs(float(loss.detach())) < 1e-20
        assert float(grad.abs().max()) < 1e-10
        assert float(module.scale.max() / module.scale.min()) > 1.5

    def test_values_match_the_formulas(self) -> None:
        u = torch.tensor([0.5, 2.0, -1.0])
        module = Coordinates(torch.eye(3), torch.zeros(3), torch.ones(3), u - 1)
        values = [
            float(ValleyTask(surface, 3, 100.0, False, (1.0, 1.0), 1.0).loss(module, torch.zeros(())).detach())
            for surface in ("rosenbrock", "rastrigin")
        ]
        rosenbrock = 100 * (2 - 0.25) ** 2 + 0.25 + 100 * (-1 - 4) ** 2 + 1
        assert values == pytest.approx([rosenbrock, 0.25 + 1 + 4 + 100 * 2], rel=1e-5)  # half a wave: 1 - cos pi = 2


class TestFactorization:
    @pytest.mark.usefixtures("double")
    def test_target_has_rank_condition_and_size_of_entries(self) -> None:
        task = FactorizationTask([9, 4, 7], 3, condition=20.0, observed=1.0, minibatch=1.0, noise=0.0, gain=1.0)
        module: Product = drawn(task)
        values = torch.linalg.svdvals(module.target)
        assert float(values[0] / values[2]) == pytest.approx(20.0, rel=1e-8)
        assert float(values[3]) < 1e-10
        assert float(module.target.square().mean()) == pytest.approx(1.0)
        assert module().shape == (7, 9)

    def test_only_observed_and_seen_entries_count(self) -> None:
        task = FactorizationTask([10, 3, 20], 2, 1.0, observed=0.3, minibatch=0.5, noise=0.0, gain=1.0)
        module: Product = drawn(task)
        assert float(module.known.sum()) == 60
        seen = task.batch(50, generator())
        assert float(seen.mean()) == pytest.approx(0.5, abs=SIGMAS * 0.5 / math.sqrt(seen.numel()))
        errors = (module() - module.target).square()[(module.known * seen[0]).bool()]
        torch.testing.assert_close(task.loss(module, seen[0]), errors.mean())

    def test_depth_is_the_number_of_factors(self) -> None:
        tasks = [FactorizationFamily(depth=(2, 4)).sample(np.random.default_rng(seed), "train") for seed in range(20)]
        assert {len(drawn(task).factors) for task in tasks} == {2, 3, 4}


class TestSoftmaxRegression:
    def test_gaussian_classes_have_their_sizes_and_deviations(self) -> None:
        features, labels = gaussian_classes(np.random.default_rng(0), 20_000, 3, 4, separation=2.0, condition=100.0)
        assert features.shape == (20_000, 3)
        assert torch.equal(labels.bincount(), torch.full((4,), 5000))
        for label in range(4):
            deviations = features[labels == label].std(0)
            expected = torch.tensor([1.0, 10**-0.5, 0.1])
            torch.testing.assert_close(deviations, expected, rtol=SIGMAS / math.sqrt(2 * 5000), atol=0)

    def test_loss_is_the_cross_entropy_and_half_the_squared_weights(self) -> None:
        rows = torch.randn(6, 2), torch.arange(6) % 3
        task = SoftmaxRegressionTask(rows, 4, weight_decay=0.5, initial_deviation=1.0)
        module: nn.Linear = drawn(task)
        assert torch.equal(module.bias, torch.zeros(3))
        expected = nn.functional.cross_entropy(module(rows[0]), rows[1]) + 0.25 * module.weight.square().sum()
        torch.testing.assert_close(task.loss(module, rows), expected)


each_family_of_images = pytest.mark.parametrize(
    "cls", [SoftmaxRegressionFamily, ResidualFamily, AutoencoderFamily], ids=["softmax", "residual", "autoencoder"]
)


class TestImages:
    @each_family_of_images
    def test_splits_are_those_of_the_data_set(self, cls: Callable[..., TaskFamily]) -> None:
        for split in SPLITS:
            task = cls(dataset="digits").sample(np.random.default_rng(0), split)
            assert isinstance(task, DataTask)
            assert torch.equal((task.data[0] * 255).round().byte(), data.load("digits", split).images.flatten(1))

    @each_family_of_images
    def test_missing_data_names_the_fetch_command(
        self, cls: Callable[..., TaskFamily], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LEARNED_OPTIM_DATA", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        image_rows.cache_clear()
        with pytest.raises(data.DataNotFoundError, match=r"'mnist' not found; .* 'learned-optim data fetch mnist'"):
            cls(dataset="mnist").sample(np.random.default_rng(0), "train")

    @pytest.mark.parametrize("family", ["softmax-regression", "residual", "autoencoder"])
    def test_evaluation_data_is_refused(self, family: str) -> None:
        with pytest.raises(ConfigError, match="not for meta-training: data set 'fashion-mnist'"):
            TaskConfig(family, options={"dataset": "fashion-mnist"}).build()

    def test_autoencoder_is_symmetric(self) -> None:
        task = AutoencoderTask(torch.rand(5, 9), 2, [7, 6], 3, "tanh", "squared", gain=1.0)
        kinds = [type(layer).__name__ for layer in drawn(task)]
        assert kinds == ["Linear", "Tanh", "Linear", "Tanh", "Linear", *["Linear", "Tanh"] * 2, "Linear"]
        sizes = [layer.out_features for layer in drawn(task) if isinstance(layer, nn.Linear)]
        assert sizes == [7, 6, 3, 6, 7, 9]

    def test_norm_stands_before_or_after_each_block(self) -> None:
        images = torch.randn(30, 6), torch.arange(30) % 4

        def stream(place: str, norm: str) -> Tensor:
            network = drawn(ResidualTask(images, 8, 2, 5, 7, "tanh", norm, place, gain=3.0))
            streamed: Tensor = network[:3](images[0])  # the first layer and both blocks
            return streamed

        def is_normal(values: Tensor, dim: int) -> bool:
            return bool(values.mean(dim).abs().max() < 1e-5)

        assert is_normal(stream("post", "layer"), 1)
        assert is_normal(stream("post", "batch"), 0)
        assert not is_normal(stream("pre", "layer"), 1)
        assert not is_normal(stream("pre", "batch"), 0)
        assert type(drawn(ResidualTask(images, 8, 2, 5, 7, "tanh", "layer", "pre", 1.0))[3]) is nn.LayerNorm


class TestPhysics:
    @pytest.mark.usefixtures("double")
    @pytest.mark.parametrize("activation", ["tanh", "sine"])
    def test_second_derivative_matches_autograd(self, activation: str) -> None:
        torch.manual_seed(0)
        field, x = Field([5, 4], activation, torch.ones(2)), torch.rand(6)
        values, second = field(x)
        x.requires_grad_()
        (first,) = torch.autograd.grad(field(x)[0].sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(first.sum(), x)
        torch.testing.assert_close(second, expected)
        assert values.shape == (6,)

    @pytest.mark.usefixtures("double")
    def test_loss_of_the_solution_is_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        task = PhysicsTask(3, reaction=2.0, widths=[4], activation="tanh", points=9, boundary=1.0)
        field: Field = drawn(task)

        def solved(x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.detach().requires_grad_()
            values = field.solution(x)
            (first,) = torch.autograd.grad(values.sum(), x, create_graph=True)
            return values, torch.autograd.grad(first.sum(), x)[0]

        points = task.batch(1, generator())[0]
        assert float(task.loss(field, points).detach()) > 0.1
        monkeypatch.setattr(field, "forward", solved)
        assert float(task.loss(field, points).detach()) < 1e-20

    def test_physics_family_is_evaluation_only(self) -> None:
        with pytest.raises(ConfigError, match="not for meta-training: physics-informed networks are held out"):
            TaskConfig("physics").build()
