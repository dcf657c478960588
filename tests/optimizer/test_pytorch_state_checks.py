"""PyTorch's own checks of states, copies and hooks of its optimizers (test/test_optim.py), named as there."""

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from helpers.pytorch_checks import CONFIGURATIONS, KINDS, UNRECORDED, Configuration, Problem, assert_equal, over

# PyTorch tests tiny rates.
pytestmark = pytest.mark.filterwarnings("ignore:lr=.* makes every learned step:UserWarning")


# Saving, loading, copying.


@over(CONFIGURATIONS)
def test_optimizer_can_be_printed(configuration: Configuration) -> None:
    text = repr(configuration.make(Problem().parameters))
    assert text.startswith(f"{configuration.kind.__name__} (\nParameter Group 0\n")
    assert all(f"{key}: " in text for key in configuration.options if key not in ("rule", "state_dtype"))


@over(CONFIGURATIONS)
def test_non_empty_state(configuration: Configuration) -> None:
    values = torch.ones(3)
    values.grad = torch.ones(3)
    optimizer = configuration.make([values])
    optimizer.step()
    assert [len(state) > 0 for state in optimizer.state.values()] == [True]


@over(CONFIGURATIONS)
def test_deepcopy_copies_all_public_attrs(configuration: Configuration) -> None:
    problem = Problem()
    optimizer = configuration.make(problem.parameters)
    if not configuration.options.get("differentiable"):
        problem.train(optimizer, 3)

    def public(thing: Optimizer) -> set[str]:
        return {name for name in vars(thing) if not name.startswith("_")}

    copied = copy.deepcopy(optimizer)
    assert public(copied) == public(optimizer)
    assert_equal(copied.state_dict(), optimizer.state_dict())


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


@pytest.mark.slow
@over(UNRECORDED)
@pytest.mark.parametrize(
    ("named", "then_named"), list(itertools.product([False, True], repeat=2)), ids=lambda on: "named" if on else "plain"
)
def test_state_dict_deterministic(configuration: Configuration, named: bool, then_named: bool) -> None:
    problem = Problem()
    optimizer = configuration.make(problem.named if named else problem.parameters)
    problem.train(optimizer, 10)
    other = problem.copy()
    continued = configuration.make(other.named if then_named else other.parameters)
    saved = copy.deepcopy(optimizer.state_dict())
    continued.load_state_dict(saved)
    assert_equal(saved, optimizer.state_dict())  # loading does not change what is loaded
    for _ in range(10):
        problem.train(optimizer, 1)
        other.train(continued, 1)
        assert_equal(problem.parameters, other.parameters)
    assert_equal(without_names(optimizer.state_dict()), without_names(continued.state_dict()))
    # test_can_load_from_to_named_state_dict: names stay known if one of the two knew them.
    names = continued.state_dict()["param_groups"][0].get("param_names")
    assert names == (["weight", "bias"] if named or then_named else None)
    # A parameter that occurs again is the same number again.
    continued.param_groups.extend(continued.param_groups)
    groups = continued.state_dict()["param_groups"]
    assert groups[0]["params"] == groups[1]["params"]


@over(UNRECORDED)
def test_can_load_older_state_dict(configuration: Configuration) -> None:
    problem = Problem()
    optimizer = configuration.make(problem.parameters)
    problem.train(optimizer, 3)
    older = copy.deepcopy(optimizer.state_dict())
    newer = {"foreach", "fused", "differentiable", "maximize", "capturable", "nonfinite", "decoupled_weight_decay"}
    for group in older["param_groups"]:
        for option in newer & group.keys():
            del group[option]
    optimizer.load_state_dict(older)
    problem.train(optimizer, 1)
    assert optimizer.state[problem.weight]["step"] == 4


@over(UNRECORDED)
@pytest.mark.parametrize("named", [False, True], ids=["plain", "named"])
def test_save_load_equality_with_weights_only(configuration: Configuration, named: bool) -> None:
    problem = Problem()
    optimizer = configuration.make(problem.named if named else problem.parameters)
    problem.train(optimizer, 3)
    for weights_only in (False, True):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        assert_equal(torch.load(file, weights_only=weights_only), optimizer.state_dict())


@over(UNRECORDED)
def test_load_nontensor_step(configuration: Configuration) -> None:
    problem, other = Problem(), Problem()
    optimizer, plain = configuration.make(problem.parameters), configuration.make(other.parameters)
    problem.train(optimizer, 3)
    other.train(plain, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    optimizer.load_state_dict(saved)
    problem.train(optimizer, 1)
    assert_equal(problem.parameters, other.parameters)


# Hooks.


@over(KINDS)
def test_state_dict_hooks(configuration: Configuration) -> None:
    def before(optimizer: Optimizer) -> None:
        optimizer.state["test"] = 1  # type: ignore[index]  # PyTorch's own check does so

    def after(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "seen": state_dict["state"].pop("test", None)}

    problem = Problem()
    optimizer = configuration.make(problem.parameters)
    handle = optimizer.register_state_dict_post_hook(after)
    assert optimizer.state_dict()["seen"] is None
    optimizer.register_state_dict_pre_hook(before)
    state_dict = optimizer.state_dict()
    assert state_dict["seen"] == 1
    assert "test" not in state_dict["state"]
    handle.remove()
    assert optimizer.state_dict()["state"]["test"] == 1
    configuration.make(problem.parameters).load_state_dict(optimizer.state_dict())  # does not fail over it


@over(KINDS)
def test_load_state_dict_hooks_and_prepend(configuration: Configuration) -> None:
    def in_place(_: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0]["lr"] = 0.002

    def by_copy(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(state_dict)
        changed["param_groups"][0]["lr"] = 0.003
        return changed

    rates: list[float] = []
    optimizer = configuration.make(Problem().parameters)
    optimizer.register_load_state_dict_post_hook(lambda loaded: rates.append(loaded.param_groups[0]["lr"]))
    state_dict = optimizer.state_dict()
    optimizer.load_state_dict(state_dict)
    optimizer.register_load_state_dict_pre_hook(in_place)
    optimizer.load_state_dict(state_dict)
    first = optimizer.register_load_state_dict_pre_hook(by_copy, prepend=True)
    optimizer.load_state_dict(state_dict)
    first.remove()
    optimizer.register_load_state_dict_pre_hook(by_copy)
    optimizer.load_state_dict(state_dict)
    assert rates == [configuration.rate, 0.002, 0.002, 0.003]


@over(KINDS)
def test_step_all_hooks(configuration: Configuration) -> None:
    calls: list[int] = []

    def note(number: int) -> Callable[..., None]:
        return lambda *_: calls.append(number)

    params = [torch.tensor([1.0, 1.0])]
    optimizers = [configuration.make(params), SGD(params)]
    handles = [register_optimizer_step_pre_hook(note(0)), register_optimizer_step_post_hook(note(5))]
    for optimizer in optimizers:
        handles += [optimizer.register_step_pre_hook(note(1)), optimizer.register_step_post_hook(note(2))]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
    assert calls == [0, 1, 2, 5] * 4
    for handle in handles:
        handle.remove()
    for optimizer in optimizers:
        optimizer.step()
    assert len(calls) == 16
