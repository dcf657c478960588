"""Settings of a run beside their defaults."""

import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from learned_optim.meta_train.common.strict import dataclass_of
from learned_optim.meta_train.trainer.kind import RunKind

NO_DEFAULT = object()


class Setting(NamedTuple):
    """One value of a configuration."""

    name: str
    """Dotted: ``unroll.pool``, ``tasks[0].weight``."""
    value: Any
    default: Any
    """:data:`NO_DEFAULT` where it must be given, or is not known to this version."""


def settings_of(config: Mapping[str, Any], kind: RunKind) -> list[Setting]:
    """All settings of a run of this kind; what an older version did not know is at its default."""
    return list(_settings(config, NO_DEFAULT, kind.config_class, "", kind))


def _settings(value: Any, default: Any, cls: Any, place: str, kind: RunKind) -> Iterator[Setting]:
    """The settings in ``value``, which lies at ``place``; its tables are read into the class ``cls``, if known."""
    if isinstance(value, Mapping):
        defaults = {**_defaults(cls), **(default if isinstance(default, Mapping) else {})}
        for key, entry in {**defaults, **value}.items():
            below = f"{place}.{key}" if place else str(key)
            below_cls = kind.options_class(key, value) if key in value else None
            below_cls = dataclass_of(cls, key) if below_cls is None else below_cls
            yield from _settings(entry, defaults.get(key, NO_DEFAULT), below_cls, below, kind)
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        defaults_of_entries = default if isinstance(default, list) else []
        for index, entry in enumerate(value):
            own = defaults_of_entries[index] if index < len(defaults_of_entries) else NO_DEFAULT
            yield from _settings(entry, own, cls, f"{place}[{index}]", kind)
    else:
        yield Setting(place, value, default)


def _defaults(cls: Any) -> dict[str, Any]:
    """Defaults of a class's fields or, where it is no dataclass, of its constructor, as JSON gives them."""
    if cls is None:
        return {}
    if dataclasses.is_dataclass(cls):
        values = {field.name: _default(field) for field in dataclasses.fields(cls)}
    else:
        parameters = inspect.signature(cls).parameters
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
