"""The configuration of a few-shot run."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, InstanceOf

from learned_optim.meta_train.common.strict import (
    ConfigError,
    Count,
    Strict,
    checked,
    unknown,
)
from learned_optim.meta_train.config.load import toml_files
from learned_optim.meta_train.config.settings import MetaOptimizerConfig
from learned_optim.meta_train.few_shot.episodes import FewShotTask
from learned_optim.meta_train.few_shot.mini_imagenet import MiniImageNet
from learned_optim.meta_train.few_shot.omniglot import Omniglot
from learned_optim.meta_train.few_shot.options import AlgorithmOptions, MAMLOptions, build_algorithm_options
from learned_optim.meta_train.few_shot.sinusoid import Sinusoid
from learned_optim.meta_train.tasks.lookup import gather_options

FEW_SHOT_TASKS: dict[str, type[FewShotTask]] = {
    "sinusoid": Sinusoid,
    "omniglot": Omniglot,
    "mini-imagenet": MiniImageNet,
}
"""Few-shot tasks by the name that stands in a configuration."""


@dataclass(frozen=True)
class FewShotTaskConfig(Strict):
    """The distribution over tasks. In TOML, its options stand beside ``family``."""

    family: str
    """One of :data:`FEW_SHOT_TASKS`."""
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> FewShotTask:
        """The task with its options checked."""
        if self.family not in FEW_SHOT_TASKS:
            raise ConfigError(f"task.family: {unknown(self.family, FEW_SHOT_TASKS)}")
        return checked(FEW_SHOT_TASKS[self.family], self.options, f"task[{self.family}]")


@dataclass(frozen=True)
class FewShotValidationConfig(Strict):
    """Held-out episodes on which the best version is chosen."""

    every: Count = 500
    """Meta-steps between validations."""
    episodes: Count = 200
    steps: Count | None = None
    """Inner steps; None: as in meta-training."""
    transductive: bool = True
    """Whether batch norm may take its statistics from all queries together."""


@dataclass(frozen=True)
class FewShotConfig(Strict):
    """Everything that determines a few-shot run, apart from the machine."""

    task: FewShotTaskConfig
    steps: Count
    """Meta-steps."""
    episodes: Count = 25
    """Tasks of a meta-step."""
    seed: Annotated[int, Field(ge=0)] = 0
    description: str = ""
    algorithm: InstanceOf[AlgorithmOptions] = field(default_factory=MAMLOptions)
    meta_optimizer: MetaOptimizerConfig = field(default_factory=MetaOptimizerConfig)
    validation: FewShotValidationConfig = FewShotValidationConfig()

    def to_json(self) -> str:
        """The configuration as JSON, keys sorted: what run folders and weights files record."""
        tables = {**dataclasses.asdict(self), "algorithm": self.algorithm.to_table()}
        return json.dumps(tables, sort_keys=True, allow_nan=False)

    @property
    def validation_steps(self) -> int:
        """Inner steps of a validation."""
        return self.algorithm.adaptation_steps if self.validation.steps is None else self.validation.steps


def shipped_few_shot_configs() -> dict[str, Path]:
    """Configurations of few-shot runs that come with the package, by name."""
    return toml_files(Path(__file__).parent / "configs")


def is_few_shot(tables: Mapping[str, Any]) -> bool:
    """Whether nested tables are meant as a :class:`FewShotConfig`: these have an algorithm in place of a rule."""
    return "algorithm" in tables


def few_shot_config(
    tables: Mapping[str, Any], source: str = "configuration", *, resuming: bool = False
) -> FewShotConfig:
    """Check nested tables, as TOML gives them, and build the configuration.

    ``resuming`` leaves out what is needed only at the start of a run: the rule's file.

    Raises:
        ConfigError: unknown or missing key, wrong type, or a value out of range.
    """
    tables = dict(tables)
    if "task" in tables:
        tables["task"] = gather_options(tables["task"], {"family"})
    if "algorithm" in tables:
        tables["algorithm"] = build_algorithm_options(tables["algorithm"], source)
    config = checked(FewShotConfig, tables, source)
    task = config.task.build()
    try:
        config.algorithm.build(task, torch.zeros(1), config.seed, fresh=resuming)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: algorithm: {error}") from error
    try:
        config.to_json()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: only finite numbers, strings, booleans, lists and tables: {error}") from error
    return config
