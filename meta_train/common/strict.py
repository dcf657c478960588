"""Frozen dataclasses out of nested tables: nothing unknown accepted, and errors that say where and why."""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import Field, TypeAdapter, ValidationError

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]

Checked = TypeVar("Checked")
LONGEST = 200  # letters of a wrong value that a message shows


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where and why, on one line."""


class Strict:
    """Base of the dataclasses of a configuration."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # pydantic reads it from the class


def checked(cls: type[Checked], values: Mapping[str, Any], source: str, table: str = "") -> Checked:
    """An instance of the dataclass ``cls``.

    Args:
        cls: the dataclass.
        values: its fields by name.
        source: the place that the values come from, for messages.
        table: the table within the source that the values stand in, in messages; empty: the source itself.

    Raises:
        ConfigError: unknown or missing key, wrong type, or a value out of range.
    """
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        reasons = (_explain(item, cls, table) for item in error.errors())
        raise ConfigError("; ".join(f"{source}: {reason}" for reason in reasons)) from error


def checked_by_name(
    kinds: Mapping[str, type[Checked]],
    table: Any,
    source: str,
    place: str,
    default: str,
    former_defaults: Mapping[str, Any],
) -> Checked:
    """An instance of the dataclass that a table names, with the other entries of the table as its fields.

    Args:
        kinds: the dataclasses by the value of ``name`` in the table.
        table: the table as TOML gives it.
        source: the place that the table comes from, for messages.
        place: its key in the source, which is also what messages call the dataclasses.
        default: the name, if the table has none.
        former_defaults: entries that files of earlier versions have whatever the name; at these values they are left
            out for a dataclass that has no such field.

    Raises:
        ConfigError: no such name, no such field, wrong type, or a value out of range.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{source}: {place}: a table is needed, got {table!r}")
    name = table.get("name", default)
    if not isinstance(name, str) or name not in kinds:
        raise ConfigError(f"{source}: {place}.name: {unknown(str(name), kinds)}, got {name!r}")
    own = _field_names(kinds[name])
    values = {}
    for key, value in without_former(kinds[name], table, former_defaults).items():
        if key == "name":
            continue
        if key not in own and any(key in _field_names(kind) for kind in kinds.values()):
            raise ConfigError(f"{source}: {place}: {place} {name!r} has no option {key!r}; it has {', '.join(own)}")
        values[key] = value
    return checked(kinds[name], values, source, place)


def without_former(cls: type, table: Mapping[str, Any], former_defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A table without the entries, at these values, that earlier versions wrote although ``cls`` has no such field."""
    own = _field_names(cls)
    return {
        key: value
        for key, value in table.items()
        if key in own or key not in former_defaults or value != former_defaults[key]
    }


def _field_names(cls: Any) -> list[str]:
    """Names of the fields of a dataclass, those that are options of every kind (keywords alone) last."""
    return [field.name for field in sorted(dataclasses.fields(cls), key=lambda field: field.kw_only is True)]


def read_toml(path: Path) -> dict[str, Any]:
    """The nested tables of a TOML file, with or without the byte order mark that Windows' editors write.

    Raises:
        ConfigError: it is not TOML, not UTF-8, or nested too deeply.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def check_shape(cls: Any, values: Mapping[str, Any], source: str) -> None:
    """Raise :class:`ConfigError` unless ``values`` of a file have what a ``TypedDict`` names; they may have more."""
    try:
        TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        reasons = "; ".join(_explain(item, cls) for item in error.errors())
        raise ConfigError(f"{source} is damaged ({reasons})") from error


def refuse_changed(settings: Any, options: Sequence[str], owner: str) -> None:
    """Raise ``ValueError`` if something is not at its default that is no option of the ``owner``, named by ``name``."""
    for field in dataclasses.fields(settings):
        if field.name not in ("name", *options) and getattr(settings, field.name) != field.default:
            raise ValueError(f"{owner} has no option {field.name!r}; it has {', '.join(options)}")


def _explain(item: Any, cls: type, table: str = "") -> str:
    place = ".".join(str(part) for part in (*([table] if table else []), *item["loc"]))
    if item["type"] == "unexpected_keyword_argument":
        *parents, last = item["loc"]
        return f"unknown key {place!r}{_suggestion(str(last), _keys(cls, parents))}"
    if item["type"] == "value_error":  # raised by a __post_init__, which says what it was given
        return f"{place}: {item['ctx']['error']}" if place else str(item["ctx"]["error"])
    if item["type"].startswith("missing"):
        return f"{place}: {item['msg']}"
    given = repr(item["input"])
    given = given if len(given) <= LONGEST else f"{given[:LONGEST]}…"
    return f"{place}: {item['msg']}, got {given}" if place else f"{item['msg']}, got {given}"


def _keys(cls: Any, parents: Sequence[Any]) -> list[str]:
    for parent in parents:
        cls = cls if isinstance(parent, int) else dataclass_of(cls, parent)
    return [] if cls is None else [f.name for f in dataclasses.fields(cls)]


def dataclass_of(cls: Any, name: str) -> Any:
    """The dataclass that the tables in a field of ``cls`` are read into; None: there is none, or no such field."""
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    annotation = next((f.type for f in fields if f.name == name), None)
    within = (annotation, *get_args(annotation))  # as in "Table | None" and "tuple[Table, ...]"
    return next((part for part in within if dataclasses.is_dataclass(part)), None)


def unknown(name: str, known: Iterable[str]) -> str:
    """The message for a name that is not among the known ones."""
    return f"unknown name {name!r}{_suggestion(name, list(known))}; known: {', '.join(known)}"


def _suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
