"""Files that are written whole or not at all, and read with errors that name them."""

import csv
import io
import json
import math
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace ``path`` by ``content`` in one step: a crash leaves the old file or the new one, never a part."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def finite_or_none(value: float) -> float | None:
    """``value`` for JSON, which knows neither infinity nor NaN: these become null."""
    return value if math.isfinite(value) else None


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as the content of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def json_object(text: str | bytes, place: str) -> dict[str, Any]:
    """The object that a file holds in JSON, with or without a byte order mark.

    Raises:
        ValueError: it is not UTF-8, not JSON, nested too deeply, or no object; the message begins with ``place``.
    """
    try:
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is damaged ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place} is damaged (it holds a {type(value).__name__} in place of named values)")
    return value
