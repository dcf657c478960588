"""Task families by the names that stand in configurations and suites."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learned_optim.meta_train.common.module_search import searched_folders
from learned_optim.meta_train.common.strict import ConfigError, checked, unknown
from learned_optim.meta_train.tasks import FAMILIES, TaskFamily
from learned_optim.meta_train.tasks.users import load_model


def gather_options(entry: Any, own: set[str]) -> Any:
    """A table with all keys but its ``own`` moved into a table "options", unless it has one."""
    if not isinstance(entry, Mapping) or "options" in entry:
        return entry
    options = {key: value for key, value in entry.items() if key not in own}
    return {**{key: value for key, value in entry.items() if key in own}, "options": options}


def build_family(name: str, options: Mapping[str, Any], source: str) -> TaskFamily:
    """A family with its options checked.

    Args:
        name: a shipped family's name, ``package.module:Class`` or ``FILE.py:Class``.
        options: its fields.
        source: how an error calls it.

    Raises:
        ConfigError: no such family, or options that it does not have or take.
    """
    if name in FAMILIES:
        return checked(FAMILIES[name], options, source)
    module, colon, attribute = name.partition(":")
    if not colon and name.endswith(".py"):
        raise ConfigError(f"{source}: which class of {name}? write FILE.py:CLASS")
    if not colon:
        raise ConfigError(f"{source}: {unknown(name, FAMILIES)}; your own is written package.module:Class")
    if module.endswith(".py"):
        return _family_of_model(name, options, source)
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: no name before the colon
        raise ConfigError(f"{source}: cannot import {name!r}: {error}; looked {_places()}") from error
    if not (isinstance(cls, type) and issubclass(cls, TaskFamily)):
        raise ConfigError(f"{source}: {name!r} is not a sub-class of TaskFamily")
    return checked(cls, options, source)


def _family_of_model(name: str, options: Mapping[str, Any], source: str) -> TaskFamily:
    try:
        cls = load_model(name)
    except FileNotFoundError as error:
        file = name.partition(":")[0]
        places = "" if Path(file).is_absolute() else f"; looked {_places()}"
        raise ConfigError(f"{source}: no file {file}{places}") from error
    except (ImportError, AttributeError, OSError, TypeError) as error:
        raise ConfigError(f"{source}: {error}") from error
    if isinstance(cls, TaskFamily):
        if options:
            raise ConfigError(f"{source}: {name!r} takes no options, got {', '.join(options)}")
        return cls
    return checked(cls, options, source)


def _places() -> str:
    """The places where modules and files of users are looked for, in words."""
    here = Path.cwd()
    beside = ", ".join(str(folder) for folder in searched_folders() if folder != here)
    return (f"beside the configuration, in {beside}, then " if beside else "") + f"in the current folder, {here}"
