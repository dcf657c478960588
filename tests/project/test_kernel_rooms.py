"""The rooms of kernels/ import in one direction: tracing, then sources, then one room for each kind of device."""

import ast

import pytest

from helpers.architecture import MODULES, is_within

PACKAGE = "learned_optim.kernels"
BASE = {"cache", "devices", "layout", "slots", "addresses"}
"""Modules at the top of kernels/ that every room may import; the others there may import every room."""
MAY_IMPORT = {
    "tracing": {"tracing"},
    "sources": {"tracing", "sources"},
    "cpu": {"tracing", "sources", "cpu"},
    "gpu": {"tracing", "sources", "gpu"},
}
KERNELS = {
    name.removeprefix(f"{PACKAGE}."): path.read_text() for name, path in MODULES.items() if is_within(name, PACKAGE)
}


def imported_rooms(source: str) -> set[str]:
    """Rooms, and modules at the top of kernels/, that a module imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and is_within(node.module or "", PACKAGE):
            names.add((node.module or "").split(".")[2])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[2] for alias in node.names if is_within(alias.name, PACKAGE)}
    return names


def forbidden_rooms(module: str, source: str) -> set[str]:
    """What a module of kernels/ imports although it must not."""
    room, inside, _ = module.rpartition(".")
    if inside:
        return imported_rooms(source) - MAY_IMPORT[room] - BASE
    return imported_rooms(source) - BASE if module in BASE else set()


@pytest.mark.parametrize("module", KERNELS)
def test_room_of_kernels_imports_only_rooms_before_it(module: str) -> None:
    assert forbidden_rooms(module, KERNELS[module]) == set()


def test_every_room_of_kernels_has_a_rule() -> None:
    assert {module.split(".")[0] for module in KERNELS if "." in module} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("tracing.trace", "from learned_optim.kernels.sources.writer import Writer", {"sources"}),
        ("cpu.launch", "from learned_optim.kernels.gpu import tables", {"gpu"}),
        ("gpu.launch", "from learned_optim.kernels import launch", {"launch"}),
        ("layout", "import learned_optim.kernels.cpu.kernel", {"cpu"}),
        ("cpu.kernel", "from learned_optim.kernels.sources.c import c_source", set()),
        ("launch", "from learned_optim.kernels.gpu.launch import launch_triton", set()),
    ],
)
def test_import_of_a_later_room_is_found(module: str, source: str, found: set[str]) -> None:
    assert forbidden_rooms(module, source) == found
