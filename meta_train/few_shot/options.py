"""Options of the few-shot algorithms: a frozen dataclass for each, which builds the algorithm."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from learned_optim.meta_train.common.strict import ConfigError, Count, Decay, Positive, Strict, checked_by_name
from learned_optim.meta_train.config.settings import RuleConfig
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
from learned_optim.meta_train.few_shot.algorithms.comparison import ComparisonAlgorithm
from learned_optim.meta_train.few_shot.episodes import FewShotTask
from learned_optim.meta_train.few_shot.inner import SGD, Adam
from learned_optim.meta_train.inner.unroll import InnerOptimizer


@dataclass(frozen=True)
class AlgorithmOptions(Strict, ABC):
    """Options of an algorithm: the adaptation of learners, and what is learned for it."""

    name: ClassVar[str]
    """Name in configurations."""

    @abstractmethod
    def build(self, task: FewShotTask, initial: Tensor, seed: int, *, fresh: bool = False) -> Algorithm:
        """The algorithm for ``task`` with a learner's first parameters ``(N,)``; ``fresh`` reads no rule's file.

        Raises:
            ConfigError: the rule cannot be read, or the algorithm cannot be used on the task.
        """

    @property
    def adaptation_steps(self) -> int:
        """Inner steps of an adaptation, unless others are asked for."""
        return 1

    def to_table(self) -> dict[str, Any]:
        """Name and options, as they stand in a configuration."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class ComparisonOptions(AlgorithmOptions):
    """Base of the algorithms that compare examples with each other, and take no inner steps."""

    algorithm: ClassVar[type[ComparisonAlgorithm]]

    def build(self, task: FewShotTask, initial: Tensor, seed: int, *, fresh: bool = False) -> Algorithm:
        """The algorithm, if the task is a classification."""
        if task.ways is None:
            raise ConfigError(f"algorithm {self.name!r} classifies; the task is a regression")
        return self.algorithm(initial)


@dataclass(frozen=True)
class PrototypicalOptions(ComparisonOptions):
    """Options of :class:`Prototypical`: none."""

    name = "prototypical"
    algorithm = Prototypical


@dataclass(frozen=True)
class MatchingOptions(ComparisonOptions):
    """Options of :class:`Matching`: none."""

    name = "matching"
    algorithm = Matching


@dataclass(frozen=True)
class NearestNeighbourOptions(ComparisonOptions):
    """Options of :class:`NearestNeighbour`: none."""

    name = "nearest-neighbour"
    algorithm = NearestNeighbour


@dataclass(frozen=True)
class SteppedOptions(AlgorithmOptions):
    """Base of the algorithms that adapt a learner by inner steps."""

    steps: Count = 1
    """Inner steps in meta-training."""

    @property
    def adaptation_steps(self) -> int:
        """The inner steps of meta-training."""
        return self.steps


@dataclass(frozen=True)
class OptimizerOptions(SteppedOptions):
    """Base of the algorithms whose inner steps are those of an optimizer."""

    optimizer: Literal["sgd", "adam", "rule"] = "sgd"
    """The optimizer that takes the inner steps."""
    lr: Positive = 0.01
    """Learning rate of SGD and Adam."""
    betas: tuple[Decay, Decay] = (0.0, 0.999)
    """Decay of the means of Adam."""
    rule: RuleConfig | None = None
    """The rule that adapts learners with ``optimizer = "rule"``: a table as in a rule's own configuration."""

    def __post_init__(self) -> None:
        if (self.optimizer == "rule") != (self.rule is not None):
            raise ValueError('optimizer = "rule" and rule = NAME belong together; give both or neither')

    def inner(self, seed: int, fresh: bool, *, train_rule: bool = False) -> InnerOptimizer:
        """The inner optimizer; a rule stays as it is, unless it is to be trained."""
        if self.rule is not None:
            rule = self.rule.fresh(seed) if fresh else self.rule.build(seed)
            return rule.requires_grad_(train_rule)
        return SGD(self.lr) if self.optimizer == "sgd" else Adam(self.lr, self.betas)


@dataclass(frozen=True)
class ScratchOptions(OptimizerOptions):
    """Options of :class:`Scratch`."""

    name = "scratch"

    def build(self, task: FewShotTask, initial: Tensor, seed: int, *, fresh: bool = False) -> Algorithm:
        """Training from a random point."""
        return Scratch(initial, self.inner(seed, fresh), seed)


@dataclass(frozen=True)
class PretrainingOptions(OptimizerOptions):
    """Options of :class:`Pretraining`."""

    name = "pretraining"

    def build(self, task: FewShotTask, initial: Tensor, seed: int, *, fresh: bool = False) -> Algorithm:
        """Training on all tasks together, with a last layer for all classes."""
        inner = self.inner(seed, fresh)
        return Pretraining(initial, inner, self.steps, features=task.features, classes=task.training_classes)


@dataclass(frozen=True)
class MAMLOptions(OptimizerOptions):
    """Options of :class:`MAML`."""

    batch_size: Count | None = None
    """Support examples of an inner step; None: all."""
    train_rule: bool = False
    """Whether the rule is trained together with the starting point, or stays as it is."""

    name = "maml"
    algorithm: ClassVar[type[MAML]] = MAML

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_rule and self.rule is None:
            raise ValueError('train_rule needs optimizer = "rule" and a rule')

    def build(self, task: FewShotTask, initial: Tensor, seed: int, *, fresh: bool = False) -> Algorithm:
        """A starting point that is learned through the inner training."""
        inner = self.inner(seed, fresh, train_rule=self.train_rule)
        return self.algorithm(initial, inner, self.steps, self.batch_size)


@dataclass(frozen=True)
class FOMAMLOptions(MAMLOptions):
    """Options of :class:`FOMAML`."""

    name = "fomaml"
    algorithm = FOMAML


@dataclass(frozen=True)
class LeapOptions(OptimizerOptions):
    """Options of :class:`Leap`."""

    batch_size: Count | None = None
    """Support examples of an inner step; None: all."""

    name = "leap"

    def build(self, task: FewShotTask, initial: Tensor, seed: int, *, fresh: bool = False) -> Algorithm:
        """A starting point from which paths are short."""
        return Leap(initial, self.inner(seed, fresh), self.steps, self.batch_size)


@dataclass(frozen=True)
class ReptileOptions(OptimizerOptions):
    """Options of :class:`Reptile`."""

    batch_size: Count | None = None
    """Support examples of an inner step; None: all."""
    combination: tuple[float, ...] | None = None
    """Factors of the inner gradients in place of the whole way."""

    name = "reptile"

    def build(self, task: FewShotTask, initial: Tensor, seed: int, *, fresh: bool = False) -> Algorithm:
        """A starting point near the ends of the inner trainings."""
        return Reptile(initial, self.inner(seed, fresh), self.steps, self.batch_size, self.combination)


@dataclass(frozen=True)
class MetaSGDOptions(SteppedOptions):
    """Options of :class:`MetaSGD`."""

    batch_size: Count | None = None
    """Support examples of an inner step; None: all."""
    lr: Positive = 0.01
    """The value that all learning rates start at."""

    name = "meta-sgd"

    def build(self, task: FewShotTask, initial: Tensor, seed: int, *, fresh: bool = False) -> Algorithm:
        """A starting point and a rate for each coordinate."""
        return MetaSGD(initial, self.lr, self.steps, self.batch_size)


@dataclass(frozen=True)
class MetaLSTMOptions(SteppedOptions):
    """Options of :class:`MetaLSTM`."""

    batch_size: Count | None = None
    """Support examples of an inner step; None: all."""

    name = "meta-lstm"

    def build(self, task: FewShotTask, initial: Tensor, seed: int, *, fresh: bool = False) -> Algorithm:
        """A starting point and an LSTM with two gates."""
        return MetaLSTM(initial, self.steps, self.batch_size, seed=seed)


ALGORITHMS: dict[str, type[AlgorithmOptions]] = {
    options.name: options
    for options in (
        MAMLOptions,
        FOMAMLOptions,
        MetaSGDOptions,
        ReptileOptions,
        LeapOptions,
        MetaLSTMOptions,
        PretrainingOptions,
        ScratchOptions,
        PrototypicalOptions,
        MatchingOptions,
        NearestNeighbourOptions,
    )
}
"""Options of the algorithms by the names that stand in configurations."""

FORMER_ALGORITHM_DEFAULTS: Mapping[str, Any] = {
    "steps": 1,
    "batch_size": None,
    "optimizer": "sgd",
    "lr": 0.01,
    "betas": [0.0, 0.999],
    "rule": None,
    "train_rule": False,
    "combination": None,
}
"""Options that earlier versions recorded for every algorithm, at these values for those that do not have them."""


def build_algorithm_options(table: Any, source: str) -> AlgorithmOptions:
    """Options of an algorithm, checked.

    Args:
        table: ``name``, by default that of MAML, and the options of the algorithm.
        source: how an error calls the configuration.

    Raises:
        ConfigError: there is no such algorithm, or it does not have an option, or does not take its value.
    """
    return checked_by_name(ALGORITHMS, table, source, "algorithm", MAMLOptions.name, FORMER_ALGORITHM_DEFAULTS)
