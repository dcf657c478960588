"""A user's own model from a Python file: classes of three kinds and functions train, and what is missing is named."""

import sys
from pathlib import Path

import numpy as np
import pytest

from learned_optim.meta_train.benchmark.evaluation import BASELINES, Problem
from learned_optim.meta_train.common.strict import ConfigError
from learned_optim.meta_train.tasks import TaskFamily
from learned_optim.meta_train.tasks.lookup import build_family

FILE = """
from dataclasses import dataclass

import torch
from torch import nn

from learned_optim.meta_train.tasks import Task, TaskFamily
from neighbour import SIZE


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(SIZE, 1)

    def forward(self, inputs):
        return self.layer(inputs)


def batch(generator):
    inputs = torch.randn(16, SIZE, generator=generator)
    return {"inputs": inputs, "targets": inputs.sum(1, keepdim=True)}


def loss(model, batch):
    return nn.functional.mse_loss(model(batch["inputs"]), batch["targets"])


class Fit(Task):
    def __init__(self, scale=1.0):
        self.scale = scale

    def module(self):
        return Net()

    def batch(self, instances, generator):
        return torch.randn(instances, 16, SIZE, generator=generator)

    def loss(self, module, batch):
        return self.scale * (module(batch) - batch.sum(1, keepdim=True)).square().mean()


@dataclass(frozen=True)
class Fits(TaskFamily):
    scale: float = 1.0

    def sample(self, rng, split):
        return Fit(self.scale)


def net():
    return Net()


class Other:
    pass
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    (tmp_path / "neighbour.py").write_text("SIZE = 3\n")
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    return path


def losses(family: TaskFamily) -> np.ndarray:
    problem = Problem(family, 3, 60, seed=1)
    return problem.run(lambda parameters: BASELINES["Adam"](parameters, 0.1, 60))


@pytest.mark.parametrize("name", ["Net", "net", "Fit", "Fits"])
def test_every_kind_of_class_trains(name: str, file: Path) -> None:
    found = losses(build_family(f"{file}:{name}", {}, "test"))
    assert len(set(found[0].tolist())) == 3  # starting points and batches of their own
    assert (found[-1] < 0.2 * found[0]).all()


def test_options_reach_a_family(file: Path) -> None:
    plain, scaled = (losses(build_family(f"{file}:Fits", options, "test")) for options in ({}, {"scale": 2.0}))
    np.testing.assert_allclose(scaled[0], 2 * plain[0], rtol=1e-6)


def test_changed_file_is_read_again(file: Path) -> None:
    first = losses(build_family(f"{file}:Net", {}, "test"))
    file.write_text(FILE.replace("mse_loss(", "l1_loss("))
    assert not np.array_equal(losses(build_family(f"{file}:Net", {}, "test")), first)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine.py:Nothing", "mine.py defines no 'Nothing'; write FILE.py:CLASS"),
        ("mine.py:", "defines no ''; write FILE.py:CLASS"),
        ("mine.py:Other", "must be a sub-class of TaskFamily, of Task or of torch.nn.Module"),
        ("mine.py:SIZE", "must be a sub-class"),
        ("absent.py:Net", "no file .*absent.py"),
        ("broken.py:Net", r"broken\.py cannot be run: NameError: name 'nonsense'"),
        ("bare.py:Net", r"beside the module 'Net', .*bare\.py must define a function batch\(generator\)"),
    ],
)
def test_unusable_file_is_refused_with_the_reason(name: str, words: str, file: Path) -> None:
    (file.parent / "broken.py").write_text("nonsense")
    (file.parent / "bare.py").write_text("from torch import nn\nclass Net(nn.Module):\n    pass\n")
    with pytest.raises(ConfigError, match=words):
        build_family(f"{file.parent}/{name}", {}, "test")
    assert not any(module.startswith("user_broken") for module in sys.modules)


def test_options_of_a_task_are_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="takes no options, got scale"):
        build_family(f"{file}:Fit", {"scale": 2.0}, "test")
    with pytest.raises(ConfigError, match="unknown key 'scales'"):
        build_family(f"{file}:Fits", {"scales": 2.0}, "test")
