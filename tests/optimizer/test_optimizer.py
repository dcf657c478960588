"""LearnedOptimizer against the float64 oracle; non-finite gradients, groups, closures, scaling and schedules."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from helpers.optimizers import NOWHERE, RANDOM_RULES, Net, mean_square, parameter, same, train
from helpers.rules import Build, as_reference, each, randomised
from learned_optim import LearnedOptimizer, UpdateRule, load_rule
from learned_optim.kernels.slots import Slot, StepSettings
from learned_optim.rules import ScaleFreeLSTM, ScheduleFreeLSTM

ALL_RULES: dict[str, Build] = RANDOM_RULES | {"shipped-default": lambda: load_rule("default")}


# The update.


def round_recurrent_state(reference: Any) -> None:
    """Hidden and cell state of an oracle, if it has them, as bfloat16 keeps them."""
    for name in {"hidden", "cell"} & vars(reference).keys():
        state = torch.as_tensor(getattr(reference, name))
        setattr(reference, name, state.float().bfloat16().double().numpy())


@each(ALL_RULES)
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "tolerance"),
    [
        # Relative to a tensor's largest change so far: it may come back to its start. float64: the oracle's 1 - b^t
        # loses three digits. float32: a parameter is up to 1000 times its first changes, and 30 recurrent steps add
        # their roundings. Seen: 2e-14 and 5e-6.
        pytest.param(torch.float64, None, 1e-12, id="float64"),
        pytest.param(torch.float32, torch.float32, 3e-5, id="float32"),
        # The oracle rounds hidden and cell state to the same 8 bits. Where rounding errors of float32 decide between
        # two of them, up to 0.4 % of one entry is left. Seen: 5e-6.
        pytest.param(torch.float32, torch.bfloat16, 2e-3, id="float32-recurrent-bfloat16"),
    ],
)
def test_thirty_steps_match_the_oracle(
    build: Build, dtype: torch.dtype, state_dtype: torch.dtype | None, tolerance: float
) -> None:
    net = Net().to(dtype)
    rule = build()
    optimizer = LearnedOptimizer(net.parameters(), rule, lr=0.7, weight_decay=10.0, state_dtype=state_dtype)
    parameters = list(net.parameters())
    before = [value.detach().double().clone() for value in parameters]
    expected = [value.numpy().copy() for value in before]
    references = [as_reference(optimizer.rule) for _ in parameters]
    largest = torch.zeros(len(parameters), dtype=torch.float64)
    for _ in range(30):
        train(net, optimizer, steps=1)
        for index, (value, reference) in enumerate(zip(parameters, references, strict=True)):
            assert value.grad is not None
            follows_lr = optimizer.rule.uses_conditions
            update = reference.step(value.grad.double().numpy(), *((0.0, 0.7) if follows_lr else ()))
            if state_dtype is torch.bfloat16:
                round_recurrent_state(reference)
            expected[index] = (1 - 0.7 * 1e-3 * 10.0) * expected[index] + (1.0 if follows_lr else 0.7) * update
        for index, (value, reached, start) in enumerate(zip(parameters, expected, before, strict=True)):
            change = torch.as_tensor(reached) - start
            largest[index] = max(largest[index], change.abs().max())
            error = (value.detach().double() - start - change).abs().max()
            comes_back = isinstance(rule, ScheduleFreeLSTM)  # to its start: then the change alone says little
            assert error <= tolerance * (largest[index] if comes_back else change.abs().max())


def test_default_rule_trains_out_of_the_box() -> None:
    net = Net()
    first = mean_square(net).item()
    train(net, LearnedOptimizer(net.parameters()), steps=200)
    # What any output cannot explain of random targets remains; half of the loss at a zero output is far from it.
    assert mean_square(net).item() < 0.5 * first


@each(ALL_RULES)
def test_learning_rate_zero_leaves_parameters_unchanged(build: Build) -> None:
    net = Net()
    before = [value.detach().clone() for value in net.parameters()]
    optimizer = LearnedOptimizer(net.parameters(), build(), lr=0.0, weight_decay=0.1)
    assert same(train(net, optimizer), before)
    assert optimizer.state[net.scale]["step"] == 0


@each(RANDOM_RULES)
def test_maximize_equals_minimising_the_negated_loss(build: Build) -> None:
    rule, net, mirror = build(), Net(), Net()
    ascended = train(net, LearnedOptimizer(net.parameters(), rule, weight_decay=0.01, maximize=True))
    descended = train(mirror, LearnedOptimizer(mirror.parameters(), rule, weight_decay=0.01), sign=-1.0)
    assert same(ascended, descended)


@each(ALL_RULES)
def test_optimizer_copies_its_rule(build: Build) -> None:
    rule = build().requires_grad_(True)
    with torch.no_grad():
        for name, value in rule.named_parameters():
            if name.startswith("output_"):
                value.fill_(0.1)  # else the copy would have nothing but zeros
    optimizer = LearnedOptimizer([parameter(1.0)], rule)
    assert all(value.requires_grad for value in rule.parameters())
    assert not any(value.requires_grad for value in optimizer.rule.parameters())
    with torch.no_grad():
        for value in rule.parameters():
            value.zero_()
    assert any(value.any() for value in optimizer.rule.parameters())


@each({name: build for name, build in ALL_RULES.items() if name != "lstm-l2l"})
def test_coordinate_with_zero_gradients_does_not_move(build: Build) -> None:
    embedding = nn.Embedding(6, 3)
    before = embedding.weight.detach().clone()
    optimizer = LearnedOptimizer(embedding.parameters(), build())
    for step in range(5):
        optimizer.zero_grad()
        embedding(torch.tensor([1, 4, step % 2])).square().sum().backward()
        optimizer.step()
    untouched = torch.tensor([2, 3, 5])
    assert torch.equal(embedding.weight[untouched], before[untouched])
    assert (embedding.weight[[0, 1, 4]] != before[[0, 1, 4]]).all()


def step_with_a_nan(nonfinite: str) -> nn.Parameter:
    values = parameter(1.0, 2.0, 3.0)
    optimizer = LearnedOptimizer([values], randomised(ScaleFreeLSTM()), nonfinite=nonfinite)
    values.grad = torch.tensor([1.0, math.nan, 1.0])
    optimizer.step()
    values.grad = torch.ones(3)
    optimizer.step()
    return values


def test_nan_gradient_keeps_parameter_and_state_finite() -> None:
    values = step_with_a_nan("skip")
    assert values.isfinite().all()
    assert values[1] != 2.0  # the second step moves it


def test_propagated_nan_stays_in_its_coordinate() -> None:
    assert step_with_a_nan("propagate").isnan().tolist() == [False, True, False]  # for good


@pytest.mark.parametrize("value", [math.nan, float("inf"), -float("inf")], ids=str)
def test_nonfinite_error_leaves_everything_unchanged(value: float) -> None:
    first, second, empty = parameter(1.0, 2.0), parameter(3.0), parameter()
    groups: list[dict[str, Any]] = [{"params": [first, empty], "nonfinite": "error"}, {"params": [second]}]
    optimizer = LearnedOptimizer(groups)
    first.grad, second.grad, empty.grad = torch.tensor([1.0, value]), torch.ones(1), torch.ones(0)
    with pytest.raises(RuntimeError, match="NaN or infinite, and nonfinite='error'; nothing was changed"):
        optimizer.step()
    assert first.tolist() == [1.0, 2.0]
    assert second.item() == 3.0
    assert not optimizer.state
    first.grad = torch.tensor([1.0, 3e38])  # the largest of finite numbers is one
    optimizer.step()
    assert optimizer.state[first]["step"] == 1


def test_global_random_state_is_unchanged() -> None:
    net = Net()
    before = torch.get_rng_state()
    train(net, LearnedOptimizer(net.parameters()))
    train(net, LearnedOptimizer(net.parameters(), ScaleFreeLSTM(), state_dtype=torch.float32))
    assert torch.equal(torch.get_rng_state(), before)


# Learning rate and groups.


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_tensor_learning_rate_matches_a_number(shape: tuple[int, ...]) -> None:
    net, other = Net(), Net()
    optimizer = LearnedOptimizer(net.parameters(), lr=0.5, weight_decay=0.01)
    tensor_lr = torch.full(shape, 0.5)
    other_optimizer = LearnedOptimizer(other.parameters(), lr=tensor_lr, weight_decay=0.01)
    train(net, optimizer)
    train(other, other_optimizer)
    optimizer.param_groups[0]["lr"] = 0.25
    tensor_lr.fill_(0.25)
    # Powers of two: the number's double precision and the tensor's single precision agree to a rounding.
    torch.testing.assert_close(train(net, optimizer), train(other, other_optimizer), rtol=1e-6, atol=1e-7)


def test_groups_keep_their_own_learning_rates() -> None:
    slow, fast = parameter(1.0, 1.0), parameter(1.0, 1.0)
    groups: list[dict[str, Any]] = [{"params": [slow], "lr": 0.25}, {"params": [fast]}]
    optimizer = LearnedOptimizer(groups, randomised(ScaleFreeLSTM()), lr=2.0)
    slow.grad = fast.grad = torch.tensor([0.3, -2.0])
    optimizer.step()
    torch.testing.assert_close(8 * (slow - 1), fast - 1, rtol=1e-4, atol=0.0)  # 1 + change keeps four digits of change
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 2.0]


def test_added_group_leaves_the_first_unchanged() -> None:
    first, second = parameter(1.0, 2.0), parameter(3.0)
    optimizer = LearnedOptimizer([first], lr=0.5)
    first.grad, second.grad = torch.ones(2), torch.ones(1)
    optimizer.step()
    optimizer.add_param_group({"params": second, "lr": 0.1})
    optimizer.step()
    assert second.item() != 3.0
    assert (optimizer.state[first]["step"], optimizer.state[second]["step"]) == (2, 1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]


@pytest.mark.parametrize(
    ("group", "error"),
    [
        pytest.param({"params": [parameter(1.0)], "lr": -1.0}, ValueError, id="lr"),
        pytest.param({"params": [parameter(1.0)], "weight_decay": -1.0}, ValueError, id="weight-decay"),
        pytest.param({"params": [NOWHERE], "fused": True}, RuntimeError, id="fused"),
        pytest.param({"params": [torch.ones(1, dtype=torch.complex64)]}, TypeError, id="complex"),
        pytest.param({"params": [parameter(1.0)], "lr": "fast"}, TypeError, id="lr-text"),
    ],
)
def test_refused_group_leaves_the_optimizer_unchanged(group: dict[str, Any], error: type[Exception]) -> None:
    first = parameter(1.0)
    optimizer = LearnedOptimizer([first])
    before = repr(optimizer)
    with pytest.raises(error):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert repr(optimizer) == before
    second = parameter(2.0)
    optimizer.add_param_group({"params": [second]})
    second.grad = torch.ones(1)
    optimizer.step()
    assert second.item() != 2.0


# Closures and gradients.


def test_closure_is_called_once_with_gradients_enabled() -> None:
    net = Net()
    optimizer = LearnedOptimizer(net.parameters())
    losses: list[float] = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = mean_square(net)
        loss.backward()
        losses.append(loss.item())
        return losses[-1]

    before = net.scale.item()
    returned: object = optimizer.step(closure)
    assert losses == [returned]
    assert net.scale.item() != before


def test_zero_grad_clears_gradients() -> None:
    net = Net()
    optimizer = LearnedOptimizer(net.parameters())
    mean_square(net).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(value.grad is not None and not value.grad.any() for value in net.parameters())
    optimizer.zero_grad()
    assert all(value.grad is None for value in net.parameters())


def test_overflow_under_grad_scaler_skips_the_step() -> None:
    net = Net()
    optimizer = LearnedOptimizer(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [value.detach().clone() for value in net.parameters()]
    scaler.scale(mean_square(net) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same(list(net.parameters()), before)
    assert not optimizer.state
    optimizer.zero_grad()
    scaler.scale(mean_square(net)).backward()
    scaler.step(optimizer)
    assert optimizer.state[net.scale]["step"] == 1


def test_grad_scaler_tensors_move_to_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several GPUs, the scaler's tensors are on one of them. Here "meta" stands for the other."""
    seen: list[tuple[str, ...]] = []

    def look(_: UpdateRule, slots: Sequence[Slot], settings: StepSettings) -> None:
        assert settings.found_inf is not None
        assert settings.grad_scale is not None
        tensors = slots[0].parameter, settings.found_inf, settings.grad_scale
        seen.append(tuple(tensor.device.type for tensor in tensors))

    monkeypatch.setattr("learned_optim.step.dispatch.apply_in_blocks", look)
    params = [nn.Parameter(torch.ones(2, device=device)) for device in ("cpu", "meta")]
    optimizer: Any = LearnedOptimizer(params, capturable=True, fused=False)
    for values in params:
        values.grad = torch.ones_like(values)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.ones(())
    optimizer.step()
    assert seen == [("cpu",) * 3, ("meta",) * 3]


# Schedulers.


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        pytest.param(lambda o: LambdaLR(o, lambda epoch: 0.5**epoch), [1.0, 0.5, 0.25, 0.125], id="lambda"),
        pytest.param(lambda o: CosineAnnealingLR(o, T_max=4), [1.0, 0.8536, 0.5, 0.1464], id="cosine"),
        # max_lr / 25 at first, max_lr after 30 % of 10 steps
        pytest.param(
            lambda o: OneCycleLR(o, max_lr=1.0, total_steps=10, cycle_momentum=False, anneal_strategy="linear"),
            [0.04, 0.52, 1.0, 0.8571],
            id="one-cycle",
        ),
    ],
)
def test_schedule_sets_the_size_of_moves(
    make: Callable[[LearnedOptimizer], LRScheduler], expected: list[float]
) -> None:
    # The untrained rule is Adam: a constant gradient moves by lr * rate at each step.
    values = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = LearnedOptimizer([values], ScaleFreeLSTM(rate=1.0))
    scheduler, moves = make(optimizer), []
    for _ in expected:
        before = values.item()
        values.grad = torch.ones_like(values)
        optimizer.step()
        scheduler.step()
        moves.append(before - values.item())
    assert moves == pytest.approx(expected, abs=1e-4)


def test_plateau_scheduler_lowers_a_tensor_learning_rate() -> None:
    optimizer = LearnedOptimizer([parameter(1.0)], lr=torch.tensor(1.0))
    scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    for loss in (1.0, 1.0, 1.0):
        scheduler.step(loss)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)
