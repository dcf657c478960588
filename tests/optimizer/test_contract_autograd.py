"""The contract of test_contract.py, for autocast, gradient scaling, differentiable steps and torch.func."""

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.optim import Adam

from helpers.contract import Make, Net, each_optimizer, loss_of, train
from helpers.optimizers import same
from helpers.rules import normal, randomised
from learned_optim import LearnedOptimizer, available_rules
from learned_optim.rules import ScaleFreeLSTM, ScheduleFreeLSTM, UpdateRule

# Mixed precision.


@each_optimizer
def test_step_ignores_autocast(make: Make) -> None:
    net, other = Net(), Net()
    optimizer, other_optimizer = make(net.parameters()), make(other.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(net)
    loss.backward()
    for parameter, like in zip(other.parameters(), net.parameters(), strict=True):
        assert like.grad is not None
        parameter.grad = like.grad.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a step inside by mistake
        optimizer.step()
    other_optimizer.step()
    assert same(list(net.parameters()), list(other.parameters()))


SCALED: Mapping[str, Make] = {
    "Adam-fused": partial(Adam, fused=True),
    **{f"rule-{name}": partial(LearnedOptimizer, rule=name, capturable=True) for name in available_rules()},
}


@pytest.mark.parametrize("make", list(SCALED.values()), ids=list(SCALED))
def test_grad_scaler_is_applied_without_waiting(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("the scaler read found_inf on the host")

    monkeypatch.setattr(torch.amp.GradScaler, "_maybe_opt_step", read)
    net, other = Net(), Net()
    optimizer, plain = make(net.parameters()), make(other.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a power of two: scaling does not round
    for step in range(4):
        optimizer.zero_grad()
        loss = loss_of(net) * (float("inf") if step == 1 else 1.0)
        scaler.scale(loss).backward()
        if step == 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            train(other, plain, steps=1)
        assert same(list(net.parameters()), list(other.parameters()))
        assert optimizer.state[net.first.weight]["step"] == plain.state[other.first.weight]["step"]
    assert scaler.get_scale() == 512.0


# Autograd and compilation.


@pytest.mark.parametrize(
    "make",
    [Adam, *(partial(LearnedOptimizer, rule=randomised(rule(2))) for rule in (ScaleFreeLSTM, ScheduleFreeLSTM))],
    ids=["Adam", "scale-free-lstm", "schedule-free-lstm"],
)
def test_differentiable_step_passes_gradcheck(make: Make) -> None:
    def three_steps(start: Tensor, grads: Tensor, lr: Tensor) -> Tensor:
        values = start.clone()  # as in PyTorch's test: a leaf cannot be written to
        optimizer = make([values], differentiable=True, lr=lr, weight_decay=0.1)
        for grad in grads:
            values.grad = grad.clone()
            optimizer.step()
        return values

    arguments = normal(4).requires_grad_(), normal(3, 4, seed=1).requires_grad_(), normal().abs().requires_grad_()
    assert torch.autograd.gradcheck(three_steps, arguments)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own, on the first use of jvp
@pytest.mark.parametrize("build", [ScaleFreeLSTM, ScheduleFreeLSTM])
def test_torch_func_differentiates_a_rule(build: Callable[[int], UpdateRule]) -> None:
    rule = randomised(build(2))
    grads = normal(5, 3, seed=1)  # steps, coordinates

    def meta_loss(meta_parameters: dict[str, Tensor]) -> Tensor:
        values, state = torch.zeros(3, dtype=torch.float64), rule.init_state((3,), dtype=torch.float64)
        for step, grad in enumerate(grads, start=1):
            update, state = functional_call(rule, meta_parameters, (grad, state, torch.tensor(step)))
            values = values + update
        return values.square().sum()

    weights = {name: value.detach() for name, value in rule.named_parameters()}
    gradient = torch.func.grad(meta_loss)(weights)
    direction = {name: normal(*value.shape, seed=7) for name, value in weights.items()}
    expected = sum((gradient[name] * direction[name]).sum() for name in weights)
    derivative = torch.func.jvp(meta_loss, (weights,), (direction,))[1]
    torch.testing.assert_close(derivative, expected)  # forward and reverse mode, two different computations
