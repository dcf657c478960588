"""The optimizer's share of a user's training step, and the steps that a rule must save."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.benchmarks import timing
from learned_optim import LearnedOptimizer
from learned_optim.meta_train.benchmark import optimizer_share
from learned_optim.meta_train.benchmark.optimizer_share import FUSED, RULE, Shares, measure_shares
from learned_optim.meta_train.benchmark.timing import Timing
from learned_optim.meta_train.common.strict import ConfigError
from learned_optim.meta_train.tasks import Task

FILE = """
import torch
def build():
    return torch.nn.Linear(3, 2)
def batch(generator):
    return torch.randn(4, 3, generator=generator)
def loss(model, batch):
    return model(batch).square().mean()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def shares(rule: float, adam: float) -> Shares:
    return Shares("mine.py:build", 8, "cpu", 1, {RULE: timing(rule), "Adam": timing(adam)})


def test_break_even_is_the_share_of_steps_that_cost_the_difference() -> None:
    found = shares(rule=0.005, adam=0.004)
    assert found.break_even("Adam") == pytest.approx(0.2)
    assert (1 - found.break_even("Adam")) * 100 * 0.005 == pytest.approx(100 * 0.004)
    assert "beside Adam: the default rule pays in seconds if it needs at least 20.0% fewer steps" in str(found)
    assert "every step that it saves pays" in str(shares(rule=0.004, adam=0.004))


def test_table_and_document_have_the_measured_milliseconds() -> None:
    found = shares(rule=0.008, adam=0.004)
    row = next(line for line in str(found).splitlines() if line.startswith(RULE))
    assert row.removeprefix(RULE).split() == ["2", "8", "25.0%"]
    document = json.loads(json.dumps(found.as_dict()))
    assert document["optimizers"][RULE] == {"optimizer_ms": 2.0, "step_ms": 8.0, "share": 0.25}
    assert document["steps_to_save"] == {"Adam": 0.5}


def test_default_rule_and_both_adams_are_timed_on_the_users_module(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    def recorded(task: Task, makers: Mapping[str, Callable[[nn.Module], Any]], device: object) -> dict[str, Timing]:
        made.update({name: make(task.module()) for name, make in makers.items()})
        return {name: timing(0.1) for name in makers}

    monkeypatch.setattr(optimizer_share, "time_steps", recorded)
    found = measure_shares(f"{file}:build")
    assert found.parameters == 8
    assert list(made) == [RULE, "Adam", FUSED]
    assert isinstance(made[RULE], LearnedOptimizer)
    assert [made[name].defaults["fused"] for name in ("Adam", FUSED)] == [None, True]


def test_fused_adam_is_left_out_where_pytorch_has_none(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adam = torch.optim.Adam

    def without(parameters: Any, lr: float, fused: bool | None) -> Any:
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")
        return adam(parameters, lr=lr)

    monkeypatch.setattr(optimizer_share, "Adam", without)
    monkeypatch.setattr("learned_optim.meta_train.benchmark.timing.SECONDS_A_ROUND", 0.001)
    assert list(measure_shares(f"{file}:build").timings) == [RULE, "Adam"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def build", "def other", "defines no 'build'"),
        ("def loss", "def lose", r"must define a function loss\(model, batch\)"),
        ("Linear(3, 2)", "Identity()", "the module has no parameters to train"),
        ("Linear(3, 2)", "Linear(4, 2)", "a training step fails: RuntimeError: .* shapes"),
        (".mean()", "", "a training step fails: RuntimeError: grad can be implicitly created only for scalar"),
        ("return torch.nn.Linear(3, 2)", "return nothing", "the model cannot be built: NameError"),
    ],
    ids=["name", "loss", "parameters", "shapes", "scalar", "build"],
)
def test_file_that_cannot_be_trained_is_explained(old: str, new: str, message: str, file: Path) -> None:
    file.write_text(FILE.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        measure_shares(f"{file}:build")
