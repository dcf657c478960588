"""PyTorch's own checks of its optimizers (test/test_optim.py), each under its name there, on Adam and on every rule.

Left out are those that do not apply: sparse gradients and complex parameters, which LearnedOptimizer refuses
(test_optimizer_interface.py), and what fused kernels alone must do. States, copies and hooks are in
test_pytorch_state_checks.py. Adam passing shows that a check is right.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer, lr_scheduler

from helpers.devices import needs_cuda
from helpers.pytorch_checks import (
    CONFIGURATIONS,
    KINDS,
    UNRECORDED,
    Configuration,
    Problem,
    assert_equal,
    assert_went,
    over,
)
from helpers.rules import normal
from learned_optim import LearnedOptimizer, available_rules, load_rule

# PyTorch tests tiny rates.
pytestmark = pytest.mark.filterwarnings("ignore:lr=.* makes every learned step:UserWarning")


# Those that PyTorch's Adam is checked with, and one with a warm restart.
SCHEDULES: Mapping[str, Callable[[Optimizer], list[Any]]] = {
    "none": lambda o: [],
    "exponential": lambda o: [lr_scheduler.ExponentialLR(o, 0.9)],
    "linear": lambda o: [lr_scheduler.LinearLR(o, 0.4, total_iters=4)],
    "constant-exponential": lambda o: [
        lr_scheduler.ConstantLR(o, 0.4, total_iters=4),
        lr_scheduler.ExponentialLR(o, 0.9),
    ],
    "exponential-plateau": lambda o: [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ReduceLROnPlateau(o)],
    "polynomial": lambda o: [lr_scheduler.PolynomialLR(o, power=0.9, total_iters=4)],
    "step-plateau": lambda o: [lr_scheduler.StepLR(o, step_size=10, gamma=0.9), lr_scheduler.ReduceLROnPlateau(o)],
    "restarts": lambda o: [lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=7)],
}


# The update.


@pytest.mark.slow
@over(UNRECORDED)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_forloop_goes_right_direction(configuration: Configuration, contiguous: bool) -> None:
    for make_schedulers in SCHEDULES.values():
        problem = Problem(contiguous)
        optimizer = configuration.make(problem.parameters)
        before = problem.loss().item()
        problem.train(optimizer, 20, make_schedulers(optimizer))
        assert_went(problem, before, configuration.direction)


@over(KINDS)
@pytest.mark.parametrize("make_schedulers", list(SCHEDULES.values()), ids=list(SCHEDULES))
def test_param_group_with_lrscheduler_goes_right_direction(
    configuration: Configuration, make_schedulers: Callable[[Optimizer], list[Any]]
) -> None:
    problem = Problem()
    optimizer = configuration.make([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}])
    before = problem.loss().item()
    problem.train(optimizer, 20, make_schedulers(optimizer))
    assert_went(problem, before, -1)


@over(UNRECORDED)
def test_tensor_lr(configuration: Configuration) -> None:
    if configuration.options.get("foreach") or configuration.options.get("fused"):
        pytest.skip("Adam with foreach or fused takes a tensor as its rate only if it is capturable, on a GPU")
    problem, other = Problem(), Problem()
    # A power of two: the same number in single precision.
    problem.train(configuration.make(problem.parameters, lr=2.0**-8), 5)
    other.train(configuration.make(other.parameters, lr=torch.tensor(2.0**-8)), 5)
    torch.testing.assert_close(problem.parameters, other.parameters, rtol=1e-6, atol=1e-7)


@over(UNRECORDED)
def test_param_groups_weight_decay(configuration: Configuration) -> None:
    problem, other = Problem(), Problem()
    groups = [{"params": [problem.weight]}, {"params": [problem.bias], "weight_decay": 0.0}]
    before = problem.loss().item()
    problem.train(configuration.make(groups), 20)
    assert_went(problem, before, configuration.direction)
    other.train(configuration.make(other.parameters, weight_decay=0.0), 20)
    decay = configuration.options.get("weight_decay")  # None: the rule's own
    rule = load_rule(configuration.options["rule"]) if "rule" in configuration.options else None
    decays = decay > 0 if decay is not None else rule is not None and rule.uses_conditions
    assert torch.equal(problem.weight, other.weight) != decays


@over(UNRECORDED)
def test_param_groups_lr(configuration: Configuration) -> None:
    problem, irrelevant = Problem(), nn.Parameter(normal(2).float())
    still = irrelevant.detach().clone()
    inner = {"lr": configuration.options.get("lr", configuration.rate)}
    groups = [{"params": problem.parameters, **inner}, {"params": [irrelevant]}]
    optimizer = configuration.make(groups, lr=1e-28)
    before = problem.loss().item()
    for step in range(20):
        problem.backward()
        irrelevant.grad = normal(2, seed=step).float()
        optimizer.step()
    assert_went(problem, before, configuration.direction)
    assert torch.equal(irrelevant, still)


@over(CONFIGURATIONS)
def test_step_is_noop_when_params_have_no_grad(configuration: Configuration) -> None:
    params = [normal(2, 3, seed=index).float() for index in range(2)]
    before = copy.deepcopy(params)
    optimizer = configuration.make(params)
    assert optimizer.step(lambda: 7.0) == 7.0
    assert_equal(params, before)
    assert not any(optimizer.state.values())


@over(CONFIGURATIONS)
def test_step_is_noop_for_zero_grads(configuration: Configuration) -> None:
    if str(configuration.options.get("rule", "")).startswith("lstm-l2l"):
        pytest.skip("the rule of the 2016 paper moves coordinates without a gradient, and is kept as it is")
    values = normal(5, 1).float()
    before = values.clone()
    values.grad = torch.zeros_like(values)
    optimizer = configuration.make([values], weight_decay=0.0)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(values, before)


@over(KINDS)
def test_compare_between_implementations(configuration: Configuration) -> None:
    """PyTorch's ``_compare_between``: a step without gradients, a layer frozen for a while, an empty last parameter."""
    reference, fast = ({"foreach": False}, {"foreach": True}) if configuration.kind is Adam else (None, {})
    runs = []
    for options in (reference, fast):
        model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=index))
        empty = nn.Parameter(torch.empty(0))
        empty.grad = torch.empty(0)
        params: list[Tensor] = [*model.parameters(), empty]
        stepped = params
        if options is None:  # one call of the rule for each tensor, the ground truth: where autograd records
            stepped = [parameter.detach() for parameter in params]  # shares the memory, is no leaf of the loss
            options = {"differentiable": True}
        runs.append((model, params, stepped, configuration.make(stepped, **options)))
    for step in range(7):
        for model, params, stepped, optimizer in runs:
            for parameter in model.parameters():
                parameter.grad = None
            if step in (3, 5):
                model[2].requires_grad_(step == 5)
            if step != 2:
                model(torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])).sum().backward()
            for values, like in zip(stepped, params, strict=True):
                values.grad = like.grad
            optimizer.step()
        (_, params, stepped, slow), (_, others, _, quick) = runs
        for one, two, key in zip(params, others, stepped, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
            for entry, value in slow.state[key].items():
                torch.testing.assert_close(value.float(), quick.state[two][entry].float(), rtol=1e-2, atol=1e-6)
        assert [state["step"] for state in slow.state.values()] == [state["step"] for state in quick.state.values()]


@pytest.mark.parametrize("scale", [False, True], ids=["without-scale", "with-scale"])
@pytest.mark.parametrize(
    "configuration",
    [
        Configuration(Adam, {"fused": True}, 0.001),
        *(Configuration(LearnedOptimizer, {"rule": rule, "capturable": True}, 1.0) for rule in available_rules()),
    ],
    ids=["Adam-fused", *available_rules()],
)
def test_fused_does_not_step_if_foundinf(configuration: Configuration, scale: bool) -> None:
    params = [torch.ones(1) for _ in range(5)]
    for values in params:
        values.grad = torch.ones(1)
    optimizer: Any = configuration.make(params)
    optimizer.grad_scale = torch.ones(1) if scale else None
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(values.item() == 1.0 for values in params)
    assert all(optimizer.state[values]["step"] == 0 for values in params)


# With a GPU.


@needs_cuda
@over(UNRECORDED)
def test_cpu_matches_cuda(configuration: Configuration) -> None:
    problem, other = Problem(), Problem(device="cuda")
    problem.train(configuration.make(problem.parameters), 7)
    other.train(configuration.make(other.parameters), 7)
    for one, two in zip(problem.parameters, other.parameters, strict=True):
        torch.testing.assert_close(one, two.cpu(), rtol=1e-4, atol=1e-5)


@needs_cuda
@over(KINDS)
def test_mixed_device(configuration: Configuration) -> None:
    problem, other = Problem(device="cuda", bias_device="cpu"), Problem(device="cuda")
    problem.train(configuration.make(problem.parameters), 5)
    other.train(configuration.make(other.parameters), 5)
    for one, two in zip(problem.parameters, other.parameters, strict=True):
        torch.testing.assert_close(one.cpu(), two.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@over(KINDS)
def test_forloop_goes_right_direction_multigpu(configuration: Configuration) -> None:
    problem = Problem(device="cuda:0", bias_device="cuda:1")
    optimizer = configuration.make(problem.parameters)
    before = problem.loss().item()
    problem.train(optimizer, 20)
    assert_went(problem, before, configuration.direction)


@needs_cuda
@over(KINDS)
def test_cpu_load_state_dict(configuration: Configuration) -> None:
    """A state that was saved on the CPU continues on the GPU with capturable=True, and its step count moves there."""
    values = torch.tensor([0.1, 0.2])
    values.grad = torch.ones(2)
    optimizer = configuration.make([values])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["capturable"] = True
    moved = values.cuda()
    continued = configuration.make([moved], capturable=True)
    continued.load_state_dict(saved)
    moved.grad = torch.ones(2, device="cuda")
    continued.step()
    assert continued.state[moved]["step"].device.type == "cuda"
