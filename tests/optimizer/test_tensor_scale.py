"""Tensor scales: wide layers and small weights take smaller steps, by a factor that is fixed at the first step."""

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.benchmarks import run, suite
from helpers.rules import normal
from learned_optim import LearnedOptimizer, load_rule
from learned_optim.meta_train.benchmark import evaluation
from learned_optim.meta_train.benchmark.evaluation import train
from learned_optim.meta_train.config.load import config_from_tables
from learned_optim.meta_train.config.settings import Config
from learned_optim.meta_train.inner.unroll import start, unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import Task
from learned_optim.meta_train.tasks.mlp import MLPTask
from learned_optim.meta_train.trainer.pool import Pool
from learned_optim.meta_train.trainer.trainer import Trainer
from learned_optim.rules import LSTML2L, ScaleFreeLSTM, ScheduleFreeLSTM
from learned_optim.rules.schedule_free_lstm import RELATIVE_RATE

INSTANCES, STEPS, SEED = 3, 12, 5


def scale_of(parameter: Tensor) -> float:
    """The scale that the optimizer gives a parameter at its first step."""
    optimizer = LearnedOptimizer([nn.Parameter(parameter.clone())])
    optimizer.param_groups[0]["params"][0].grad = torch.ones_like(parameter)
    optimizer.step()
    (state,) = optimizer.state.values()
    assert state["scale"].shape == ()
    return float(state["scale"])


@pytest.mark.parametrize("inputs", [8, 400, 3000])
def test_scale_follows_its_documented_formula(inputs: int) -> None:
    torch.manual_seed(0)
    weight = nn.Linear(inputs, 50).weight.detach()
    expected = RELATIVE_RATE * float(weight.square().mean().sqrt()) / math.sqrt(inputs)
    assert scale_of(weight) == pytest.approx(min(1.0, expected), rel=1e-5)
    assert (expected < 1) == (inputs > 100)  # both cases are met
    assert scale_of(weight.view(50, 2, -1)) == pytest.approx(min(1.0, expected), rel=1e-5)  # as of a convolution


def test_vectors_scalars_and_empty_tensors_have_scale_one() -> None:
    assert scale_of(torch.full((1000,), 1e-3)) == scale_of(torch.tensor(1e-3)) == 1
    assert scale_of(torch.zeros(0)) == scale_of(torch.zeros(0, 3)) == scale_of(torch.zeros(3, 0)) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("fused", [None, False])
def test_weight_that_is_no_number_harms_no_other(value: float, fused: bool | None) -> None:
    weight = nn.Parameter(torch.ones(5, 3))
    with torch.no_grad():
        weight[0] = value  # a row that is never used, as that of padding
    optimizer = LearnedOptimizer([weight], fused=fused)
    for _ in range(3):
        optimizer.zero_grad()
        weight[1:].square().sum().backward()
        optimizer.step()
    assert (weight[1:] < 1).all()


def test_zero_matrix_has_the_scale_of_a_default_initialization() -> None:
    drawn = nn.Linear(3000, 50).weight.detach()
    assert scale_of(torch.zeros(50, 3000)) == pytest.approx(scale_of(drawn), rel=0.01)


def test_scale_of_tiny_matrices_approaches_that_of_zeros() -> None:
    drawn = (3 * 300) ** -0.5
    sizes = [0.0, *(10.0**exponent for exponent in range(-12, 1))]
    scales = [
        scale_of(torch.full((50, 300), share * drawn)) / scale_of(torch.full((50, 300), drawn)) for share in sizes
    ]
    assert scales[:10] == pytest.approx([1.0] * 10, rel=0.07)  # zero, and up to 1e-4
    assert scales[-2:] == pytest.approx([0.1, 1.0], rel=1e-4)  # an ordinary size counts
    fine = torch.logspace(-4, -1, 200)
    scales = [scale_of(torch.full((50, 300), share * drawn)) for share in fine.tolist()]
    assert max(abs(math.log(b / a)) for a, b in itertools.pairwise(scales)) < 0.2  # steps of 3.5% in size: no jump


def test_leading_dimension_of_one_is_ignored() -> None:
    positions = 0.02 * normal(1, 20, 300).float()
    assert scale_of(positions) == scale_of(positions[0]) < 1
    assert scale_of(positions[:, :1]) == scale_of(positions[0, :1])


class Halves(ScheduleFreeLSTM):
    """A user's rule that scales matrices of two rows and no others."""

    def tensor_scale(self, shape: Sequence[int], initial_rms: Tensor) -> Tensor | None:  # type: ignore[override]
        return torch.full_like(initial_rms, 0.5) if shape[0] == 2 else None


def test_rule_may_scale_only_some_tensors() -> None:
    tensors = [nn.Parameter(torch.zeros(shape)) for shape in [(3,), (2, 3), (3, 3)]]
    optimizer = LearnedOptimizer(tensors, Halves(2))
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    vector, halved, alone = (tensor.detach().flatten()[0] for tensor in tensors)
    assert vector == alone == 2 * halved != 0


def test_training_is_independent_of_the_unit_of_small_weights() -> None:
    """The rule does not see the scale of gradients, and steps are in proportion to the weights."""
    grads = [normal(40, 300, seed=seed).float() for seed in range(5)]
    ends = []
    for unit in (1.0, 2.0**-2):
        weights = nn.Parameter(unit * 0.02 * normal(40, 300).float())
        optimizer = LearnedOptimizer([weights])
        for grad in grads:
            weights.grad = grad / unit
            optimizer.step()
        ends.append(weights.detach() / unit)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("fused", [False, None], ids=["plain", "fastest"])
def test_scaled_tensor_steps_as_a_vector_times_its_scale(fused: bool | None) -> None:
    initial, grads = 0.01 * normal(6, 50).float(), [normal(6, 50, seed=seed).float() for seed in range(4)]
    scale = scale_of(initial)
    assert scale < 0.5
    matrix, vector = nn.Parameter(initial.clone()), nn.Parameter(torch.zeros(300))
    optimizer = LearnedOptimizer([matrix, vector], weight_decay=0, fused=fused)
    for grad in grads:
        matrix.grad, vector.grad = grad, grad.flatten()
        optimizer.step()
    torch.testing.assert_close(matrix - initial, scale * vector.view(6, 50), rtol=1e-3, atol=1e-8)


def test_scale_is_kept_during_training_and_resume() -> None:
    weights = nn.Parameter(0.01 * normal(20, 100).float())
    optimizer = LearnedOptimizer([weights])
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    scale = optimizer.state[weights]["scale"].clone()
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        weights.mul_(3)
    optimizer.step()
    assert torch.equal(optimizer.state[weights]["scale"], scale)
    moved = nn.Parameter(weights.detach().bfloat16())
    continued = LearnedOptimizer([moved])
    continued.load_state_dict(saved)
    kept = continued.state[moved]["scale"]
    assert torch.equal(kept, scale)
    assert kept.dtype == torch.float32


def test_older_state_without_scales_loads_with_scale_one() -> None:
    weights = nn.Parameter(0.01 * normal(20, 100).float())
    optimizer = LearnedOptimizer([weights])
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["state"][0]["scale"]
    optimizer.load_state_dict(saved)
    assert optimizer.state[weights]["scale"] == 1  # which that training had
    optimizer.step()


def test_older_copy_without_scales_gets_scale_one() -> None:
    weights = nn.Parameter(0.01 * normal(20, 100).float())
    optimizer = LearnedOptimizer([weights])
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    del optimizer.state[weights]["scale"]
    copied = copy.deepcopy(optimizer)
    assert [state["scale"] for state in copied.state.values()] == [1]


@pytest.mark.parametrize("rule", [ScaleFreeLSTM(2), LSTML2L(2)], ids=["scale-free-lstm", "lstm-l2l"])
def test_other_rules_use_no_tensor_scale(rule: ScaleFreeLSTM | LSTML2L) -> None:
    weights = nn.Parameter(1e-4 * normal(20, 1000).float())
    optimizer = LearnedOptimizer([weights], rule)
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    assert "scale" not in optimizer.state[weights]
    task = VectorizedTask(wide(), INSTANCES, SEED)
    assert task.in_steps_of(rule) is task


def wide() -> Task:
    """A perceptron with a layer of 300 inputs and one of 8."""
    inputs = torch.rand(64, 300, generator=torch.Generator().manual_seed(0))
    return MLPTask((inputs, torch.arange(64) % 3), 16, [8], "tanh", initial="torch", gain=1.0, layer_norm=True)


@pytest.mark.parametrize("scale", [None, torch.full((INSTANCES, 1), 20.0)], ids=["alone", "with-scale"])
def test_meta_training_matches_the_optimizer(scale: Tensor | None) -> None:
    rule = load_rule("default")
    task = VectorizedTask(wide(), INSTANCES, SEED, scale=scale)
    by_optimizer = train(
        task,
        lambda parameters: LearnedOptimizer(parameters, rule, state_dtype=torch.float32),
        STEPS,
        torch.Generator().manual_seed(1),
        by_tensor=True,
    )
    scaled = task.in_steps_of(rule)
    assert scaled is not task
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        state = start(rule, scaled, generator)
        losses = unroll(rule, scaled, state, STEPS, generator).losses
        unscaled = unroll(rule, task, start(rule, task, torch.Generator().manual_seed(1)), STEPS, generator).losses
    expected = torch.from_numpy(by_optimizer[1:]).float()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    assert ((unscaled - expected).abs() > 0.01 * expected).any()


def test_part_of_a_scaled_task_matches_the_whole() -> None:
    whole = VectorizedTask(wide(), INSTANCES, SEED).in_steps_of(ScheduleFreeLSTM())
    part = whole.part(slice(1, 3))
    batches = [torch.Generator().manual_seed(2) for _ in range(2)]
    losses, grads = whole.losses_and_grads(whole.initial_parameters, whole.batch(batches[0]))
    of_part = part.losses_and_grads(part.initial_parameters, part.batch(batches[1]))
    torch.testing.assert_close(of_part, (losses[1:3], grads[1:3]))


def test_pool_holds_scaled_tasks() -> None:
    config = config_of_wide_tasks()
    rule = config.rule.build(0)
    task = Pool(config, torch.device("cpu"), rule).build_task(1, 100)
    assert task.scale is not None
    assert float(task.scale.min()) < 0.9 <= float(task.scale.max()) == 1


def test_benchmark_trains_rules_by_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, list[torch.Size]]] = []
    train = evaluation.train

    def watched(task: Any, make: Any, *arguments: Any, **options: Any) -> np.ndarray:
        def making(parameters: Any) -> Any:
            parameters = list(parameters)
            seen.append((options["by_tensor"], [each.shape for each in parameters]))
            return make(parameters)

        return train(task, making, *arguments, **options)

    monkeypatch.setattr(evaluation, "train", watched)
    run(suite(), names=(), rules=["default"])
    (points,) = [shapes for by_tensor, shapes in seen if by_tensor]
    assert points == [points[0]] * 3  # of a quadratic, one for each seed
    for by_tensor, shapes in seen:
        assert by_tensor or [len(shape) for shape in shapes] == [1]


def config_of_wide_tasks() -> Config:
    return config_from_tables(
        {
            "steps": 1,
            "rule": {"architecture": "schedule-free-lstm"},
            "tasks": [{"family": "mlp", "dataset": "digits", "width": [200, 200], "layers": [2, 2]}],
            "unroll": {"horizon": [10, 10], "instances": 2},
            "validation": {"horizon": 20, "tasks": 1, "instances": 2},
        }
    )


class Blind(ScheduleFreeLSTM):
    """The rule without tensor scales."""

    def tensor_scale(self, shape: Sequence[int], initial_rms: Tensor) -> Tensor | None:  # type: ignore[override]
        return None


def test_validation_uses_tensor_scales() -> None:
    trainer = Trainer(config_of_wide_tasks())
    blind = Blind()
    blind.load_state_dict(trainer.module.state_dict())
    assert trainer.validate(trainer.module) != trainer.validate(blind)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_step_uses_the_scale() -> None:
    torch._dynamo.reset()
    initial, ends = 0.01 * normal(6, 50).float(), []
    for compiles in (False, True):
        weights = nn.Parameter(initial.clone())
        optimizer = LearnedOptimizer([weights])
        step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiles else optimizer.step
        for seed in range(3):
            weights.grad = normal(6, 50, seed=seed).float()
            step()
        ends.append(weights.detach() - initial)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-9)
