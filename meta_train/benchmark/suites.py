"""Suites: problems on which optimizers are compared, as data."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from learned_optim.meta_train.benchmark.evaluation import RATES
from learned_optim.meta_train.common.module_search import search_in
from learned_optim.meta_train.common.strict import ConfigError, Count, Positive, Strict, checked, read_toml, unknown
from learned_optim.meta_train.tasks import Split, TaskFamily
from learned_optim.meta_train.tasks.lookup import build_family, gather_options
from learned_optim.terminal import printable

SUITES_FOLDER = Path(__file__).resolve().parent.parent / "suites"
MODEL_STEPS = 1_000  # of a user's own model, unless asked otherwise

Seeds = Annotated[int, Field(ge=2)]
"""The number of seeds: at least two, since one alone has no band."""


@dataclass(frozen=True)
class SuiteProblem(Strict):
    """One problem. In TOML the family's options stand beside these keys; a list of ``steps`` makes several problems.

    What stands above all problems (:data:`DEFAULTS`) holds for each that does not say otherwise.
    """

    name: str
    family: str
    """A shipped family's name, ``package.module:Class`` or ``FILE.py:Class``."""
    steps: Count
    title: str = ""
    """The title in tables and figures; empty: the name."""
    seeds: Seeds = 8
    """Training runs of each optimizer, which share nothing with those it is tuned on."""
    tuning_seeds: Count = 8
    """Training runs of each rate that is tried."""
    instances: Count | None = None
    """Training runs that advance side by side; None: all. Fewer need less memory and lose less to an interruption."""
    rules: tuple[str, ...] = ("default",)
    """Learned rules that are compared unless others are asked for."""
    draw: Annotated[int, Field(ge=0)] = 0
    """The number of the draw that gives the task, for a family with ranges."""
    split: Split = "test"
    """Part of the data."""
    held_out: Annotated[int, Field(ge=0)] | None = None
    """Rows of the data held out on which losses are taken along the way. A fifth of the data is then held out of all
    trainings (:meth:`~learned_optim.meta_train.tasks.Task.hold_out`). None: 500 where the task has data to hold out. 0:
    all data are trained on."""
    options: dict[str, Any] = field(default_factory=dict)
    """The family's own options."""

    def build(self) -> TaskFamily:
        """The family with its options checked; one for evaluation only is welcome here."""
        return build_family(self.family, self.options, f"problem {self.name!r}")

    @property
    def label(self) -> str:
        """Title, with the number of steps; for tables and figures."""
        return printable(f"{self.title or self.name}, {self.steps:,} steps")


@dataclass(frozen=True)
class Suite(Strict):
    """Problems, and what they are compared with."""

    name: str
    problems: tuple[SuiteProblem, ...]
    title: str = ""
    baselines: tuple[str, ...] = ("Adam", "AdamW", "AdamW-cosine", "RMSprop", "SGD", "Momentum", "NAG")
    """Names from :data:`~learned_optim.meta_train.benchmark.evaluation.BASELINES`, tuned; ``NAME@RATE`` is taken as it
    is."""
    rivals: tuple[str, ...] = ()
    """Names from :data:`~learned_optim.meta_train.benchmark.rivals.RIVALS`, likewise, that are shown too where their
    packages are installed, unless others are asked for."""
    rates: tuple[Positive, ...] = RATES
    """Grid on which baselines are tuned; continued while one of its ends is the best."""
    seconds: bool = False
    """Whether seconds are measured unless the command says otherwise."""

    def __post_init__(self) -> None:
        if not (self.problems and self.rates):
            raise ValueError("at least one [[problems]] entry and one of rates are needed")
        names = [problem.name for problem in self.problems]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two problems have the name {twice[0]!r}")

    def only(self, names: Iterable[str]) -> "Suite":
        """The suite with some of its problems; raises ``ConfigError`` for one that it does not have."""
        problems = {problem.name: problem for problem in self.problems}
        chosen = dict.fromkeys(names)
        if absent := [name for name in chosen if name not in problems]:
            raise ConfigError(f"suite {self.name!r}: problems: {unknown(absent[0], problems)}")
        return dataclasses.replace(self, problems=tuple(problems[name] for name in chosen))

    def with_seeds(self, seeds: int) -> "Suite":
        """The suite with another number of training runs, and no more of them for tuning."""
        if seeds < 2:
            raise ConfigError(f"at least 2 seeds are needed for a band, got {seeds}")
        problems = [
            dataclasses.replace(problem, seeds=seeds, tuning_seeds=min(problem.tuning_seeds, seeds))
            for problem in self.problems
        ]
        return dataclasses.replace(self, problems=tuple(problems))


DEFAULTS = {"seeds", "tuning_seeds", "instances", "rules", "steps", "split", "held_out"}
"""Keys of a problem that may stand above all of them instead."""
PROBLEM_KEYS = {f.name for f in dataclasses.fields(SuiteProblem)}


def shipped_suites() -> dict[str, Path]:
    """Suites that come with the package, by name."""
    return {path.stem: path for path in sorted(SUITES_FOLDER.glob("*.toml"))}


def load_suite(source: str | Path) -> Suite:
    """Read a suite: a shipped one by name, or a TOML file.

    Raises:
        ConfigError: no such suite, not TOML, an unknown key, or a value that is not allowed.
    """
    shipped = shipped_suites()
    path = shipped.get(str(source), Path(source))
    if not path.is_file():
        if path.suffix == ".toml":
            raise ConfigError(f"no suite file {path}")
        raise ConfigError(f"suite: {unknown(str(source), shipped)}; or give the path of a TOML file")
    tables = read_toml(path)
    if path.parent != SUITES_FOLDER:
        search_in(path.parent)
    return suite_from_tables({"name": path.stem, **tables}, str(source))


def suite_from_tables(tables: Mapping[str, Any], source: str = "suite") -> Suite:
    """Check nested tables, as TOML gives them, and build the suite; raises like :func:`load_suite`."""
    defaults = {key: tables[key] for key in DEFAULTS if key in tables}
    rest = {key: value for key, value in tables.items() if key not in DEFAULTS}
    if isinstance(rest.get("problems"), list):
        rest["problems"] = [problem for entry in rest["problems"] for problem in _expanded(entry, defaults)]
    suite = checked(Suite, rest, source)
    for problem in suite.problems:
        problem.build()
    return suite


def suite_of_model(model: str, steps: int | None = None) -> Suite:
    """A suite of one problem: a user's own model, ``FILE.py:Class``."""
    name = model.rpartition(":")[2]
    file, colon, attribute = model.partition(":")
    family = f"{Path(file).resolve()}{colon}{attribute}" if file.endswith(".py") else model  # a path as it was typed
    problem = {"name": name, "family": family, "steps": MODEL_STEPS if steps is None else steps}
    return suite_from_tables({"name": name, "problems": [problem]}, f"--model {model}")


def chosen_suite(
    source: str | None,
    model: str | None = None,
    *,
    problems: Sequence[str] = (),
    seeds: int | None = None,
    steps: int | None = None,
) -> Suite:
    """The suite, or that of a user's own model, cut to some problems and with another number of seeds.

    Raises:
        ValueError: neither or both, ``steps`` for a suite, or what the suite does not have.
    """
    if source is not None and model is None and source.partition(":")[0].endswith(".py"):
        source, model = None, source
    if (source is None) == (model is None):
        raise ValueError(
            f"name a suite ({', '.join(shipped_suites())}, or a TOML file), or your own --model FILE.py:CLASS"
        )
    if source is not None:
        if steps is not None:
            raise ValueError("--steps goes with --model; a suite says itself how long its problems are")
        suite = load_suite(source)
    else:
        suite = suite_of_model(str(model), steps)
    if problems:
        suite = suite.only(problems)
    return suite if seeds is None else suite.with_seeds(seeds)


def listing() -> str:
    """The shipped suites and their problems."""
    lines = []
    for name in shipped_suites():
        suite = load_suite(name)
        lines.append(f"{name:20}{suite.title}")
        lines += [f"  {problem.name:30}{problem.label}" for problem in suite.problems]
    return "\n".join(lines)


def titles(problems: Sequence[SuiteProblem]) -> dict[str, str]:
    """Problem -> label."""
    return {problem.name: problem.label for problem in problems}


def _expanded(entry: Any, defaults: Mapping[str, Any]) -> list[Any]:
    """An entry with the suite's defaults; one with several ``steps`` as several, ``NAME-STEPS``."""
    entry = gather_options(entry, PROBLEM_KEYS)
    if not isinstance(entry, Mapping):
        return [entry]
    entry = {**defaults, **entry}
    if not isinstance(entry.get("steps"), list):
        return [entry]
    return [{**entry, "name": f"{entry.get('name')}-{steps}", "steps": steps} for steps in entry["steps"]]
