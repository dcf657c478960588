"""Few-shot runs as a kind of run beside those that train a rule."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from learned_optim.meta_train.common.strict import Count, without_former
from learned_optim.meta_train.few_shot.options import ALGORITHMS, FORMER_ALGORITHM_DEFAULTS
from learned_optim.meta_train.few_shot.settings import (
    FEW_SHOT_TASKS,
    FewShotConfig,
    few_shot_config,
    is_few_shot,
    shipped_few_shot_configs,
)
from learned_optim.meta_train.few_shot.trainer import FewShotTrainer
from learned_optim.meta_train.inner.distributed import World
from learned_optim.meta_train.trainer.kind import RunKind, Tables
from learned_optim.rules import ARCHITECTURES


class _Family(TypedDict):
    family: str


class _Algorithm(TypedDict):
    name: str
    steps: NotRequired[Count]


class _Validation(TypedDict):
    steps: NotRequired[Count | None]


class _FewShotTables(TypedDict):
    """The part of a configuration that a summary reads."""

    steps: Count
    description: NotRequired[str]
    algorithm: _Algorithm
    task: _Family
    validation: NotRequired[_Validation]


class FewShotKind(RunKind):
    """Runs that meta-train a few-shot algorithm."""

    config_class = FewShotConfig
    shape = _FewShotTables

    def has(self, tables: Tables) -> bool:
        """Whether there is an algorithm in place of a rule."""
        return is_few_shot(tables)

    def shipped(self) -> dict[str, Path]:
        """Configurations that come with the package, by name."""
        return shipped_few_shot_configs()

    def configuration(self, tables: Tables, source: str, *, resuming: bool = False) -> FewShotConfig:
        """The checked configuration."""
        return few_shot_config(tables, source, resuming=resuming)

    def begin(self, config: Any, folder: Path, world: World) -> FewShotTrainer:
        """A run at its start."""
        return FewShotTrainer(config, folder, world.device, world)

    def resume(self, folder: Path, world: World) -> FewShotTrainer:
        """The run in ``folder`` at its checkpoint."""
        return FewShotTrainer.resume(folder, world.device, world)

    def options_class(self, key: str, table: Tables) -> Any:
        """The task, architecture or algorithm that the table names."""
        if key == "algorithm":
            entry = table[key]
            return ALGORITHMS.get(str(entry.get("name"))) if isinstance(entry, Mapping) else None
        if key == "settings":
            return ARCHITECTURES.get(str(table.get("architecture")))
        return FEW_SHOT_TASKS.get(str(table.get("family"))) if key == "options" else None

    def without_former_options(self, tables: Tables) -> dict[str, Any]:
        """The tables without options of other algorithms."""
        table = tables["algorithm"]
        options = ALGORITHMS.get(table["name"])
        table = table if options is None else without_former(options, table, FORMER_ALGORITHM_DEFAULTS)
        return {**tables, "algorithm": table}

    def summary(self, tables: Tables) -> dict[str, Any]:
        """The algorithm, which is the estimator as well, and the task."""
        algorithm = tables["algorithm"]["name"]
        return {"rule": algorithm, "families": {tables["task"]["family"]: 1}, "estimator": algorithm}

    def validated_on(self, tables: Tables) -> str:
        """The task, and the inner steps on it."""
        steps = tables.get("validation", {}).get("steps") or tables["algorithm"].get("steps", 1)
        return f"{steps:,} steps of {tables['task']['family']}"

    def meta_loss(self, tables: Tables) -> str:
        """A name that all few-shot runs share."""
        return "few-shot"


FEW_SHOT = FewShotKind()
"""The kind of runs that meta-train a few-shot algorithm."""
