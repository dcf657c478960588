"""LearnedOptimizer as a torch.optim.Optimizer: arguments and errors, warnings, repr, names, hooks, the profiler."""

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from helpers.optimizers import NOWHERE, Net, parameter, train
from learned_optim import LearnedOptimizer
from learned_optim.rules import ScaleFreeLSTM

# Errors.


def sparse_gradient() -> None:
    embedding, values = nn.Embedding(3, 2, sparse=True), parameter(1.0)
    groups: list[dict[str, Any]] = [{"params": [values]}, {"params": embedding.parameters()}]
    optimizer = LearnedOptimizer(groups)
    (embedding(torch.tensor([1])).sum() * values).sum().backward()
    try:
        optimizer.step()
    finally:  # a refused step is no half step
        assert values.item() == 1.0
        assert not optimizer.state


def construct(parameters: Any, *arguments: Any, **options: Any) -> Callable[[], object]:
    return lambda: LearnedOptimizer(parameters, *arguments, **options)


VALUES = [parameter(1.0, 2.0)]
COMPLEX, INTEGER = torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(construct(VALUES, lr=-0.1), ValueError, "Invalid learning rate: -0.1", id="lr"),
        pytest.param(construct(VALUES, lr=float("inf")), ValueError, "Invalid learning rate: inf", id="lr-infinite"),
        pytest.param(construct(VALUES, lr="1"), TypeError, "lr must be a number .* got '1'", id="lr-text"),
        pytest.param(construct(VALUES, lr=None), TypeError, "lr must be a number .* got None", id="lr-none"),
        pytest.param(
            construct(VALUES, weight_decay="0.1"), TypeError, "weight_decay must be a number", id="decay-text"
        ),
        pytest.param(construct(VALUES, weight_decay=True), TypeError, "weight_decay must be a number", id="decay-bool"),
        pytest.param(
            construct(VALUES, averaging="no"), TypeError, "averaging must be True or False", id="averaging-text"
        ),
        pytest.param(
            construct(VALUES, averaging=None), TypeError, "averaging must be True or False", id="averaging-none"
        ),
        pytest.param(construct(VALUES, maximize="x"), TypeError, "maximize must be True or False", id="maximize-text"),
        pytest.param(
            construct(VALUES, capturable=1), TypeError, "capturable must be True or False", id="capturable-int"
        ),
        pytest.param(construct(VALUES, fused="yes"), TypeError, "fused must be True, False or None", id="fused-text"),
        pytest.param(construct(VALUES, lr=math.nan), ValueError, "Invalid learning rate: nan", id="lr-nan"),
        pytest.param(construct(VALUES, lr=torch.tensor(-1.0)), ValueError, "Invalid learning rate", id="lr-tensor"),
        pytest.param(construct(VALUES, lr=torch.ones(2)), ValueError, "Tensor lr must be 1-element", id="lr-elements"),
        pytest.param(construct(VALUES, weight_decay=-1), ValueError, "Invalid weight_decay value: -1", id="decay"),
        pytest.param(
            construct(VALUES, weight_decay=math.nan), ValueError, "Invalid weight_decay value: nan", id="decay-nan"
        ),
        pytest.param(construct([]), ValueError, "empty parameter list", id="no-parameters"),
        pytest.param(construct(VALUES[0]), TypeError, "an iterable of Tensors or dicts", id="bare-tensor"),
        pytest.param(
            construct([COMPLEX]), TypeError, "real floating-point .* got one of torch.complex64", id="complex"
        ),
        pytest.param(construct([INTEGER]), TypeError, "real floating-point .* got one of torch.int64", id="integer"),
        pytest.param(sparse_gradient, RuntimeError, "does not support sparse gradients; use sparse=False", id="sparse"),
        pytest.param(
            construct([NOWHERE], fused=True),
            RuntimeError,
            "fused=True cannot be had: .*need a GPU or a CPU.*; use fused=None",
            id="fused",
        ),
        pytest.param(
            construct(VALUES, nonfinite="ignore"), ValueError, "nonfinite must be one of .*'skip'", id="nonfinite"
        ),
        pytest.param(
            construct(VALUES, state_dtype=torch.int8),
            ValueError,
            "one of .*bfloat16.*, got torch.int8",
            id="state-dtype",
        ),
        pytest.param(construct(VALUES, "adam"), ValueError, "unknown rule 'adam'; known names: .*default", id="name"),
        pytest.param(construct(VALUES, "runs/x.safetensors"), FileNotFoundError, "no rule file at", id="path"),
        pytest.param(
            construct(VALUES, ScaleFreeLSTM),
            TypeError,
            "an instance of an UpdateRule, got <class",
            id="rule-class",
        ),
        pytest.param(construct(VALUES, betas=(0.9, 0.99)), TypeError, "betas", id="unknown-option"),
        pytest.param(
            construct([{"params": VALUES}, {"params": VALUES}]), ValueError, "more than one parameter group", id="twice"
        ),
        pytest.param(construct([VALUES[0] * 2]), ValueError, "non-leaf", id="non-leaf"),
    ],
)
def test_invalid_argument_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_graph_capture_without_capturable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = LearnedOptimizer([parameter(1.0)])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"CUDA graph, use LearnedOptimizer\(.*capturable=True"):
        optimizer.step()


# What the base class promises.


def test_duplicate_parameter_warns() -> None:
    values = parameter(1.0)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = LearnedOptimizer([values, values])
    values.grad = torch.ones(1)
    optimizer.step()
    assert optimizer.state[values]["step"] == 2  # as with torch.optim's for-loops


def test_repr_shows_every_option() -> None:
    text = repr(LearnedOptimizer([parameter(1.0)], lr=0.5, weight_decay=0.01))
    assert re.sub(r"\s+", " ", text) == (
        "LearnedOptimizer ( Parameter Group 0 averaging: True capturable: False decoupled_weight_decay: True "
        "differentiable: False fused: None lr: 0.5 maximize: False nonfinite: skip total_steps: None "
        "weight_decay: 0.01 )"
    )


def test_parameter_names_are_kept() -> None:
    net = Net()
    names = [name for name, _ in net.named_parameters()]
    optimizer = LearnedOptimizer(net.named_parameters())
    train(net, optimizer)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


def test_step_hooks_are_called_until_removed() -> None:
    values = parameter(1.0)
    optimizer = LearnedOptimizer([values])
    values.grad = torch.ones(1)
    seen: list[float] = []
    before = optimizer.register_step_pre_hook(lambda *_: seen.append(values.item()))
    after = optimizer.register_step_post_hook(lambda *_: seen.append(values.item()))
    optimizer.step()
    assert seen == [1.0, values.item()]
    before.remove()
    after.remove()
    optimizer.step()
    assert len(seen) == 2


def test_profiler_records_step_and_zero_grad() -> None:
    values = parameter(1.0)
    optimizer = LearnedOptimizer([values])
    values.grad = torch.ones(1)
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.function_events or []]
    assert names.count("Optimizer.step#LearnedOptimizer.step") == 1
    assert names.count("Optimizer.zero_grad#LearnedOptimizer.zero_grad") == 1


def test_learning_rate_of_another_optimizer_warns() -> None:
    with pytest.warns(UserWarning, match=r"lr=0.001 makes every learned step 1,000 times smaller.*leave lr out"):
        LearnedOptimizer([parameter(1.0)], lr=1e-3)
    with pytest.raises(TypeError, match=r"got 0\.001; there is no learning rate to tune, leave it out"):
        LearnedOptimizer([parameter(1.0)], 1e-3)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LearnedOptimizer([parameter(1.0)], lr=0.0)
        LearnedOptimizer([parameter(1.0)], lr=0.1)
        LearnedOptimizer([parameter(1.0)], lr=torch.tensor(1e-3))  # a tensor is meant to be changed


def test_user_entries_in_the_state_are_loaded() -> None:
    def stepped() -> tuple[LearnedOptimizer, torch.nn.Parameter]:
        values = parameter(1.0, 2.0)
        values.grad = torch.ones(2)
        optimizer = LearnedOptimizer([values])
        optimizer.step()
        return optimizer, values

    optimizer, values = stepped()
    optimizer.state[values]["my_entry"] = torch.tensor([7.0])
    other, other_values = stepped()
    other.load_state_dict(optimizer.state_dict())
    assert other.state[other_values]["my_entry"].tolist() == [7.0]
