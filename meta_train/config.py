"""Configuration of a meta-training run: TOML in, frozen dataclasses out, nothing unknown accepted."""

import dataclasses
import inspect
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from learned_optim.checkpoint import load_rule
from learned_optim.meta_train.estimators import ESTIMATORS, Estimator
from learned_optim.meta_train.meta_loss import MetaLossName
from learned_optim.meta_train.strict import ConfigError, Strict, checked, unknown
from learned_optim.meta_train.tasks import TaskFamily
from learned_optim.meta_train.tasks.lookup import build_family, gather_options
from learned_optim.meta_train.tasks.sampling import check_range
from learned_optim.rules import ARCHITECTURES, UpdateRule

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]

Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class RuleConfig(Strict):
    """Which rule is meta-trained."""

    architecture: str = "scale-free-lstm"
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
    """One family of the mixture. In TOML, the family's options stand beside ``family`` and ``weight``."""

    family: str
    """A shipped family's name, or ``package.module:Class`` for one's own."""
    weight: Positive = 1.0
    """How often it is drawn, relative to the others."""
    options: dict[str, Any] = field(default_factory=dict)
    """The family's own options."""

    def build(self) -> TaskFamily:
        """The family with its options checked."""
        family = build_family(self.family, self.options, f"tasks[{self.family}]")
        if family.evaluation_only:
            raise ConfigError(f"tasks[{self.family}]: not for meta-training: {family.evaluation_only}")
        return family


@dataclass(frozen=True)
class UnrollConfig(Strict):
    """How tasks are trained while the rule learns."""

    truncation: Count = 20
    """Inner steps of a window: the reach of the meta-gradient."""
    horizon: tuple[Count, Count] = (100, 100)
    """Range of the length of an inner training, drawn log-uniformly for each; rounded up to whole windows."""
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
    random_signs: bool = False
    """Whether stored parameters have random signs: less noise in the meta-gradient of a rule that is not odd."""

    def __post_init__(self) -> None:
        check_range("horizon", self.horizon, 1)
        check_range("rescale_range", self.rescale_range, 0, included=False)
        if self.windows_per_step > self.pool:
            raise ValueError(f"windows_per_step cannot exceed pool, got {self.windows_per_step} and {self.pool}")


@dataclass(frozen=True)
class EstimatorConfig(Strict):
    """How the meta-gradient is estimated; options that the named estimator does not have are refused."""

    name: Literal["truncated-bptt", "reparameterization", "es", "combined", "pes", "es-single"] = "truncated-bptt"
    meta_loss: MetaLossName = "mean"
    second_derivatives: bool = False
    replay_coordinates: Count | None = None
    """Coordinates that the meta-gradient is taken through; None: all."""
    sigma: Positive = 0.01
    """Standard deviation of the perturbations of the meta-parameters."""
    pairs: Count = 1
    """Antithetic pairs of perturbations that each instance is trained with."""
    groups: Count | None = None
    """Groups of instances with perturbations of their own; None: every instance."""
    covariance: bool = True
    """Whether the weights of the combination heed the covariance of its parts."""
    variance_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the running variances that weight the combination; 0: those of each window."""

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> Estimator:
        """The estimator."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "name"}
        changed = {f.name for f in dataclasses.fields(self) if f.name in given and given[f.name] != f.default}
        accepted = inspect.signature(ESTIMATORS[self.name]).parameters
        if refused := sorted(changed - set(accepted)):
            raise ValueError(f"estimator {self.name!r} has no option {refused[0]!r}; it has {', '.join(accepted)}")
        estimator: Estimator = ESTIMATORS[self.name](**{name: given[name] for name in accepted})
        return estimator


@dataclass(frozen=True)
class MetaOptimizerConfig(Strict):
    """Adam on the meta-parameters."""

    lr: Positive = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    clip_norm: Positive | None = None
    """Upper bound of the meta-gradient's norm."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the exponential average of the weights that is validated and kept; 0: the weights themselves."""


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


@dataclass(frozen=True)
class Config(Strict):
    """Everything that determines a meta-training run, apart from the machine."""

    tasks: tuple[TaskConfig, ...]
    steps: Count
    """Meta-steps."""
    seed: Annotated[int, Field(ge=0)] = 0
    description: str = ""
    rule: RuleConfig = RuleConfig()
    unroll: UnrollConfig = UnrollConfig()
    estimator: EstimatorConfig = EstimatorConfig()
    meta_optimizer: MetaOptimizerConfig = MetaOptimizerConfig()
    validation: ValidationConfig = ValidationConfig()

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("at least one [[tasks]] entry is needed")
        instances, groups = self.unroll.instances, self.estimator.groups
        if groups is not None and instances % groups:
            raise ValueError(f"estimator.groups must divide unroll.instances, got {groups} and {instances}")
        if self.estimator.name == "combined" and self.estimator.pairs * (groups or instances) < 2:
            raise ValueError("the combined estimator needs two pairs or more; raise its pairs, or unroll.instances")

    def to_json(self) -> str:
        """The configuration as JSON, keys sorted: what run folders and weights files record."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, allow_nan=False)


def load_config(source: str | Path, overrides: Sequence[str] = (), *, resuming: bool = False) -> Config:
    """Read a TOML file, or a shipped configuration by name, and apply ``key.path=value`` overrides.

    ``resuming``: see :func:`config_from_tables`.

    Raises:
        ConfigError: file missing or not TOML, unknown key, wrong type, or a value out of range.
    """
    path = _locate(source)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _override(tables, override)
    return config_from_tables(tables, str(source), resuming=resuming)


def config_from_tables(tables: Mapping[str, Any], source: str = "configuration", *, resuming: bool = False) -> Config:
    """Check nested tables, as TOML gives them, and build the configuration.

    ``resuming`` leaves out what is needed only at the start of a run: the weights in ``rule.start_from``.
    """
    tables = dict(tables)
    if isinstance(tables.get("tasks"), list):
        tables["tasks"] = [gather_options(entry, {"family", "weight"}) for entry in tables["tasks"]]
    config = checked(Config, tables, source)
    if resuming:
        config.rule.fresh(config.seed)
    else:
        config.rule.build(config.seed)
    for task in config.tasks:
        task.build()
    try:
        config.to_json()
    except (TypeError, ValueError) as error:  # dates and times; infinity and NaN
        raise ConfigError(f"{source}: only finite numbers, strings, booleans, lists and tables: {error}") from error
    return config


def differences(first: Config, second: Config) -> list[str]:
    """Where two configurations differ, one ``key: value, not value`` each; descriptions do not count."""
    tables = [{**json.loads(config.to_json()), "description": ""} for config in (first, second)]
    return _differences(tables[0], tables[1])


def _differences(first: Any, second: Any, place: str = "") -> list[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [*first, *(key for key in second if key not in first)]
        return [
            line
            for key in keys
            for line in _differences(first.get(key), second.get(key), f"{place}.{key}" if place else key)
        ]
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [line for index, pair in pairs for line in _differences(*pair, f"{place}[{index}]")]
    return [] if first == second else [f"{place}: {json.dumps(first)}, not {json.dumps(second)}"]


def shipped_configs() -> dict[str, Path]:
    """Configurations that come with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.toml"))}


def _locate(source: str | Path) -> Path:
    shipped = shipped_configs()
    if str(source) in shipped:
        return shipped[str(source)]
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}; shipped ones: {', '.join(shipped)}")
    return path


def _override(tables: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = re.findall(r"[^.\[\]]+", key)
    if not equals or not names:
        raise ConfigError(f"--set {override!r}: expected key=value, for example meta_optimizer.lr=1e-3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = names
    here: Any = tables
    for part in parents:
        if isinstance(here, list):
            here = _item(here, part, override)
        else:
            here = here.setdefault(part, {})
        if not isinstance(here, dict | list):
            raise ConfigError(f"--set {override!r}: {part!r} is not a table")
    if isinstance(here, list):
        raise ConfigError(f"--set {override!r}: name a key of an entry, for example tasks[0].weight=2")
    here[last] = value


def _item(entries: list[Any], index: str, override: str) -> Any:
    if not index.isdigit() or int(index) >= len(entries):
        raise ConfigError(f"--set {override!r}: no entry {index!r}; there are {len(entries)}, counted from 0")
    return entries[int(index)]
