"""Settings of a run beside their defaults."""

import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from learned_optim.meta_train.common.strict import dataclass_of
from learned_optim.meta_train.config.settings import Config
from learned_optim.meta_train.few_shot.settings import FEW_SHOT_TASKS, FewShotConfig, is_few_shot
from learned_optim.meta_train.tasks import FAMILIES
from learned_optim.rules import ARCHITECTURES

NO_DEFAULT = object()


class Setting(NamedTuple):
    """One value of a configuration."""

    name: str
    """Dotted: ``unroll.pool``, ``tasks[0].weight``."""
    value: Any
    default: Any
    """:data:`NO_DEFAULT` where it must be given, or is not known to this version."""


def settings_of(config: Mapping[str, Any]) -> list[Setting]:
    """All settings of a run of either kind; what an older version did not know is at its default."""
    kind = FewShotConfig if is_few_shot(config) else Config
    return list(_settings(config, NO_DEFAULT, kind, ""))


def _settings(value: Any, default: Any, kind: Any, place: str) -> Iterator[Setting]:
    """The settings in ``value``, which lies at ``place``; ``kind`` is what its tables are read into, if it is known."""
    if isinstance(value, Mapping):
        defaults = {**_defaults(kind), **(default if isinstance(default, Mapping) else {})}
        for key, entry in {**defaults, **value}.items():
            below = f"{place}.{key}" if place else str(key)
            yield from _settings(entry, defaults.get(key, NO_DEFAULT), _kind_below(kind, key, value), below)
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        defaults_of_entries = default if isinstance(default, list) else []
        for index, entry in enumerate(value):
            own = defaults_of_entries[index] if index < len(defaults_of_entries) else NO_DEFAULT
            yield from _settings(entry, own, kind, f"{place}[{index}]")
    else:
        yield Setting(place, value, default)


def _kind_below(kind: Any, key: str, table: Mapping[str, Any]) -> Any:
    if key == "options":  # of the family that is named beside them
        return ({**FAMILIES, **FEW_SHOT_TASKS}).get(str(table.get("family")))
    if key == "settings":  # of an architecture
        return ARCHITECTURES.get(str(table.get("architecture")))
    return dataclass_of(kind, key)


def _defaults(kind: Any) -> dict[str, Any]:
    """Defaults of a class's fields or, where it is no dataclass, of its constructor, as JSON gives them."""
    if kind is None:
        return {}
    if dataclasses.is_dataclass(kind):
        values = {field.name: _default(field) for field in dataclasses.fields(kind)}
    else:
        parameters = inspect.signature(kind).parameters
        values = {name: parameter.default for name, parameter in parameters.items()}
    known = {
        name: value for name, value in values.items() if value not in (dataclasses.MISSING, inspect.Parameter.empty)
    }
    found: dict[str, Any] = json.loads(json.dumps(known, default=_plain))
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
