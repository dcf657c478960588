"""Meta-training runs of a fraction of a second, for the tests of the trainer and of interruptions."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from learned_optim.checkpoint import read_provenance
from learned_optim.meta_train.config.load import Config, config_from_tables
from learned_optim.meta_train.trainer.log import Progress
from learned_optim.meta_train.trainer.trainer import Trainer
from learned_optim.rules import LSTML2L

STEPS = 12

QUADRATIC = {"family": "quadratic", "dimensions": [2, 4], "condition": [1.0, 20.0], "initial_deviation": 1.0}
TABLES: dict[str, Any] = {
    "steps": STEPS,
    "rule": {"architecture": "scale-free-lstm", "settings": {"hidden_size": 2, "momentum_decays": [0.9]}},
    "tasks": [QUADRATIC, {"family": "helpers.user_tasks:DropoutFamily"}],
    "unroll": {"truncation": 2, "horizon": [3, 9], "instances": 2, "pool": 3, "windows_per_step": 2, "rescale": 0.5},
    "estimator": {"meta_loss": "log", "replay_coordinates": 3},
    "meta_optimizer": {"lr": 1e-2, "schedule": "cosine", "clip_norm": 0.5, "average": 0.9},
    "validation": {"every": 4, "horizon": 4, "instances": 2},
}
"""Every feature that has a state: a pool at staggered stages, several windows a step, rescaling, sampled coordinates,
schedule, clipping, averaging, validations. Tiny, so that a run takes a fraction of a second."""

L2L = {"architecture": "lstm-l2l", "settings": {"hidden_size": 2}}
"""A ``rule`` table: the architecture whose updates :func:`drifting` sets by its output bias."""


def configuration(**changes: Any) -> Config:
    """TABLES with some tables updated and some values replaced."""
    tables = dict(TABLES)
    for name, change in changes.items():
        tables[name] = {**tables.get(name, {}), **change} if isinstance(change, Mapping) else change
    return config_from_tables(tables)


def plain(**changes: Any) -> Config:
    """One quadratic at a time, one window a step, and nothing that hides what a step does."""
    unroll = {"pool": 1, "windows_per_step": 1, "rescale": 0.0} | changes.pop("unroll", {})
    meta_optimizer = {"schedule": "constant", "clip_norm": None, "average": 0.0} | changes.pop("meta_optimizer", {})
    estimator = {"meta_loss": "mean", "replay_coordinates": None} | changes.pop("estimator", {})
    tasks = changes.pop("tasks", [QUADRATIC])
    return configuration(tasks=tasks, unroll=unroll, meta_optimizer=meta_optimizer, estimator=estimator, **changes)


def run(trainer: Trainer) -> list[Progress]:
    """Run to the end and return the progress of each meta-step."""
    return list(trainer.run())


def drifting(distance: float) -> LSTML2L:
    """A rule that moves every coordinate by the same distance in every step."""
    rule = LSTML2L(2)
    torch.nn.init.zeros_(rule.output_weight)
    torch.nn.init.constant_(rule.output_bias, distance / rule.output_scale)
    return rule


def weights(rule: torch.nn.Module) -> Tensor:
    """A copy of all meta-parameters as one vector."""
    return parameters_to_vector(rule.parameters()).detach().clone()


def metrics(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without the time that they took."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def contents(path: Path) -> dict[str, bytes]:
    """Tensors of a safetensors file, bit for bit."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    return {name: f"{tensor.dtype} {tuple(tensor.shape)}".encode() + data(tensor) for name, tensor in tensors.items()}


def data(tensor: Tensor) -> bytes:
    """The bytes of a tensor's values."""
    return tensor.contiguous().numpy().tobytes()


def assert_same_outcome(folder: Path, expected: Path) -> None:
    """Two runs left equal metrics, tensors and provenance, to the bit and except for the seconds that they took."""
    assert metrics(folder) == metrics(expected)
    for name in ("checkpoint", "best", "latest"):
        assert contents(folder / f"{name}.safetensors") == contents(expected / f"{name}.safetensors"), name
    provenance, expected_provenance = (
        {key: value for key, value in read_provenance(path / "best.safetensors").items() if key != "seconds"}
        for path in (folder, expected)
    )
    assert provenance == expected_provenance
