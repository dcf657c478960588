"""Frozen dataclasses out of nested tables: nothing unknown accepted, and errors that say where and why."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

Checked = TypeVar("Checked")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where and why, on one line."""


class Strict:
    """Base of the dataclasses of a configuration."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # pydantic reads it from the class


def checked(cls: type[Checked], values: Mapping[str, Any], source: str) -> Checked:
    """An instance of the dataclass ``cls``; ``source`` says in messages where the values come from.

    Raises:
        ConfigError: unknown or missing key, wrong type, or a value out of range.
    """
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError("; ".join(f"{source}: {_explain(item, cls)}" for item in error.errors())) from error


def refuse_changed(settings: Any, options: Sequence[str], owner: str) -> None:
    """Raise ``ValueError`` if something is not at its default that is no option of the ``owner``, named by ``name``."""
    for field in dataclasses.fields(settings):
        if field.name not in ("name", *options) and getattr(settings, field.name) != field.default:
            raise ValueError(f"{owner} has no option {field.name!r}; it has {', '.join(options)}")


def _explain(item: Any, cls: type) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "unexpected_keyword_argument":
        *parents, last = item["loc"]
        return f"unknown key {place!r}{_suggestion(str(last), _keys(cls, parents))}"
    if item["type"] == "value_error":  # raised by a __post_init__, which says what it was given
        return f"{place}: {item['ctx']['error']}" if place else str(item["ctx"]["error"])
    return f"{place}: {item['msg']}, got {item['input']!r}" if place else str(item["msg"])


def _keys(cls: Any, parents: Sequence[Any]) -> list[str]:
    for parent in parents:
        if isinstance(parent, int):
            continue
        annotation = next((f.type for f in dataclasses.fields(cls) if f.name == parent), None)
        within = (annotation, *get_args(annotation))  # as in "Table | None" and "tuple[Table, ...]"
        cls = next((part for part in within if dataclasses.is_dataclass(part)), None)
        if cls is None:
            return []
    return [f.name for f in dataclasses.fields(cls)]


def unknown(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is not among the known ones."""
    return f"unknown name {name!r}{_suggestion(name, list(known))}; known: {', '.join(known)}"


def _suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
