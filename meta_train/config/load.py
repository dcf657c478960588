"""Configuration of a meta-training run: TOML in, frozen dataclasses out."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from learned_optim.meta_train.common.module_search import search_in
from learned_optim.meta_train.common.strict import ConfigError, checked, read_toml
from learned_optim.meta_train.config.settings import Config, TaskConfig
from learned_optim.meta_train.estimators.lookup import build_estimator
from learned_optim.meta_train.tasks.lookup import gather_options

__all__ = [
    "Config",
    "ConfigError",
    "TaskConfig",
    "config_from_tables",
    "differences",
    "flat",
    "load_config",
    "load_tables",
    "shipped_configs",
    "tables_of",
    "toml_files",
]


class Recorded(Protocol):
    """A configuration that can be written down."""

    def to_json(self) -> str:
        """The whole configuration as JSON can hold it."""
        ...


def load_config(source: str | Path, overrides: Sequence[str] = (), *, resuming: bool = False) -> Config:
    """Read a TOML file, or a shipped configuration by name, and apply ``key.path=value`` overrides.

    Args:
        source: path of the file, or one of :func:`shipped_configs`.
        overrides: each sets one value, such as ``unroll.pool=8``.
        resuming: whether a run is resumed, as for :func:`config_from_tables`.

    Raises:
        ConfigError: file missing or not TOML, unknown key, wrong type, or a value out of range.
    """
    return config_from_tables(load_tables(source, overrides), str(source), resuming=resuming)


def load_tables(
    source: str | Path, overrides: Sequence[str] = (), shipped: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """The nested tables of a configuration of whatever kind, with ``overrides`` applied, not yet checked.

    Modules with task families of the user's own are looked for beside the file from then on.

    Args:
        source: path of the file, or a name among the ``shipped``.
        overrides: each sets one value, such as ``unroll.pool=8``.
        shipped: the files of configurations that come with the package, by name; None: :func:`shipped_configs`.

    Raises:
        ConfigError: file missing or not TOML, or an override that names no place.
    """
    path = _locate(source, shipped_configs() if shipped is None else shipped)
    if str(source) != path.stem:  # not a shipped one
        search_in(path.parent)
    tables = read_toml(path)
    for override in overrides:
        _override(tables, override)
    return tables


def config_from_tables(tables: Mapping[str, Any], source: str = "configuration", *, resuming: bool = False) -> Config:
    """Check nested tables, as TOML gives them, and build the configuration.

    Args:
        tables: the nested tables as TOML gives them.
        source: the place that errors name.
        resuming: leave out what is needed only at the start of a run: the weights in ``rule.start_from``.

    Raises:
        ConfigError: unknown key, wrong type, or a value out of range.
    """
    tables = dict(tables)
    _gather_all(tables, "tasks")
    if isinstance(tables.get("unroll"), Mapping):
        tables["unroll"] = _whole_trainings_by_name(tables["unroll"])
    if isinstance(validation := tables.get("validation"), Mapping) and isinstance(validation.get("suites"), list):
        suites = [dict(suite) if isinstance(suite, Mapping) else suite for suite in validation["suites"]]
        for suite in suites:
            _gather_all(suite, "families")
        tables["validation"] = {**validation, "suites": suites}
    if "estimator" in tables:
        tables["estimator"] = build_estimator(tables["estimator"], source)
    config = checked(Config, tables, source)
    for family in config.families:  # before the rule: the file of a user's family may enter an architecture
        family.build()
    rule = config.rule.fresh(config.seed) if resuming else config.rule.build(config.seed)
    try:
        config.estimator.check(rule)
    except ValueError as error:
        raise ConfigError(f"{source}: estimator: {error}") from error
    try:
        config.to_json()
    except (TypeError, ValueError) as error:  # dates and times; infinity and NaN
        raise ConfigError(f"{source}: only finite numbers, strings, booleans, lists and tables: {error}") from error
    return config


def differences(first: Recorded, second: Recorded) -> list[str]:
    """The settings in which two configurations differ, one ``key: value, not value`` each; descriptions do not count.

    ``first`` has the value that stands first, ``second`` the other.
    """
    tables = [flat({**json.loads(config.to_json()), "description": ""}) for config in (first, second)]
    values = {name: [table.get(name) for table in tables] for name in tables[0] | tables[1]}
    return [
        f"{name}: {json.dumps(one)}, not {json.dumps(other)}" for name, (one, other) in values.items() if one != other
    ]


def flat(table: Any, place: str = "") -> dict[str, Any]:
    """Values of nested tables and lists of tables by dotted names: ``unroll.pool``, ``tasks[0].weight``.

    ``place`` stands before all names: where ``table`` itself lies.
    """
    if isinstance(table, Mapping):
        entries = [(f"{place}.{key}" if place else str(key), value) for key, value in table.items()]
    elif isinstance(table, list) and any(isinstance(entry, Mapping) for entry in table):
        entries = [(f"{place}[{index}]", value) for index, value in enumerate(table)]
    else:
        return {place: table}
    return {name: value for entry, below in entries for name, value in flat(below, entry).items()}


def shipped_configs() -> dict[str, Path]:
    """Configurations that come with the package, by name."""
    return toml_files(Path(__file__).parents[1] / "configs")


def toml_files(folder: Path) -> dict[str, Path]:
    """The TOML files in a ``folder``, by name."""
    return {path.stem: path for path in sorted(folder.glob("*.toml"), key=lambda path: path.stem)}


def _locate(source: str | Path, shipped: Mapping[str, Path]) -> Path:
    if str(source) in shipped:
        return shipped[str(source)]
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}; shipped ones: {', '.join(shipped)}")
    return path


def _whole_trainings_by_name(unroll: Mapping[str, Any]) -> Mapping[str, Any]:
    """``[unroll]`` in the words of this version: earlier ones named the longest horizon twice for whole trainings."""
    truncation, horizon = unroll.get("truncation"), unroll.get("horizon")
    if not isinstance(truncation, int) or unroll.get("truncation_up_to") != truncation:
        return unroll
    if not isinstance(horizon, list) or not isinstance(horizon[-1], int) or truncation < horizon[-1]:
        return unroll
    return {**unroll, "truncation": "whole", "truncation_up_to": None}


def _gather_all(tables: Any, key: str) -> None:
    """Let the families in the list ``key`` have their options in a table of their own."""
    if isinstance(tables, dict) and isinstance(tables.get(key), list):
        tables[key] = [gather_options(entry, {"family", "weight", "anchor", "augment"}) for entry in tables[key]]


def tables_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Nested tables from nothing but ``overrides``, texts ``key.path=value``; ``ConfigError`` for another text."""
    tables: dict[str, Any] = {}
    for override in overrides:
        _override(tables, override)
    return tables


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
