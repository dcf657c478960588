"""The tree of the checkout: its modules by import name, their docstrings, and pyproject.toml."""

import inspect
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from helpers.paths import ROOT

FOLDERS = {
    "kernels": "learned_optim.kernels",
    "learned_optim": "learned_optim",
    "meta_train": "learned_optim.meta_train",
    "benchmarks": "benchmarks",
    "tests": "tests",
}
"""Top-level folders and the names that they are imported by, from the bottom up: each may import those before it."""


META_TRAIN = FOLDERS["meta_train"]
ROOMS = (
    "common",
    "data",
    "style_transfer",
    "tasks",
    "inner",
    "estimators",
    "config",
    "benchmark",
    "trainer",
    "reports",
    "few_shot",
)
"""Rooms of meta_train/ from the bottom up: each may import those before it."""
ENTRIES = ("demo", "kinds", "specialise")
"""Modules of meta_train/ in no room: the command line starts there. They may import every room, and no room them."""


def is_within(name: str, *packages: str) -> bool:
    """Whether a module is one of the packages or lies in one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def modules(root: Path) -> Mapping[str, Path]:
    """Import name -> file of every Python module of the checkout, each once: rglob does not follow the links."""
    found = {}
    for folder, name in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return found


def undocumented(module: ModuleType) -> list[str]:
    """Public classes, functions and methods of ``module`` without a docstring of their own."""
    public = {name: getattr(module, name) for name in module.__all__}
    methods = {
        f"{name}.{attribute}": method
        for name, value in public.items()
        if inspect.isclass(value)
        for attribute, method in vars(value).items()
        if not attribute.startswith("_") and (inspect.isfunction(method) or isinstance(method, property))
    }
    documentable = {
        name: value for name, value in {**public, **methods}.items() if callable(value) or isinstance(value, property)
    }
    return [name for name, value in documentable.items() if not (value.__doc__ or "").strip()]


def pyproject() -> dict[str, Any]:
    """The contents of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


MODULES = modules(ROOT)
"""Every module of the checkout."""

SOURCES = [*MODULES.values(), *(ROOT / "docs").glob("*.py"), *(ROOT / "examples").glob("*.py")]
"""Every Python file of the project, also those that nothing imports."""

INSTALLED = {name: path for name, path in MODULES.items() if is_within(name, "learned_optim")}
"""The modules of the wheel."""
