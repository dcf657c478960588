"""All task families: gradients against finite differences, training, options, hold-outs and bounds."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from helpers.draws import drawn, generator
from helpers.small_families import BUILDERS, SMALL_FAMILIES
from learned_optim.meta_train.benchmark.evaluation import train
from learned_optim.meta_train.config.load import config_from_tables
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
from learned_optim.meta_train.trainer.trainer import Trainer

SPLITS: tuple[Split, ...] = get_args(Split)


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
    before = [parameter.detach().clone() for parameter in trainer.module.parameters()]
    *_, last = trainer.run()
    assert last.skipped == 0
    assert math.isfinite(last.best_validation)
    after = list(trainer.module.parameters())
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
        (ResidualFamily, {"norms": ("group",)}, "norms must be some of none, batch, layer"),
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
def test_accuracy_is_counted_where_classes_are_predicted(name: str) -> None:
    built = BUILDERS[name]()
    task = VectorizedTask(built, instances=2, seed=0)
    batch = task.batch(generator())
    losses, accuracies = task.evaluate(task.initial_parameters, batch)
    torch.testing.assert_close(losses, task.losses(task.initial_parameters, batch), rtol=1e-4, atol=1e-5)
    assert (accuracies is not None) == (built.loss_bound is not None or name == "table")
    if accuracies is not None:
        rows = getattr(getattr(built, "task", built), "batch_size", 0) * getattr(built, "length", 1)
        counts = (accuracies * rows).double()
        torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-3)  # shares of the rows
        assert bool((accuracies >= 0).all() and (accuracies <= 1).all())


@pytest.mark.usefixtures("neural_art")
@pytest.mark.parametrize("name", BUILDERS)
def test_first_loss_of_a_classifier_is_below_its_bound(name: str) -> None:
    built = BUILDERS[name]()
    task = VectorizedTask(built, instances=4, seed=0)
    losses = task.losses(task.initial_parameters, task.batch(generator()))
    classifies = ("softmax", "mlp", "residual", "conv-net", "vision", "fine-tuning", "language", "lstm", "transformer")
    assert (built.loss_bound is not None) == name.startswith((*classifies, "augmented"))
    assert float(losses.mean()) < (built.loss_bound or math.inf)
