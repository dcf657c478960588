"""The conditions that a rule receives beside gradients: parameter, learning rate, progress, averaging."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.rules import normal, randomised
from learned_optim import LearnedOptimizer
from learned_optim.meta_train.inner.unroll import start, unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks.mlp import MLPTask
from learned_optim.rules import NO_CONDITIONS, ScheduleFreeLSTM, UpdateRule


def steered() -> UpdateRule:
    return randomised(ScheduleFreeLSTM(), deviation=0.1).float()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    """Losses of steps on data that depend on the step alone."""
    losses = []
    for step in range(first, first + steps):
        inputs = normal(16, 5, seed=step).float()
        optimizer.zero_grad()
        loss = (model(inputs) - inputs[:, :2].sin()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


paths = pytest.mark.parametrize("fused", [None, False])


@paths
def test_weight_decay_of_the_rule_applies_to_matrices_and_can_be_turned_off(fused: bool | None) -> None:
    moved = {}
    for decay in (None, 0.0, 1.0):
        matrix, vector, idle = (
            nn.Parameter(torch.ones(2, 3)),
            nn.Parameter(torch.ones(3)),
            nn.Parameter(torch.ones(2, 3)),
        )
        parameters = [matrix, vector, idle]
        optimizer = LearnedOptimizer(parameters, ScheduleFreeLSTM(), weight_decay=decay, fused=fused)
        for step in range(1, 101):
            for parameter in parameters:
                parameter.grad = normal(*parameter.shape, seed=step).float() * (parameter is not idle)
            optimizer.step()
        moved[decay] = [parameter.detach().clone() for parameter in parameters]
    assert (moved[None][0] < moved[0.0][0]).all()  # of which the rule's own decay has taken some percent
    assert moved[None][0].mean() > 0.5 * moved[0.0][0].mean()
    assert moved[None][1].equal(moved[0.0][1])
    assert moved[None][2].equal(torch.ones(2, 3))  # what is never pushed does not shrink
    assert (moved[1.0][1] < moved[0.0][1]).all()  # AdamW's shrinks everything
    torch.testing.assert_close(moved[1.0][2], torch.full((2, 3), (1 - 1e-3) ** 100))


@paths
def test_pause_at_zero_learning_rate_changes_nothing(fused: bool | None) -> None:
    results = []
    for pauses in ((), range(3, 8), range(40)):
        model = net()
        optimizer = LearnedOptimizer(model.parameters(), steered(), fused=fused)
        optimizer.param_groups[0]["lr"] = 1.0
        for step in range(30):
            if step in pauses:
                optimizer.param_groups[0]["lr"] = 0.0
                train(model, optimizer, 1, first=1000 + step)  # other data, so that gradients differ
                optimizer.param_groups[0]["lr"] = 1.0
            train(model, optimizer, 1, first=step)
        results.append((values(model), optimizer.state_dict()["state"]))
    for parameters, state in results[1:]:
        assert parameters.equal(results[0][0])
        for index, kept in state.items():
            assert all(tensor.equal(results[0][1][index][entry]) for entry, tensor in kept.items())


def tensor_rate(value: float) -> Tensor:
    return torch.tensor(value)


@pytest.mark.parametrize("kind", [float, tensor_rate])
@paths
def test_warmup_pauses_and_restarts_train_stably(kind: Callable[[float], Any], fused: bool | None) -> None:
    schedules: dict[str, Callable[[int], float]] = {
        "none": lambda step: 1.0,
        "linear": lambda step: min(1.0, step / 100),
        "tiny": lambda step: 1e-3 if step < 100 else 1.0,
        "restarts": lambda step: 1 - step % 100 / 100,
        "on and off": lambda step: float(step // 20 % 2),
    }
    ends = {}
    for name, schedule in schedules.items():
        model = net()
        optimizer = LearnedOptimizer(model.parameters(), fused=fused)
        losses = []
        for step in range(300):
            optimizer.param_groups[0]["lr"] = kind(schedule(step))
            losses += train(model, optimizer, 1, first=step)
        assert max(losses) < 2 * losses[0], name
        ends[name] = sum(losses[-20:]) / 20
    for name, end in ends.items():
        assert end < max(3 * ends["none"], 0.1 * losses[0]), name


@paths
def test_total_steps_anneals_to_zero_and_then_stops(fused: bool | None) -> None:
    model = net()
    optimizer = LearnedOptimizer(model.parameters(), total_steps=200, fused=fused)
    moves = []
    for step in range(200):
        before = values(model)
        train(model, optimizer, 1, first=step)
        moves.append((values(model) - before).norm().item())
    assert 0 < moves[-1] < 0.2 * max(moves)
    end = values(model)
    with pytest.warns(UserWarning, match=r"step 201 of a training of total_steps=200"):
        train(model, optimizer, 1)
    train(model, optimizer, 3)
    assert values(model).equal(end)


@paths
def test_resume_with_total_steps_is_bit_exact(fused: bool | None) -> None:
    whole, first, second = net(), net(), net()
    optimizer = LearnedOptimizer(whole.parameters(), steered(), total_steps=20, fused=fused)
    train(whole, optimizer, 20)
    optimizer = LearnedOptimizer(first.parameters(), steered(), total_steps=20, fused=fused)
    train(first, optimizer, 14)
    second.load_state_dict(first.state_dict())
    resumed = LearnedOptimizer(second.parameters(), steered(), total_steps=20, fused=fused)
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert resumed.param_groups[0]["steps_done"] == 14
    copied = copy.deepcopy(resumed)
    assert copied.param_groups[0]["steps_done"] is not resumed.param_groups[0]["steps_done"]
    train(second, resumed, 6, first=14)
    assert values(second).equal(values(whole))


def test_older_state_resumes_with_total_steps() -> None:
    model = net()
    optimizer = LearnedOptimizer(model.parameters(), steered())
    train(model, optimizer, 7)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for key in ("total_steps", "averaging", "steps_done"):
            group.pop(key, None)
    resumed = LearnedOptimizer(model.parameters(), steered(), total_steps=10)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["steps_done"] == 7
    train(model, resumed, 3)


def test_length_may_be_given_late_changed_and_taken_back() -> None:
    model = net()
    optimizer = LearnedOptimizer(model.parameters())
    (group,) = optimizer.param_groups
    train(model, optimizer, 3)
    group["total_steps"] = 20
    train(model, optimizer, 2)
    assert group["steps_done"] == 5
    group["total_steps"] = None
    train(model, optimizer, 4)
    assert "steps_done" not in group
    group["total_steps"] = 20
    train(model, optimizer, 1)
    assert group["steps_done"] == 10


def test_loading_a_state_of_another_length_warns_that_it_holds() -> None:
    model = net()
    optimizer = LearnedOptimizer(model.parameters(), total_steps=10)
    train(model, optimizer, 4)
    longer = LearnedOptimizer(model.parameters(), total_steps=20)
    with pytest.warns(UserWarning, match=r"has total_steps=10, which holds now, not 20; .* after loading"):
        longer.load_state_dict(optimizer.state_dict())
    longer.param_groups[0]["total_steps"] = 20
    train(model, longer, 1)
    assert longer.param_groups[0]["steps_done"] == 5


def test_steps_that_a_scaler_calls_off_do_not_count() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([parameter], total_steps=10, capturable=True)
    for found in (0.0, 1.0, 0.0):
        parameter.grad = torch.ones(3)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(found), torch.tensor(1.0)  # type: ignore[attr-defined]
        optimizer.step()
    assert optimizer.param_groups[0]["steps_done"] == 2


def test_length_may_be_a_number_of_numpy_and_parameters_on_the_meta_device() -> None:
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(2))], total_steps=np.int64(5))  # type: ignore[arg-type]
    assert type(optimizer.param_groups[0]["total_steps"]) is int
    with torch.device("meta"):
        LearnedOptimizer([nn.Parameter(torch.ones(2))], total_steps=5)


@pytest.mark.parametrize("name", ["rule", "state_dtype"])
def test_what_is_the_same_for_all_groups_is_refused_in_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is the same for all groups"):
        LearnedOptimizer([{"params": [nn.Parameter(torch.ones(2))], name: "default"}])


def test_added_group_ends_with_the_others() -> None:
    early, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([early], steered(), total_steps=10)

    def step(seed: int) -> None:
        for parameter in (early, late):
            parameter.grad = normal(3, seed=seed).float()
        optimizer.step()

    for seed in range(6):
        step(seed)
    optimizer.add_param_group({"params": [late]})
    assert optimizer.param_groups[1]["steps_done"] == 6
    for seed in range(4):
        step(seed)
    before = late.detach().clone()
    with pytest.warns(UserWarning, match="step 11"):
        step(0)
    assert late.detach().equal(before)
    assert optimizer.state[late]["step"] == 4


def test_scheduler_multiplies_the_annealed_rate() -> None:
    results = []
    for factor in (1.0, 0.5):
        model = net()
        optimizer = LearnedOptimizer(model.parameters(), ScheduleFreeLSTM(), total_steps=10, weight_decay=0)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor, total_iters=10)
        before = values(model)
        train(model, optimizer, 1)
        scheduler.step()
        results.append(values(model) - before)
    torch.testing.assert_close(results[1], 0.5 * results[0], rtol=1e-4, atol=1e-9)


@paths
def test_averaging_false_leaves_out_the_average(fused: bool | None) -> None:
    values = [nn.Parameter(torch.ones(6)) for _ in range(2)]
    averaged, latest = (
        LearnedOptimizer([value], ScheduleFreeLSTM(), averaging=on, fused=fused)
        for value, on in zip(values, (True, False), strict=True)
    )
    for step in range(1, 101):
        for value in values:
            value.grad = torch.ones(6) + 0.5 * normal(6, seed=step).float()
        averaged.step()
        latest.step()
    assert (values[1] < values[0]).all()  # the average lags behind
    state = latest.state[values[1]]
    assert state["log_rate"].equal(averaged.state[values[0]]["log_rate"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"total_steps": 0}, ValueError, "total_steps must be at least 1, got 0"),
        ({"total_steps": -5}, ValueError, "total_steps must be at least 1"),
        ({"total_steps": 10.0}, TypeError, "total_steps must be an integer or None, got 10.0"),
        ({"total_steps": True}, TypeError, "total_steps must be an integer"),
        ({"rule": "lstm-l2l-mnist", "total_steps": 10}, ValueError, "has not learned to make use of the end"),
        ({"rule": "lstm-l2l-mnist", "averaging": False}, ValueError, "does not average"),
        ({"weight_decay": -1.0}, ValueError, "None leaves it to the rule"),
    ],
)
def test_invalid_conditions_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LearnedOptimizer([nn.Parameter(torch.ones(2))], **options)
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(2))], options.pop("rule", "default"))
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:step 13 of a training", "ignore::DeprecationWarning")
def test_compiled_step_matches_eager_beyond_total_steps() -> None:
    results = []
    for compiled in (False, True):
        model = net()
        optimizer = LearnedOptimizer(model.parameters(), total_steps=12)
        step = torch.compile(optimizer.step, fullgraph=True) if compiled else optimizer.step
        for count in range(14):
            optimizer.zero_grad()
            model(normal(16, 5, seed=count).float()).square().mean().backward()
            step()
        results.append(values(model))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_forward_without_conditions_uses_neutral_ones() -> None:
    rule = ScheduleFreeLSTM()
    conditions = NO_CONDITIONS
    assert (conditions.lr, conditions.progress, conditions.averaging, conditions.parameter) == (1, 0, 1, 0)
    grad, state = torch.ones(3), rule.init_state((3,))
    alone, _ = rule(grad, state, torch.tensor(1.0))
    told, _ = rule(grad, state, torch.tensor(1.0), conditions._replace(parameter=torch.ones(3)))
    assert (told < alone).all()


def test_meta_training_weight_decay_matches_the_optimizer() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(40, 6, generator=generator), torch.arange(40) % 4
    mlp = MLPTask((images, labels), 40, [5], "tanh", initial="torch", gain=1.0, layer_norm=False)
    rule = ScheduleFreeLSTM().requires_grad_(False)
    task = VectorizedTask(mlp, 2, seed=0).in_steps_of(rule)
    assert 0 < task.decays.sum() < task.coordinates

    def trained() -> Tensor:
        batches = torch.Generator().manual_seed(0)
        parameters: Tensor = unroll(rule, task, start(rule, task, batches), 40, batches).state.parameters
        return parameters if task.scale is None else parameters * task.scale

    with torch.no_grad():
        by_kernel = trained()
    torch.testing.assert_close(by_kernel, trained(), rtol=1e-4, atol=1e-5)
    tensors = [nn.Parameter(tensor.clone()) for tensor in task.tensors(task._used(task.initial_parameters))]
    optimizer = LearnedOptimizer(tensors, rule)
    batches = torch.Generator().manual_seed(0)
    batch = task.batch(batches)
    for _ in range(40):
        used = torch.cat([tensor.flatten() for tensor in tensors]).view(2, -1)
        losses = task._losses(used, task.buffers, batch)
        for tensor, grad in zip(tensors, torch.autograd.grad(losses.sum(), tensors), strict=True):
            tensor.grad = grad
        optimizer.step()
        batch = task.batch(batches)
    by_optimizer = torch.cat([tensor.detach().flatten() for tensor in tensors]).view(2, -1)
    torch.testing.assert_close(by_kernel, by_optimizer, rtol=1e-4, atol=1e-5)
