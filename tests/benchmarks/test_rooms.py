"""Modules of benchmarks/ import each other one way only."""

import ast
from pathlib import Path

import pytest

from helpers.architecture import MODULES

BENCHMARKS = {name: path for name, path in MODULES.items() if name.startswith("benchmarks.")}


def imported(path: Path) -> set[str]:
    """Modules of benchmarks/ that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(BENCHMARKS)


GRAPH = {name: imported(path) for name, path in BENCHMARKS.items()}


def cycle_from(name: str, graph: dict[str, set[str]], path: tuple[str, ...] = ()) -> tuple[str, ...]:
    """A way from a module back to itself; empty if there is none."""
    if name in path:
        return (*path[path.index(name) :], name)
    return next(filter(None, (cycle_from(other, graph, (*path, name)) for other in sorted(graph[name]))), ())


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_no_module_imports_what_imports_it(name: str) -> None:
    assert cycle_from(name, GRAPH) == ()


def test_rows_and_colours_are_below_all_and_tables_above() -> None:
    assert GRAPH["benchmarks.results"] == GRAPH["benchmarks.colours"] == set()
    assert not [name for name, others in GRAPH.items() if "benchmarks.tables" in others]


def test_cycle_is_found() -> None:
    assert cycle_from("a", {"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ("b", "c", "b")
