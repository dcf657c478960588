"""The state of LearnedOptimizer: saving, loading, copying and resuming."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from helpers.optimizers import RANDOM_RULES, Net, same, state_tensors, train
from helpers.rules import Build, each, randomised
from learned_optim import LearnedOptimizer
from learned_optim.rules import LSTML2L, ScaleFreeLSTM


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@each(RANDOM_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("carry", [lambda state_dict: state_dict, through_file], ids=["in-memory", "torch-save"])
def test_resume_from_a_state_dict_is_bit_exact(
    build: Build, dtype: torch.dtype, carry: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    rule, net, other = build(), Net().to(dtype), Net().to(dtype)
    optimizer = LearnedOptimizer(net.parameters(), rule, lr=0.5, weight_decay=0.01)
    train(net, optimizer)
    continued = LearnedOptimizer(other.parameters(), rule)
    other.load_state_dict(net.state_dict())
    continued.load_state_dict(carry(optimizer.state_dict()))

    def group(optimizer: LearnedOptimizer) -> dict[str, Any]:
        return {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}

    assert group(continued) == group(optimizer)
    assert same(state_tensors(continued), state_tensors(optimizer))  # dtypes too: the base class casts them
    assert same(train(other, continued), train(net, optimizer))
    assert same(state_tensors(continued), state_tensors(optimizer))


def test_loaded_state_is_independent_of_its_source() -> None:
    net, other = Net(), Net()
    optimizer, continued = LearnedOptimizer(net.parameters()), LearnedOptimizer(other.parameters())
    train(net, optimizer)
    continued.load_state_dict(optimizer.state_dict())
    before = [tensor.clone() for tensor in state_tensors(optimizer)]
    train(other, continued)
    assert same(state_tensors(optimizer), before)
    assert continued.state[other.scale]["step"] == 6


@pytest.mark.parametrize("steps", [0, 3], ids=["before-steps", "after-steps"])
@pytest.mark.parametrize(
    "carry", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copy_continues_identically(
    steps: int, carry: Callable[[tuple[Net, LearnedOptimizer]], tuple[Net, LearnedOptimizer]]
) -> None:
    net = Net().bfloat16()
    rule = randomised(ScaleFreeLSTM())
    optimizer = LearnedOptimizer(net.parameters(), rule, lr=0.5, state_dtype=torch.float16)
    train(net, optimizer, steps)
    other, copied = carry((net, optimizer))
    assert same(train(other, copied), train(net, optimizer))
    assert same(state_tensors(copied), state_tensors(optimizer))
    assert copied.state[other.scale]["hidden"].dtype == torch.float16
    assert copied.state.keys().isdisjoint(optimizer.state)
    assert repr(copied) == repr(optimizer)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        pytest.param(lambda p: LearnedOptimizer(p, LSTML2L()), "saved with another rule", id="another-rule"),
        pytest.param(lambda p: LearnedOptimizer(p, ScaleFreeLSTM(4)), "saved with another rule", id="another-size"),
        pytest.param(lambda p: torch.optim.Adam(p), "saved with another rule", id="adam"),
        pytest.param(lambda p: torch.optim.SGD(p, momentum=0.9), "saved with another rule", id="sgd"),
        pytest.param(lambda p: LearnedOptimizer(reversed(list(p))), "saved for other parameters", id="another-order"),
        pytest.param(
            lambda p: LearnedOptimizer([{"params": [value]} for value in p]),
            "different number of parameter groups",
            id="other-groups",
        ),
    ],
)
def test_foreign_state_is_refused(
    other: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer], message: str
) -> None:
    net, theirs = Net(), Net()
    optimizer, foreign = LearnedOptimizer(net.parameters(), lr=0.5), other(theirs.parameters())
    train(net, optimizer)
    train(theirs, foreign)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign.state_dict())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert same(state_tensors(optimizer), [tensor for state in before["state"].values() for tensor in state.values()])
    optimizer.load_state_dict(before)


@pytest.mark.parametrize("saved", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)
def test_loaded_state_is_cast_to_its_dtype(
    saved: torch.dtype, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    net, other = Net().to(dtype), Net().to(dtype)
    optimizer = LearnedOptimizer(net.parameters(), state_dtype=state_dtype)
    continued = LearnedOptimizer(other.parameters(), state_dtype=state_dtype)
    train(net, optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state.update({entry: value.to(saved) for entry, value in state.items()})
    other.load_state_dict(net.state_dict())
    continued.load_state_dict(state_dict)
    assert [t.dtype for t in state_tensors(continued)] == [t.dtype for t in state_tensors(optimizer)]
    # Rounding to 8 bits changes moments by 2^-9, and a step of up to 0.01 by little more.
    for one, another in zip(train(other, continued), train(net, optimizer), strict=True):
        torch.testing.assert_close(one, another, rtol=2.0**-7, atol=2e-4)


def test_loaded_step_count_and_scale_become_float32_scalars() -> None:
    net, other = Net(), Net()
    optimizer, continued = LearnedOptimizer(net.parameters()), LearnedOptimizer(other.parameters())
    train(net, optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"], state["scale"] = int(state["step"]), state["scale"].double()[None]
    continued.load_state_dict(state_dict)
    assert same(state_tensors(continued), state_tensors(optimizer))


@pytest.mark.parametrize(
    ("entry", "value"),
    [("step", "3"), ("step", torch.ones(2)), ("momentum", [1.0]), ("momentum", torch.ones(2, 4, 3) * 1j)],
    ids=["text", "two-counts", "list", "complex"],
)
def test_invalid_state_entry_is_refused(entry: str, value: Any) -> None:
    net = Net()
    optimizer = LearnedOptimizer(net.parameters())
    train(net, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    state_dict = copy.deepcopy(before)
    state_dict["state"][0][entry] = value
    with pytest.raises(ValueError, match=r"must be a real tensor|was saved with another rule"):
        optimizer.load_state_dict(state_dict)
    assert same(state_tensors(optimizer), [tensor for state in before["state"].values() for tensor in state.values()])


def test_entries_of_no_parameter_are_kept() -> None:
    net, other = Net(), Net()
    optimizer, continued = LearnedOptimizer(net.parameters()), LearnedOptimizer(other.parameters())
    others: Any = optimizer.state
    others.update(global_step={"count": 3}, rounds=5)  # as wrappers of optimizers do
    train(net, optimizer)
    other.load_state_dict(net.state_dict())
    continued.load_state_dict(optimizer.state_dict())
    for copied in (continued, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert {key: value for key, value in copied.state.items() if isinstance(key, str)} == {
            "global_step": {"count": 3},
            "rounds": 5,
        }
    assert same(train(other, continued), train(net, optimizer))


def test_user_entries_before_the_first_step_are_kept() -> None:
    net = Net()
    optimizer = LearnedOptimizer(net.parameters())
    for value in net.parameters():
        optimizer.state[value]["slow"] = value.detach().clone()  # as Lookahead does
    train(net, optimizer)
    assert all({"slow", "step", "momentum"} <= state.keys() for state in optimizer.state.values())


def test_groups_filled_by_another_optimizer_are_accepted() -> None:
    net = Net()
    groups: list[dict[str, Any]] = [{"params": list(net.parameters()), "weight_decay": 0.1}]
    torch.optim.Adam(groups)  # writes its own options into them, decoupled_weight_decay=False among them
    optimizer = LearnedOptimizer([{**groups[0], "lr": 1.0}])
    train(net, optimizer)
    assert optimizer.param_groups[0]["decoupled_weight_decay"]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_weight_decay_of_an_older_version_is_converted() -> None:
    # There a step shrank by lr * weight_decay; torch.optim.AdamW's groups have decoupled_weight_decay, ours had not.
    net = Net()
    optimizer = LearnedOptimizer(net.parameters(), weight_decay=0.1)
    train(net, optimizer)
    older = copy.deepcopy(optimizer.state_dict())
    for group in older["param_groups"]:
        del group["decoupled_weight_decay"]
        group["weight_decay"] = 1e-4
    optimizer.load_state_dict(older)
    pickled = copy.deepcopy(optimizer.__getstate__())
    for group in (pickled["defaults"], *pickled["param_groups"]):
        del group["decoupled_weight_decay"]
        group["weight_decay"] = 1e-4
    unpickled = LearnedOptimizer.__new__(LearnedOptimizer)
    unpickled.__setstate__(pickled)
    for loaded in (optimizer, unpickled):
        assert [group["weight_decay"] for group in loaded.param_groups] == [pytest.approx(0.1)]
    assert unpickled.defaults["weight_decay"] == pytest.approx(0.1)


def test_state_dict_from_before_the_first_step_is_accepted() -> None:
    net = Net()
    optimizer = LearnedOptimizer(net.parameters())
    assert optimizer.state[net.scale] == {}  # looking at it creates an empty entry
    continued = LearnedOptimizer(net.parameters())
    continued.load_state_dict(optimizer.state_dict())
    train(net, continued)
    assert continued.state[net.scale]["step"] == 3


def test_load_state_dict_hooks_are_called() -> None:
    net = Net().bfloat16()
    optimizer = LearnedOptimizer(net.parameters())
    train(net, optimizer)
    seen: list[torch.dtype] = []

    def replace(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(state_dict)
        for state in changed["state"].values():
            state["momentum"].fill_(7.0)
        return changed

    def look(loaded: torch.optim.Optimizer) -> None:
        seen.append(loaded.state[net.scale]["momentum"].dtype)

    continued = LearnedOptimizer(net.parameters())
    continued.register_load_state_dict_pre_hook(replace)
    continued.register_load_state_dict_post_hook(look)
    continued.load_state_dict(optimizer.state_dict())
    assert (continued.state[net.scale]["momentum"] == 7.0).all()
    assert seen == [torch.float32]


def test_loaded_state_dict_is_freed() -> None:
    net = Net()
    optimizer = LearnedOptimizer(net.parameters())
    train(net, optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    momentum = weakref.ref(state_dict["state"][0]["momentum"])
    optimizer.load_state_dict(state_dict)
    del state_dict
    gc.collect()
    assert momentum() is None


@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}], ids=str)
def test_distributed_state_dict_restores_the_state(options: dict[str, bool]) -> None:
    net, other = Net(), Net()
    optimizer, continued = LearnedOptimizer(net.parameters()), LearnedOptimizer(other.parameters())
    train(net, optimizer)
    other.load_state_dict(net.state_dict())
    how = StateDictOptions(**options)  # type: ignore[arg-type]  # the one field that is no bool is not set
    saved = get_optimizer_state_dict(net, optimizer, options=how)
    # Creates the missing state by a step with lr = 0 and zero gradients before it loads.
    set_optimizer_state_dict(other, continued, saved, options=how)
    assert same(state_tensors(continued), state_tensors(optimizer))
    assert same(list(other.parameters()), list(net.parameters()))
    assert same(train(other, continued), train(net, optimizer))


def test_missing_state_entry_is_named() -> None:
    parameter = nn.Parameter(torch.randn(3, 2))
    parameter.grad = torch.randn(3, 2)
    optimizer = LearnedOptimizer([parameter])
    optimizer.step()
    del optimizer.state[parameter]["log_rate"]
    with pytest.raises(RuntimeError, match=r"shape \(3, 2\) has lost its entry 'log_rate'; start the parameter anew"):
        optimizer.step()
    optimizer.state.pop(parameter)
    optimizer.step()
