"""Rivals are run as their packages run them: own loops, true shapes, one optimizer a run, losses where they are meant."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from helpers.benchmarks import run, suite
from helpers.user_tasks import DropoutFamily
from learned_optim.meta_train.benchmark import rivals as rivals_module
from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.benchmark.contenders import (
    DECAYS,
    Contender,
    baseline,
    baselines,
    installed,
    rival_names,
)
from learned_optim.meta_train.benchmark.evaluation import DECAYED, train
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.report import problem_table
from learned_optim.meta_train.benchmark.rivals import RIVALS, MuonWithAdamW, Rival, hidden_matrices, missing
from learned_optim.meta_train.benchmark.stepping import ForEach, Model
from learned_optim.meta_train.benchmark.timing import time_steps
from learned_optim.meta_train.common.seeds import fixed_global_state
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import QuadraticFamily, Task
from learned_optim.meta_train.tasks.mlp import MLPTask
from learned_optim.meta_train.tasks.residual import ResidualFamily
from learned_optim.meta_train.tasks.vision_transformer import VisionTransformerFamily

INSTANCES, STEPS, SEED = 3, 24, 5
ROUNDING = 1e-6  # relative; float64 but for Muon, which orthogonalises in bfloat16: then a last bit that differs counts


def need(name: str) -> None:
    """Skip where the package of a rival is missing."""
    if absent := missing([name]):
        pytest.skip(f"{', '.join(absent)} not installed: pip install 'learned-optim[rivals]'")


def perceptrons() -> Task:
    images = torch.rand(30, 4, generator=generator())
    return MLPTask((images, torch.arange(30) % 3), 6, [5, 4], "tanh", initial="torch", gain=1.0, layer_norm=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_in_readme(name: str, module: nn.Module) -> Optimizer:
    """A rival as its users write it, at the first of its untuned rates."""
    parameters = list(module.parameters())
    optimizer: Any
    match name:
        case "Schedule-Free":
            optimizer = importlib.import_module("schedulefree").AdamWScheduleFree(parameters, warmup_steps=1)
            optimizer.train()
        case "Prodigy":
            optimizer = importlib.import_module("prodigyopt").Prodigy(parameters, lr=1.0)
        case "D-Adaptation":
            optimizer = importlib.import_module("dadaptation").DAdaptAdam(parameters, lr=1.0)
        case "SOAP":
            soap = importlib.import_module("pytorch_optimizer").SOAP
            optimizer = soap(parameters, lr=3e-3, betas=(0.95, 0.95), weight_decay=0.01, precondition_frequency=10)
        case "AdEMAMix":
            ademamix = importlib.import_module("pytorch_optimizer").AdEMAMix
            optimizer = ademamix(parameters, lr=1e-3, alpha=8.0, t_alpha_beta3=STEPS, weight_decay=0.1, weight_decouple=True)
        case _:
            raise NotImplementedError(name)
    made: Optimizer = optimizer
    return made


class MuonLoop:
    """Two optimizers, as PyTorch's documents have it: Muon for the one hidden matrix of :func:`perceptrons`."""

    def __init__(self, module: nn.Module) -> None:
        hidden = [tensor for name, tensor in module.named_parameters() if name == "2.weight"]
        assert [tuple(matrix.shape) for matrix in hidden] == [(4, 5)]
        others = [tensor for name, tensor in module.named_parameters() if name != "2.weight"]
        self.both = (
            torch.optim.Muon(hidden, lr=0.003, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=0.003),
        )

    def step(self) -> None:
        for optimizer in self.both:
            optimizer.step()


def own_loop(name: str, task: Task, index: int) -> list[float]:
    """Losses of one training, module and optimizer as they come, each where its authors evaluate it."""
    with fixed_global_state(SEED):
        module = [task.module() for _ in range(INSTANCES)][index]
    optimizer: Any = MuonLoop(module) if name == "Muon" else as_in_readme(name, module)
    batches, losses = generator(), []
    for step in range(STEPS + 1):
        batch = tree_map(lambda tensor: tensor[index], task.batch(INSTANCES, batches))
        if hasattr(optimizer, "eval"):
            kept = [tensor.detach().clone() for tensor in module.parameters()]
            optimizer.eval()
            losses.append(float(task.loss(module, batch).detach()))
            optimizer.train()
            with torch.no_grad():
                for tensor, value in zip(module.parameters(), kept, strict=True):
                    tensor.copy_(value)
        module.zero_grad()
        loss = task.loss(module, batch)
        loss.backward()
        if not hasattr(optimizer, "eval"):
            losses.append(float(loss.detach()))
        if step < STEPS:
            optimizer.step()
    return losses


def untuned(name: str) -> Contender:
    return baseline(f"{name}@{RIVALS[name].untuned[0]:g}")


def losses_of(contender: Contender, task: Task, **options: Any) -> np.ndarray:
    return train(
        VectorizedTask(task, INSTANCES, SEED), contender.maker(contender.rate, STEPS), STEPS, generator(), **options
    )


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", RIVALS)
def test_every_run_is_what_the_package_does_in_a_loop_of_its_own(name: str) -> None:
    need(name)
    task = perceptrons()
    losses = losses_of(untuned(name), task)
    expected = np.array([own_loop(name, task, index) for index in range(INSTANCES)]).T
    np.testing.assert_allclose(losses, expected, rtol=ROUNDING if name != "Muon" else 1e-3)
    assert (losses[-1] < losses[0]).any() or name in ("Prodigy", "D-Adaptation", "AdEMAMix")  # slow to start
