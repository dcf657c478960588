"""Training, meta-training and loading are independent of the caller's default device and modes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from helpers.small_runs import configuration, metrics
from learned_optim import LearnedOptimizer
from learned_optim.checkpoint import available_rules, load_rule
from learned_optim.meta_train.benchmark.cache import problem_fingerprint
from learned_optim.meta_train.benchmark.evaluation import BASELINES, Problem
from learned_optim.meta_train.few_shot.model import FewShotModel
from learned_optim.meta_train.few_shot.settings import few_shot_config
from learned_optim.meta_train.few_shot.trainer import FewShotTrainer
from learned_optim.meta_train.tasks.quadratic import QuadraticFamily
from learned_optim.meta_train.trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def rule_run(folder: Path) -> Any:
    config = configuration(steps=4)
    next(Trainer(config, folder).run())
    for _ in Trainer.resume(folder).run():
        pass
    return metrics(folder)


def few_shot_run(folder: Path) -> Any:
    tables = {
        "task": {"family": "sinusoid", "shots": 4, "queries": 4, "hidden": [8]},
        "steps": 2,
        "episodes": 2,
        "validation": {"every": 2, "episodes": 2},
        "algorithm": {"name": "meta-lstm", "steps": 2},
    }
    for _ in FewShotTrainer(few_shot_config(tables), folder).run():
        pass
    weights = FewShotModel.load(folder / "best.safetensors").algorithm.state_dict()
    return metrics(folder), {name: tensor.tolist() for name, tensor in weights.items()}


def comparison(_: Path) -> Any:
    family = QuadraticFamily(dimensions=(3, 3))
    losses = Problem(family, 2, 4, seed=1).run(lambda parameters: BASELINES["Adam"](parameters, 0.1, 4))
    return losses.tolist(), problem_fingerprint(family, "test", 0)


@pytest.mark.parametrize("run", [rule_run, few_shot_run, comparison])
def test_run_is_independent_of_the_default_device(run: Callable[[Path], Any], tmp_path: Path) -> None:
    expected = run(tmp_path / "plain")
    with torch.device("meta"):
        assert run(tmp_path / "meta") == expected


@pytest.mark.parametrize("name", available_rules())
def test_rule_loads_its_values_under_any_default_device_or_fake_mode(name: str) -> None:
    expected = load_rule(name).state_dict()
    with FakeTensorMode():
        in_fake_mode = load_rule(name)
    with torch.device("meta"):
        on_meta_device = load_rule(name)
    for rule in (in_fake_mode, on_meta_device):
        loaded = rule.state_dict()
        assert loaded.keys() == expected.keys()
        assert all(type(tensor) is torch.Tensor for tensor in loaded.values())
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.items())


def test_state_loads_its_values_under_any_default_device() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    optimizer = LearnedOptimizer([parameter])
    optimizer.step()
    loaded = LearnedOptimizer([parameter])
    with torch.device("meta"):
        loaded.load_state_dict(optimizer.state_dict())
    expected = optimizer.state[parameter]
    assert loaded.state[parameter].keys() == expected.keys()
    assert all(torch.equal(tensor, expected[entry]) for entry, tensor in loaded.state[parameter].items())


@pytest.mark.parametrize("rule", ["default", "lstm-l2l-quadratic"])
@pytest.mark.parametrize("fused", [None, False])
def test_step_runs_in_fake_mode(rule: str, fused: bool | None) -> None:
    with FakeTensorMode():
        model = torch.nn.Linear(3, 2)
        optimizer = LearnedOptimizer(model.parameters(), rule, fused=fused)
        for _ in range(2):
            model(torch.ones(4, 3)).sum().backward()
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    assert {type(tensor) for state in optimizer.state.values() for tensor in state.values()} == {FakeTensor}
