"""What a configuration of a few-shot run can say."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from learned_optim.meta_train.common.strict import (
    ConfigError,
    Count,
    Decay,
    Positive,
    Strict,
    checked,
    refuse_changed,
    unknown,
)
from learned_optim.meta_train.config.settings import MetaOptimizerConfig, RuleConfig
from learned_optim.meta_train.few_shot.algorithms import (
    FOMAML,
    MAML,
    Algorithm,
    Leap,
    Matching,
    MetaLSTM,
    MetaSGD,
    NearestNeighbour,
    Pretraining,
    Prototypical,
    Reptile,
    Scratch,
)
from learned_optim.meta_train.few_shot.episodes import FewShotTask
from learned_optim.meta_train.few_shot.inner import SGD, Adam
from learned_optim.meta_train.few_shot.mini_imagenet import MiniImageNet
from learned_optim.meta_train.few_shot.omniglot import Omniglot
from learned_optim.meta_train.few_shot.sinusoid import Sinusoid
from learned_optim.meta_train.inner.unroll import InnerOptimizer
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
class AlgorithmConfig(Strict):
    """How learners are adapted, and what is learned for that; options that the named algorithm has not are refused."""

    name: Literal[
        "maml",
        "fomaml",
        "meta-sgd",
        "reptile",
        "leap",
        "meta-lstm",
        "pretraining",
        "scratch",
        "prototypical",
        "matching",
        "nearest-neighbour",
    ] = "maml"
    steps: Count = 1
    """Inner steps in meta-training."""
    batch_size: Count | None = None
    """Support examples of an inner step; None: all."""
    optimizer: Literal["sgd", "adam", "rule"] = "sgd"
    """What takes the inner steps."""
    lr: Positive = 0.01
    """Of SGD and Adam; of Meta-SGD, where all rates start."""
    betas: tuple[Decay, Decay] = (0.0, 0.999)
    """Of Adam."""
    rule: RuleConfig | None = None
    """With ``optimizer = "rule"``: which, a table as in a rule's own configuration."""
    train_rule: bool = False
    """Whether the rule is trained together with the starting point, or stays as it is."""
    combination: tuple[float, ...] | None = None
    """Of Reptile: factors of the inner gradients in place of the whole way."""

    def __post_init__(self) -> None:
        inner = ("optimizer", "lr", "betas", "rule", "train_rule")
        own = {
            "meta-sgd": ("steps", "batch_size", "lr"),
            "meta-lstm": ("steps", "batch_size"),
            "reptile": ("steps", "batch_size", *inner, "combination"),
            "pretraining": ("steps", *inner),
            "prototypical": (),
            "matching": (),
            "nearest-neighbour": (),
        }
        refuse_changed(self, own.get(self.name, ("steps", "batch_size", *inner)), f"algorithm {self.name!r}")
        if (self.optimizer == "rule") != (self.rule is not None):
            raise ValueError('optimizer = "rule" and rule = NAME belong together; give both or neither')
        if self.train_rule and (self.rule is None or self.name not in ("maml", "fomaml")):
            raise ValueError("train_rule needs algorithm maml or fomaml, and a rule")

    def build(self, task: FewShotTask, initial: Tensor, seed: int, *, fresh: bool = False) -> Algorithm:
        """The algorithm for ``task`` with a learner's first parameters ``(N,)``; ``fresh`` reads no rule's file.

        Raises:
            ConfigError: the rule cannot be read, or the task is none for the algorithm.
        """
        comparisons = {"prototypical": Prototypical, "matching": Matching, "nearest-neighbour": NearestNeighbour}
        if self.name in comparisons:
            if task.ways is None:
                raise ConfigError(f"algorithm {self.name!r} classifies; the task is a regression")
            return comparisons[self.name](initial)
        if self.name == "meta-sgd":
            return MetaSGD(initial, self.lr, self.steps, self.batch_size)
        if self.name == "meta-lstm":
            return MetaLSTM(initial, self.steps, self.batch_size, seed=seed)
        inner = self._inner(seed, fresh)
        if self.name == "scratch":
            return Scratch(initial, inner, seed)
        if self.name == "pretraining":
            return Pretraining(initial, inner, self.steps, features=task.features, classes=task.training_classes)
        if self.name == "reptile":
            return Reptile(initial, inner, self.steps, self.batch_size, self.combination)
        return {"maml": MAML, "fomaml": FOMAML, "leap": Leap}[self.name](initial, inner, self.steps, self.batch_size)

    def _inner(self, seed: int, fresh: bool) -> InnerOptimizer:
        if self.rule is not None:
            rule = self.rule.fresh(seed) if fresh else self.rule.build(seed)
            return rule.requires_grad_(self.train_rule)
        return SGD(self.lr) if self.optimizer == "sgd" else Adam(self.lr, self.betas)


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
    algorithm: AlgorithmConfig = AlgorithmConfig()
    meta_optimizer: MetaOptimizerConfig = field(default_factory=MetaOptimizerConfig)
    validation: FewShotValidationConfig = FewShotValidationConfig()

    def to_json(self) -> str:
        """The configuration as JSON, keys sorted: what run folders and weights files record."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, allow_nan=False)

    @property
    def validation_steps(self) -> int:
        """Inner steps of a validation."""
        return self.algorithm.steps if self.validation.steps is None else self.validation.steps


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
