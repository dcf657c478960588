"""LearnedOptimizer on parameters of every kind: dtypes, layouts, missing and late gradients, memory."""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.optimizers import Net, mean_square, parameter, same, state_tensors, train
from helpers.rules import as_reference, normal, randomised
from learned_optim import LearnedOptimizer
from learned_optim.rules import ScaleFreeLSTM


@pytest.mark.parametrize(
    ("dtype", "moments", "recurrent"),
    [
        pytest.param(torch.float32, torch.float32, torch.bfloat16, id="float32"),
        pytest.param(torch.bfloat16, torch.float32, torch.bfloat16, id="bfloat16"),
        pytest.param(torch.float16, torch.float32, torch.bfloat16, id="float16"),
        pytest.param(torch.float64, torch.float64, torch.float64, id="float64"),
    ],
)
def test_state_has_its_documented_dtypes(dtype: torch.dtype, moments: torch.dtype, recurrent: torch.dtype) -> None:
    net = Net().to(dtype)
    optimizer = LearnedOptimizer(net.parameters())
    before = [value.detach().clone() for value in net.parameters()]
    after = train(net, optimizer, steps=12)  # single digits of 8 bits may come back to where they were
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    for value, state in optimizer.state.items():
        assert value.dtype == dtype
        rule = optimizer.rule
        kept = {entry: tensor.dtype for entry, tensor in state.items() if entry not in ("step", "scale")}
        assert kept == {entry: recurrent if entry in rule.recurrent_state else moments for entry in rule.state_features}
        assert all(state[entry].shape[1:] == value.shape for entry in rule.state_features)
        assert state["scale"].dtype == state["step"].dtype == torch.float32


def test_mixed_dtypes_and_shapes_step_as_alone() -> None:
    def make() -> list[nn.Parameter]:
        tensors = [normal(4, 3), normal(2), normal(2).bfloat16(), normal(3, 5).float().t(), normal(0, 2), normal()]
        return [nn.Parameter(tensor) for tensor in tensors]

    def run(groups: list[list[nn.Parameter]]) -> None:
        optimizers = [LearnedOptimizer(group, randomised(ScaleFreeLSTM())) for group in groups]
        for step in range(3):
            for group, optimizer in zip(groups, optimizers, strict=True):
                for value in group:
                    value.grad = normal(*value.shape, seed=step).to(value.dtype)
                optimizer.step()

    together, alone = make(), make()
    run([together])
    run([[value] for value in alone])
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)


def test_channels_last_parameter_keeps_layout_and_updates() -> None:
    plain, last = nn.Conv2d(3, 4, 2), nn.Conv2d(3, 4, 2)
    last.load_state_dict(plain.state_dict())
    last.weight.data = last.weight.data.to(memory_format=torch.channels_last)
    pointer = last.weight.data_ptr()
    for layer in (plain, last):
        optimizer = LearnedOptimizer(layer.parameters(), randomised(ScaleFreeLSTM()))
        for _ in range(3):
            optimizer.zero_grad()
            layer(normal(2, 3, 5, 5).float()).square().sum().backward()
            optimizer.step()
    assert last.weight.data_ptr() == pointer
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    # The convolution's own gradients differ in their last bits; a lost or misplaced update would be of order 1e-2.
    torch.testing.assert_close(last.weight, plain.weight, rtol=0.0, atol=1e-4)


def test_parameter_without_gradient_is_unchanged() -> None:
    values, frozen = parameter(1.0, 2.0), parameter(3.0)
    optimizer = LearnedOptimizer([values, frozen])
    values.grad = torch.ones(2)
    optimizer.step()
    assert frozen.item() == 3.0
    assert frozen not in optimizer.state
    before = copy.deepcopy(optimizer.state[values])
    stepped = values.detach().clone()
    values.grad, frozen.grad = None, torch.ones(1)
    optimizer.step()
    assert torch.equal(values, stepped)
    assert all(torch.equal(tensor, before[entry]) for entry, tensor in optimizer.state[values].items())
    assert optimizer.state[frozen]["step"] == 1


def test_late_parameter_has_its_own_step_count() -> None:
    early, late = nn.Parameter(normal(3)), nn.Parameter(normal(2))
    optimizer = LearnedOptimizer([early, late], randomised(ScaleFreeLSTM()))
    references = {early: as_reference(optimizer.rule), late: as_reference(optimizer.rule)}
    for step in range(6):
        for index, (value, reference) in enumerate(references.items()):
            if value is late and step < 3:
                continue
            before = value.detach().clone()
            value.grad = normal(*value.shape, seed=10 * step + index)
            expected = before + torch.as_tensor(reference.step(value.grad.numpy()))
            optimizer.step()
            value.grad = None
            torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=1e-12)
    assert (optimizer.state[early]["step"], optimizer.state[late]["step"]) == (6, 3)


def test_step_leaves_gradients_unchanged() -> None:
    net = Net()
    optimizer = LearnedOptimizer(net.parameters(), lr=0.5, weight_decay=0.1, maximize=True)
    mean_square(net).backward()
    grads = [value.grad for value in net.parameters() if value.grad is not None]
    before = [(grad.clone(), grad._version) for grad in grads]
    optimizer.step()
    for value, grad, (old, version) in zip(net.parameters(), grads, before, strict=True):
        assert value.grad is grad
        assert torch.equal(grad, old)
        assert grad._version == version


@pytest.mark.slow
def test_later_steps_allocate_no_lasting_memory() -> None:
    def pointers() -> dict[tuple[int, str], int]:
        return {(id(v), entry): t.data_ptr() for v, state in optimizer.state.items() for entry, t in state.items()}

    def tensors_alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    net = Net()
    optimizer = LearnedOptimizer(net.parameters())
    train(net, optimizer, steps=1)
    before, alive = pointers(), tensors_alive()
    for _ in range(3):
        optimizer.step()
    assert pointers() == before
    assert tensors_alive() <= alive


def test_exchanged_parameters_start_with_fresh_state() -> None:
    first, second = parameter(1.0, 2.0), parameter(1.0, 2.0, 3.0)
    optimizer = LearnedOptimizer([first])
    first.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[0]["params"] = [second]  # as Accelerate does
    second.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[second]["step"] == 1
    assert (second != torch.tensor([1.0, 2.0, 3.0])).all()


@contextmanager
def default_dtype_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", [lambda: torch.device("meta"), default_dtype_float64], ids=["device", "dtype"])
def test_state_is_independent_of_torchs_defaults(default: Callable[[], Any]) -> None:
    def run() -> tuple[Tensor, list[Tensor]]:
        values = nn.Parameter(torch.ones(3, device="cpu", dtype=torch.float32))
        values.grad = torch.ones_like(values)
        optimizer = LearnedOptimizer([values])
        optimizer.step()
        return values.detach(), state_tensors(optimizer)

    expected, expected_state = run()
    with default():
        actual, state = run()
    assert torch.equal(actual, expected)
    assert same(state, expected_state)
