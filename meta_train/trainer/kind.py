"""The kinds of run that there are: all are trained by one loop, and differ in what is meta-trained.

A run's configuration shows its kind. The rooms up to the reports know the kind that trains a rule; whoever knows others
hands them over: see :mod:`learned_optim.meta_train.kinds`.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NotRequired

from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from learned_optim.meta_train.common.strict import Count, without_former
from learned_optim.meta_train.config.load import config_from_tables, load_tables, shipped_configs
from learned_optim.meta_train.config.settings import Config, ValidationConfig
from learned_optim.meta_train.estimators import ESTIMATORS
from learned_optim.meta_train.estimators.lookup import FORMER_ESTIMATOR_DEFAULTS
from learned_optim.meta_train.inner.distributed import World
from learned_optim.meta_train.tasks import FAMILIES
from learned_optim.meta_train.trainer.checkpoint import read_checkpoint
from learned_optim.meta_train.trainer.loop import MetaTraining
from learned_optim.meta_train.trainer.record import search_modules_of
from learned_optim.meta_train.trainer.trainer import Trainer
from learned_optim.rules import ARCHITECTURES

Tables = Mapping[str, Any]
"""A configuration as TOML or JSON gives it: nested tables."""


class RunKind(ABC):
    """A kind of run: its configuration, its beginning, how it is resumed and how reports describe it."""

    config_class: ClassVar[type]
    """The dataclass of their configurations."""
    shape: ClassVar[type]
    """A ``TypedDict`` of the part of a configuration, of whatever version, that the methods below read."""

    @abstractmethod
    def has(self, tables: Tables) -> bool:
        """Whether this is the configuration of such a run."""

    @abstractmethod
    def shipped(self) -> dict[str, Path]:
        """Configurations that come with the package, by name."""

    @abstractmethod
    def configuration(self, tables: Tables, source: str, *, resuming: bool = False) -> Any:
        """The checked configuration; ``ConfigError`` names the ``source``.

        ``resuming`` leaves out what is needed only at the start of a run.
        """

    @abstractmethod
    def begin(self, config: Any, folder: Path, world: World) -> MetaTraining[Any, Any]:
        """A run at its start."""

    @abstractmethod
    def resume(self, folder: Path, world: World) -> MetaTraining[Any, Any]:
        """The run in ``folder`` at its checkpoint; errors as of :meth:`Trainer.resume`."""

    @abstractmethod
    def options_class(self, key: str, table: Tables) -> Any:
        """The class whose options the entry ``key`` of ``table`` holds, where the table names it; None elsewhere."""

    @abstractmethod
    def without_former_options(self, tables: Tables) -> dict[str, Any]:
        """The tables without options that earlier versions recorded although the run does not have them."""

    @abstractmethod
    def summary(self, tables: Tables) -> dict[str, Any]:
        """Entries of a table of runs: ``rule``, ``families`` with their counts, and ``estimator``."""

    @abstractmethod
    def validated_on(self, tables: Tables) -> str:
        """The tasks of validation, and their length: scores on other ones are not to be compared."""

    @abstractmethod
    def meta_loss(self, tables: Tables) -> str:
        """A name for the scale of the meta-loss: numbers under different names are not to be compared."""


class _Named(TypedDict):
    name: str


class _Architecture(TypedDict):
    architecture: str


class _Family(TypedDict):
    family: str


class _Suite(TypedDict):
    name: str
    horizon: NotRequired[Count | None]
    families: NotRequired[list[_Family]]


class _Validation(TypedDict):
    horizon: NotRequired[Count]
    suites: NotRequired[list[_Suite]]
    select: NotRequired[str | None]


class _RuleTables(TypedDict):
    """The part of a configuration that a summary reads."""

    steps: Count
    description: NotRequired[str]
    rule: _Architecture
    tasks: list[_Family]
    estimator: _Named
    validation: NotRequired[_Validation]


class RuleKind(RunKind):
    """Runs that meta-train a rule."""

    config_class = Config
    shape = _RuleTables

    def has(self, tables: Tables) -> bool:
        """Whether there is no algorithm in place of the rule."""
        return "algorithm" not in tables

    def shipped(self) -> dict[str, Path]:
        """Configurations that come with the package, by name."""
        return shipped_configs()

    def configuration(self, tables: Tables, source: str, *, resuming: bool = False) -> Config:
        """The checked configuration."""
        return config_from_tables(tables, source, resuming=resuming)

    def begin(self, config: Any, folder: Path, world: World) -> Trainer:
        """A run at its start."""
        return Trainer(config, folder, world.device, world=world)

    def resume(self, folder: Path, world: World) -> Trainer:
        """The run in ``folder`` at its checkpoint."""
        return Trainer.resume(folder, world.device, world)

    def options_class(self, key: str, table: Tables) -> Any:
        """The family, architecture or estimator that the table names."""
        if key == "estimator":
            entry = table[key]
            return ESTIMATORS.get(str(entry.get("name"))) if isinstance(entry, Mapping) else None
        if key == "settings":
            return ARCHITECTURES.get(str(table.get("architecture")))
        return FAMILIES.get(str(table.get("family"))) if key == "options" else None

    def without_former_options(self, tables: Tables) -> dict[str, Any]:
        """The tables without options of other estimators."""
        table = tables["estimator"]
        estimator = ESTIMATORS.get(table["name"])
        table = table if estimator is None else without_former(estimator, table, FORMER_ESTIMATOR_DEFAULTS)
        return {**tables, "estimator": table}

    def summary(self, tables: Tables) -> dict[str, Any]:
        """Architecture, families and estimator."""
        return {
            "rule": tables["rule"]["architecture"],
            "families": dict(Counter(task["family"] for task in tables["tasks"])),
            "estimator": tables["estimator"]["name"],
        }

    def validated_on(self, tables: Tables) -> str:
        """Families and horizon of the suite that chooses the best weights."""
        validation = tables.get("validation", {})
        suites = validation.get("suites") or [{"name": "mixture"}]
        suite = next((suite for suite in suites if suite["name"] == validation.get("select")), suites[0])
        horizon = suite.get("horizon") or validation.get("horizon", ValidationConfig.horizon)
        families = Counter(task["family"] for task in suite.get("families") or tables["tasks"])
        names = (name if count == 1 else f"{count} {name}" for name, count in families.items())
        return f"{horizon:,} steps of {', '.join(names)}"

    def meta_loss(self, tables: Tables) -> str:
        """The name of the meta-loss."""
        return str(tables["estimator"].get("meta_loss", "mean"))


RULE = RuleKind()
"""The kind of runs that meta-train a rule."""


def kind_of(tables: Tables, kinds: Iterable[RunKind]) -> RunKind:
    """The kind, of those that are known, of the run with this configuration.

    Raises:
        ValueError: it is none of them.
    """
    for kind in kinds:
        if kind.has(tables):
            return kind
    raise ValueError("this configuration trains an algorithm, not a rule: open it where few-shot runs are known")


def load_run_config(
    source: str | Path, kinds: Sequence[RunKind], overrides: Sequence[str] = (), *, resuming: bool = False
) -> Any:
    """The configuration in a TOML file, or a shipped one, of whichever kind; otherwise like :func:`load_config`."""
    shipped = {name: path for kind in kinds for name, path in kind.shipped().items()}
    tables = load_tables(source, overrides, shipped)
    return kind_of(tables, kinds).configuration(tables, str(source), resuming=resuming)


def begin_run(config: Any, folder: Path, kinds: Iterable[RunKind], world: World) -> MetaTraining[Any, Any]:
    """A run of whichever kind at its start."""
    kind = next(kind for kind in kinds if isinstance(config, kind.config_class))
    return kind.begin(config, folder, world)


def resume_run(folder: Path, kinds: Iterable[RunKind], world: World) -> MetaTraining[Any, Any]:
    """The run in ``folder``, of whichever kind, at its checkpoint; errors as of :meth:`Trainer.resume`."""
    search_modules_of(folder)
    return kind_of(read_checkpoint(folder, with_tensors=False).config, kinds).resume(folder, world)
