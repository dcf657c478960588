"""Tensors that are no dense memory are stepped by the values that torch reads, or refused, and never crash."""

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from helpers.odd_tensors import GRADIENTS, LAYOUTS, REPLACEMENTS, made, negated
from helpers.paths import ROOT
from learned_optim import LearnedOptimizer

either_path = pytest.mark.parametrize("fused", [True, False], ids=["kernel", "plain"])


def one_step(parameter: Tensor, grad: Tensor, fused: bool) -> Tensor:
    parameter.requires_grad_(False)
    parameter.grad = grad
    LearnedOptimizer([parameter], fused=fused, weight_decay=10.0).step()
    return torch.empty(parameter.shape).copy_(parameter)


@either_path
@pytest.mark.parametrize("layout", sorted(GRADIENTS))
def test_odd_gradient_steps_as_a_dense_copy(layout: str, fused: bool) -> None:
    grad = made(layout, (3, 4), seed=1)
    expected = one_step(nn.Parameter(torch.ones(3, 4)), torch.zeros(3, 4).copy_(grad), fused=False)
    moved = one_step(nn.Parameter(torch.ones(3, 4)), grad, fused)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)  # steps are of 1e-3


@either_path
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_odd_parameter_steps_as_a_dense_copy(layout: str, fused: bool) -> None:
    values, grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(3, 4)
    expected = one_step(nn.Parameter(values.clone()), grad, fused=False)
    moved = one_step(nn.Parameter(LAYOUTS[layout](values)), grad, fused)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)


def test_lazily_negated_gradient_is_resolved() -> None:
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = negated(torch.tensor([-1.0]))
    assert parameter.grad.is_neg()
    LearnedOptimizer([parameter]).step()
    assert parameter.item() > 1.0


def stepped() -> tuple[nn.Parameter, LearnedOptimizer]:
    parameter = nn.Parameter(torch.ones(6, 4))
    parameter.grad = torch.ones(6, 4)
    optimizer = LearnedOptimizer([parameter], "specialised-mnist")
    optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize("shape", [(60, 4), (3, 4), (4, 6), (24,)], ids=str)
def test_replaced_parameter_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    parameter, optimizer = stepped()
    parameter.data = torch.ones(shape)
    parameter.grad = torch.ones(shape)
    with pytest.raises(RuntimeError, match=r"the parameter's data were replaced\. Construct the optimizer after that"):
        optimizer.step()
    assert torch.equal(parameter, torch.ones(shape))
    del optimizer.state[parameter]  # as the error says
    optimizer.step()
    assert (parameter < 1).all()


def test_gradient_of_another_shape_is_refused() -> None:
    parameter, optimizer = stepped()
    parameter.data = torch.ones(60, 4)
    optimizer.state.clear()
    with pytest.raises(RuntimeError, match=r"its gradient is for \(6, 4\)"):
        optimizer.step()


@pytest.mark.parametrize("entry", ["momentum", "hidden", "log_rate"])
@pytest.mark.parametrize("replacement", ["shorter", "longer", "fewer features", "empty", "elsewhere"])
def test_state_of_another_shape_is_refused(entry: str, replacement: str) -> None:
    parameter, optimizer = stepped()
    state = optimizer.state[parameter]
    state[entry] = REPLACEMENTS[replacement](state[entry])
    if state[entry].shape == (1, 6, 4):
        pytest.skip("has one feature")
    with pytest.raises(RuntimeError, match="shape"):
        optimizer.step()


@pytest.mark.parametrize("cast", [Tensor.half, Tensor.bfloat16, Tensor.double], ids=["half", "bfloat16", "double"])
def test_cast_state_takes_the_same_steps(cast: Callable[[Tensor], Tensor]) -> None:
    parameter, optimizer = stepped()
    other, reference = copy.deepcopy((parameter, optimizer))
    optimizer.state[parameter] = {entry: cast(value) for entry, value in optimizer.state[parameter].items()}
    for tensor, stepping in ((parameter, optimizer), (other, reference)):
        tensor.grad = torch.ones(6, 4)
        for _ in range(2):
            stepping.step()
    # Moments of half precision: errors of 2^-8 in a step of 1e-3.
    torch.testing.assert_close(parameter, other, rtol=0.0, atol=1e-4)
    assert (parameter < 1 - 1e-3).all()


def test_freed_parameter_memory_is_refused() -> None:
    parameter, optimizer = stepped()
    parameter.untyped_storage().resize_(0)  # as sharding does between steps
    with pytest.raises(RuntimeError, match="the memory of a parameter"):
        optimizer.step()


@pytest.mark.slow
def test_odd_tensors_and_states_never_crash_the_process() -> None:
    program = ROOT / "tests" / "helpers" / "odd_tensors.py"
    command = [sys.executable, "-X", "faulthandler", str(program)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-5000:]
    assert run.stdout == "stepped\n"
