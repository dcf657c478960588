"""The configuration of a meta-training run: frozen dataclasses, nothing unknown accepted."""

import dataclasses
import itertools
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, InstanceOf, PlainValidator

from learned_optim.checkpoint import load_rule
from learned_optim.meta_train.common.strict import (
    ConfigError,
    Count,
    Decay,
    NotNegative,
    Positive,
    Probability,
    Strict,
    refuse_changed,
    unknown,
)
from learned_optim.meta_train.estimators import Combined, Estimator, OutputES, TruncatedBPTT
from learned_optim.meta_train.estimators.perturbation import PerturbationEstimator
from learned_optim.meta_train.tasks import Augmentation, TaskFamily
from learned_optim.meta_train.tasks.lookup import build_family
from learned_optim.meta_train.tasks.sampling import check_range, log_uniform_integer
from learned_optim.rules import ARCHITECTURES, UpdateRule


@dataclass(frozen=True)
class RuleConfig(Strict):
    """The rule that is meta-trained."""

    architecture: str = "schedule-free-lstm"
    """Name of an architecture."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of its constructor."""
    start_from: str | None = None
    """Weights to start from: a shipped rule's name or a path. None: fresh ones."""

    def build(self, seed: int) -> UpdateRule:
        """The rule at the start of meta-training: fresh, or with the weights of ``start_from``."""
        rule = self.fresh(seed)
        if self.start_from is not None:
            try:
                rule.load_state_dict(load_rule(self.start_from).state_dict())
            except (OSError, RuntimeError, ValueError) as error:
                raise ConfigError(f"rule.start_from: {' '.join(str(error).split())}") from error
        return rule

    def fresh(self, seed: int) -> UpdateRule:
        """The rule with random weights, whatever ``start_from`` says; reads no file."""
        if self.architecture not in ARCHITECTURES:
            raise ConfigError(f"rule.architecture: {unknown(self.architecture, ARCHITECTURES)}")
        try:
            rule = ARCHITECTURES[self.architecture](**self.settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"rule.settings: {error}") from error
        rule.reset_parameters(seed)
        return rule


@dataclass(frozen=True)
class TaskConfig(Strict):
    """One family of the mixture. In TOML, the family's options stand beside ``family`` and what else is here."""

    family: str
    """A shipped family's name, or ``package.module:Class`` for one's own."""
    weight: Positive = 1.0
    """The frequency with which the family is drawn, relative to the others."""
    anchor: bool = False
    """Whether the rule should learn to leave its outputs at zero here; of estimator ``"output-es"``."""
    augment: Augmentation = field(default_factory=Augmentation)
    """Random changes to its tasks."""
    options: dict[str, Any] = field(default_factory=dict)
    """The family's own options."""

    def build(self) -> TaskFamily:
        """The family with its options checked."""
        family = build_family(self.family, self.options, f"tasks[{self.family}]")
        if family.evaluation_only:
            raise ConfigError(f"tasks[{self.family}]: not for meta-training: {family.evaluation_only}")
        return self.augment.of(family)


@dataclass(frozen=True)
class TruncationGrowth(Strict):
    """Windows that grow linearly with the meta-steps, from ``truncation`` on (Metz et al. 2019)."""

    to: Count
    """Inner steps at the end of the growth, and after it."""
    over: Count
    """Meta-steps that the growth takes."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Each window's length is multiplied by a factor uniform in ``1 - jitter ... 1 + jitter``."""

    def window(self, first: int, meta_step: int, rng: np.random.Generator) -> int:
        """Inner steps of a window at ``meta_step``."""
        mean = first + (self.to - first) * min(1.0, meta_step / self.over)
        return max(1, round(mean * rng.uniform(1 - self.jitter, 1 + self.jitter)))


def _window_length(value: Any) -> Any:
    """A value for ``unroll.truncation``; anything else is a ``ValueError``."""
    if value == "whole" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f'a window has a whole number of steps from 1 on, or is "whole", got {value!r}')


@dataclass(frozen=True)
class UnrollConfig(Strict):
    """The inner training of tasks while the rule learns."""

    truncation: Annotated[int | Literal["whole"], PlainValidator(_window_length)] = 20
    """Inner steps of a window: the reach of the meta-gradient. ``"whole"``: every window is a whole inner training."""
    truncation_growth: TruncationGrowth | None = None
    """The growth of the truncation during the run; None: it does not grow."""
    truncation_up_to: Count | None = None
    """Draw it for each window, log-uniformly between ``truncation`` and this; None: fixed."""
    horizon: tuple[Count, Count] = (100, 100)
    """Range of the length of an inner training, drawn log-uniformly for each. Rounded up to whole windows; windows that
    vary in length are cut short at the horizon instead."""
    instances: Count = 16
    """Copies of a task that advance together, each with its own starting point and data."""
    pool: Count = 1
    """Inner trainings under way at a time; they advance in turn."""
    stagger: bool = True
    """Whether a pool of several starts spread over all stages. Its first members then run ahead, without
    meta-gradient, when their turn comes first: at most a horizon each. If not, late stages take a horizon to appear."""
    windows_per_step: Count = 1
    """Members of the pool whose meta-gradients are averaged for one meta-step."""
    rescale: Probability = 0.0
    """Probability that a task's parameters are rescaled at random."""
    rescale_range: tuple[Positive, Positive] = (0.1, 10.0)
    """Range of that factor, drawn log-uniformly for each instance."""
    known_length: Probability = 0.0
    """Probability that a rule that uses conditions is told how long an inner training will be."""
    balanced: bool = False
    """Whether meta-gradients are divided by the running root mean square of those of the same entry of the mixture, so
    that all entries have an equal say, whatever their losses differ by."""
    random_signs: bool = False
    """Whether stored parameters have random signs: less noise in the meta-gradient of a rule that is not odd."""

    def __post_init__(self) -> None:
        check_range("horizon", self.horizon, 1)
        if self.truncation == "whole":
            if self.truncation_up_to is not None or self.truncation_growth is not None:
                raise ValueError('truncation = "whole" leaves nothing to truncation_up_to and truncation_growth')
        elif self.truncation_up_to is not None:
            check_range("truncation and truncation_up_to", (self.truncation, self.truncation_up_to), 1)
            if self.truncation_growth is not None:
                raise ValueError("truncation_growth and truncation_up_to exclude each other; leave one out")
        check_range("rescale_range", self.rescale_range, 0, included=False)
        if self.windows_per_step > self.pool:
            raise ValueError(f"windows_per_step cannot exceed pool, got {self.windows_per_step} and {self.pool}")

    def whole_windows(self, horizon: int) -> int:
        """Inner steps of a training up to this horizon, which is rounded up where all windows have the same length."""
        fixed = self.truncation_growth is None and self.truncation_up_to is None
        if self.truncation == "whole" or not fixed:
            return horizon
        return -(-horizon // self.truncation) * self.truncation

    def window(self, meta_step: int, to_horizon: int, rng: np.random.Generator) -> int:
        """Steps of a window that begins ``to_horizon`` before its horizon; ``rng`` is used only if they are random."""
        if self.truncation == "whole":
            return to_horizon
        if self.truncation_growth is not None:
            return min(self.truncation_growth.window(self.truncation, meta_step, rng), to_horizon)
        if self.truncation_up_to is not None:
            return min(log_uniform_integer(rng, (self.truncation, self.truncation_up_to)), to_horizon)
        return self.truncation


@dataclass(frozen=True)
class MetaOptimizerConfig(Strict):
    """The optimizer that steps the meta-parameters; options that the named one does not have are refused."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Positive = 1e-3
    rates: dict[str, Positive] = field(default_factory=dict)
    """Learning rates that single parameters have in place of ``lr``, by their names."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decays of the means, for Adam and AdamW."""
    weight_decay: NotNegative = 0.0
    """Weight decay, for AdamW and SGD."""
    momentum: Decay = 0.0
    """Momentum, for SGD."""
    schedule: Literal["constant", "cosine", "linear", "exponential"] = "constant"
    """Course of the rate, after the warm-up and up to the last meta-step."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Meta-steps over which the rate rises linearly to ``lr``."""
    final_fraction: Probability = 0.0
    """The rate at the end of the decay, relative to ``lr``."""
    clip_value: Positive | None = None
    """Upper bound of each entry of the meta-gradient, in absolute value (Metz et al. 2019: 0.1)."""
    clip_norm: Positive | None = None
    """Upper bound of the meta-gradient's norm, after that."""
    average: Decay = 0.0
    """Decay of the exponential average of the weights that is validated and kept; 0: the weights themselves."""

    def __post_init__(self) -> None:
        own = {"adam": ("betas",), "adamw": ("betas", "weight_decay"), "sgd": ("weight_decay", "momentum")}[self.name]
        shared = ("lr", "rates", "schedule", "warmup", "final_fraction", "clip_value", "clip_norm", "average")
        refuse_changed(self, (*own, *shared), f"meta-optimizer {self.name!r}")
        if self.schedule == "constant" and self.final_fraction > 0:
            raise ValueError('final_fraction needs schedule = "cosine", "linear" or "exponential"')
        if self.schedule == "exponential" and self.final_fraction == 0:
            raise ValueError('schedule = "exponential" needs a final_fraction above 0, for example 0.01')


@dataclass(frozen=True)
class SuiteConfig(Strict):
    """Validation tasks under a name of their own."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    families: tuple[TaskConfig, ...] = ()
    """The suite's families, in TOML ``[[validation.suites.families]]`` tables; none: the mixture that is trained on."""
    horizon: Count | None = None
    """Inner steps; None, here and below: as in ``[validation]``."""
    tasks: Count | None = None
    """Tasks drawn from each family."""
    instances: Count | None = None
    """Copies of each task."""


@dataclass(frozen=True)
class ValidationConfig(Strict):
    """Held-out tasks on which the best weights are chosen."""

    every: Count = 100
    """Meta-steps between validations."""
    horizon: Count = 100
    """Inner steps."""
    tasks: Count = 1
    """Tasks drawn from each family."""
    instances: Count = 16
    """Copies of each task."""
    solved: Positive = 1e-3
    """Fraction of the initial loss that a final loss counts as at least, lest a few noiseless tasks decide."""
    suites: tuple[SuiteConfig, ...] = (SuiteConfig("mixture"),)
    """Suites of validation tasks."""
    select: str | None = None
    """Name of the suite whose score chooses the best weights; None: the first."""
    baselines: bool = True
    """Whether that suite also scores the start, the default rule, outputs of zero and tuned Adam, before the first
    meta-step. The start then counts as the best weights so far."""

    def __post_init__(self) -> None:
        names = [suite.name for suite in self.suites]
        if not names:
            raise ValueError("at least one suite is needed; leave suites out for the mixture")
        if len(set(names)) < len(names):
            raise ValueError(f"suites need names of their own, got {', '.join(names)}")
        if self.select is not None and self.select not in names:
            raise ValueError(f"select: {unknown(self.select, names)}")

    @property
    def selected(self) -> str:
        """Name of the suite that chooses the best weights."""
        return self.suites[0].name if self.select is None else self.select


@dataclass(frozen=True)
class CurriculumConfig(Strict):
    """Horizons that grow when validation says so (Chen et al. 2020, section 4.1); they replace ``unroll.horizon``."""

    horizons: Annotated[tuple[Count, ...], Field(min_length=1)]
    """One for each stage, increasing."""
    every: Count = 100
    """Meta-steps between evaluations at the next stage's horizon (at the last stage, at its own)."""
    evaluations: Count = 3
    """A stage ends no earlier than with this many."""

    def __post_init__(self) -> None:
        if any(low >= high for low, high in itertools.pairwise(self.horizons)):
            raise ValueError(f"horizons must increase from stage to stage, got {list(self.horizons)}")


@dataclass(frozen=True)
class Config(Strict):
    """Everything that determines a meta-training run, apart from the machine."""

    tasks: tuple[TaskConfig, ...]
    """The mixture that tasks are drawn from."""
    steps: Count
    """Meta-steps."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Everything random follows from it, and from counters."""
    description: str = ""
    """Goes into the weights file."""
    rule: RuleConfig = RuleConfig()
    """The rule that is meta-trained, and the weights it starts from."""
    unroll: UnrollConfig = UnrollConfig()
    """Inner training: windows, horizons, how many at a time."""
    estimator: InstanceOf[Estimator] = field(default_factory=TruncatedBPTT)
    """The estimator that makes a meta-gradient of a window."""
    meta_optimizer: MetaOptimizerConfig = MetaOptimizerConfig()
    """The optimizer that makes a meta-step of a meta-gradient."""
    validation: ValidationConfig = ValidationConfig()
    """The validation that chooses the best weights."""
    curriculum: CurriculumConfig | None = None
    """Stages of growing horizons; None: ``unroll.horizon`` throughout."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("at least one [[tasks]] entry is needed")
        if isinstance(self.estimator, PerturbationEstimator):
            instances, groups = self.unroll.instances, self.estimator.groups
            if groups is not None and instances % groups:
                raise ValueError(f"estimator.groups must divide unroll.instances, got {groups} and {instances}")
            if isinstance(self.estimator, Combined) and self.estimator.pairs * (groups or instances) < 2:
                raise ValueError("the combined estimator needs two pairs or more; raise its pairs, or unroll.instances")
        if any(task.anchor for task in self.tasks) and not isinstance(self.estimator, OutputES):
            raise ValueError('anchor needs estimator.name = "output-es"')
        if self.curriculum is not None and self.unroll.horizon != UnrollConfig.horizon:
            raise ValueError("curriculum.horizons replace unroll.horizon; leave one of them out")

    @property
    def families(self) -> list[TaskConfig]:
        """All families that are named: of the mixture and of the suites."""
        return [*self.tasks, *(family for suite in self.validation.suites for family in suite.families)]

    def to_json(self) -> str:
        """The configuration as JSON, keys sorted: what run folders and weights files record."""
        tables = {**dataclasses.asdict(self), "estimator": self.estimator.to_table()}
        return json.dumps(tables, sort_keys=True, allow_nan=False)
