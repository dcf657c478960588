"""The layout that the code promises: packages, direction of imports, cost of the import, public names, lengths."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import learned_optim
from helpers.architecture import (
    ENTRIES,
    FOLDERS,
    INSTALLED,
    META_TRAIN,
    MODULES,
    ROOMS,
    SOURCES,
    is_within,
    modules,
    pyproject,
    undocumented,
)
from helpers.paths import ROOT

PICKLES = ("pickle", "cloudpickle", "dill", "joblib", "shelve")
PUBLIC_NAMES = {"LearnedOptimizer", "UpdateRule", "load_rule", "save_rule", "available_rules", "__version__"}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60  # lines: a file to be read in one sitting, a function to be seen at once
OPTIONAL = ("triton", "matplotlib", "sklearn", "pydantic", "tqdm", "tensorboard", "learned_optim.meta_train")


class Import(NamedTuple):
    """One imported name: ``from a import b`` is ``a.b``, because ``b`` may be a module."""

    name: str
    line: int
    in_function: bool

    def is_of(self, *packages: str) -> bool:
        return is_within(self.name, *packages)


def imports(source: str, package: str) -> Iterator[Import]:
    """All imports of a module that lies in ``package``, also those inside functions and by constant name."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=aliases):
                yield from (Import(alias.name, node.lineno, in_function) for alias in aliases)
            case ast.ImportFrom(module=module, names=aliases, level=level):
                above = package.split(".")[: 1 - level or None] if level else []
                prefix = ".".join(above + ([module] if module else []))
                yield from (Import(f"{prefix}.{alias.name}", node.lineno, in_function) for alias in aliases)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(name, node.lineno, in_function)
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function)

    return visit(ast.parse(source), in_function=False)


def layer(name: str) -> int | None:
    """Height of a module in ``FOLDERS``, None for other people's. The longest matching package decides."""
    packages = [package for package in FOLDERS.values() if is_within(name, package)]
    return list(FOLDERS.values()).index(max(packages, key=len)) if packages else None


def import_violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """The imports of ``module`` that the layout forbids."""
    package = module if is_package else module.rpartition(".")[0]
    height = layer(module)
    assert height is not None, f"{module} belongs to no layer"
    found = []
    for imported in imports(source, package):
        target = layer(imported.name)
        # The one way up: sub-commands of the command line import the meta-training that they start.
        sub_command = is_within(module, "learned_optim.cli") and imported.in_function
        if target is not None and target > height and not (sub_command and imported.is_of("learned_optim.meta_train")):
            found.append(f"{module}:{imported.line} imports {imported.name} from a layer above")
        if imported.is_of("kernels", "meta_train"):
            found.append(f"{module}:{imported.line} imports {imported.name} instead of learned_optim.{imported.name}")
        if imported.is_of("triton") and not is_within(module, "learned_optim.kernels", "tests"):
            found.append(f"{module}:{imported.line} imports triton outside kernels/")
    return found


def place_in_meta_train(name: str) -> int | None:
    """Index of a module's room among ``ROOMS``, behind all of them for an entry; None outside the rooms."""
    if not is_within(name, META_TRAIN) or name == META_TRAIN:
        return None
    room = name.removeprefix(f"{META_TRAIN}.").partition(".")[0]
    assert room in (*ROOMS, *ENTRIES), f"{name} lies in no room: enter it in ROOMS or ENTRIES"
    return ROOMS.index(room) if room in ROOMS else len(ROOMS)


def room_violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a module of meta_train/ imports from a room that comes after its own."""
    place = place_in_meta_train(module)
    if place is None:
        return []
    found = []
    for imported in imports(source, module if is_package else module.rpartition(".")[0]):
        target = place_in_meta_train(imported.name)
        if target is not None and target > place:
            found.append(f"{module}:{imported.line} imports {imported.name} from a room after its own")
    return found


def pickle_violations(source: str, module: str) -> list[str]:
    """Uses of pickle, which runs code on loading: weights and checkpoints are safetensors."""
    found = [
        f"{module}:{imported.line} imports {imported.name}"
        for imported in imports(source, module.rpartition(".")[0])
        if imported.is_of(*PICKLES, "torch.load", "torch.save")
    ]
    tree = ast.parse(source)
    torch_names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "torch"
    }
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr="load" | "save" as attribute) if owner in torch_names:
                found.append(f"{module}:{node.lineno} uses torch.{attribute}")
    return found


def length_violations(source: str, file: str) -> list[str]:
    """A file of more than :data:`LONGEST_FILE` lines, and its functions, decorators apart, that are too long."""
    lines = len(source.splitlines())
    found = [f"{file} has {lines} lines, more than {LONGEST_FILE}"] if lines > LONGEST_FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                found.append(f"{file}:{node.lineno} {node.name} has {lines} lines, more than {LONGEST_FUNCTION}")
    return found


def packages_in(root: Path) -> set[str]:
    """Folders of the installed part of the checkout that directly hold files, by import name."""
    return {
        ".".join((name, *path.parent.relative_to(root / folder).parts))
        for folder, name in FOLDERS.items()
        if is_within(name, "learned_optim")
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def newly_imported(statement: str, after: str, *, root: Path = ROOT) -> set[str]:
    """Modules that ``statement`` loads in a fresh interpreter which has run ``after``."""
    script = f"import sys; {after}; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_every_package_is_listed_for_the_wheel() -> None:
    listed = pyproject()["tool"]["setuptools"]["packages"]
    assert listed == sorted(listed)
    assert set(listed) == packages_in(ROOT)


def test_links_show_the_tree_that_is_installed() -> None:
    mapping = pyproject()["tool"]["setuptools"]["package-dir"]
    assert mapping == {name: folder for folder, name in FOLDERS.items() if is_within(name, "learned_optim")}
    for name, folder in mapping.items():
        link = ROOT / name.replace(".", "/")
        if link.is_file():  # in a clone without links
            link = link.parent / link.read_text()
        assert link.resolve() == ROOT / folder


def test_sub_packages_are_found_in_a_checkout_without_links(tmp_path: Path) -> None:
    for file in ("learned_optim/__init__.py", "kernels/leaf.py", "meta_train/__init__.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "learned_optim/__init__.py").write_text((ROOT / "learned_optim/__init__.py").read_text())
    for name in ("kernels", "meta_train"):
        (tmp_path / "learned_optim" / name).write_text(f"../{name}")  # what git writes in place of a link
    loaded = newly_imported("import learned_optim.kernels.leaf, learned_optim.meta_train", "pass", root=tmp_path)
    assert {"learned_optim.kernels.leaf", "learned_optim.meta_train"} <= loaded


def test_kernels_folder_has_no_init() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    path = MODULES[module]
    assert import_violations(path.read_text(), module, is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize("module", [name for name in MODULES if is_within(name, META_TRAIN)])
def test_rooms_import_only_rooms_before_them(module: str) -> None:
    path = MODULES[module]
    assert room_violations(path.read_text(), module, is_package=path.name == "__init__.py") == []


def test_every_room_is_there_and_few_shot_comes_last() -> None:
    folder = ROOT / "meta_train"
    assert all((folder / room / "__init__.py").is_file() for room in ROOMS)
    assert all((folder / f"{entry}.py").is_file() for entry in ENTRIES)
    assert ROOMS[-1] == "few_shot"  # so that no other room may import it


@pytest.mark.parametrize("module", INSTALLED)
def test_package_never_pickles(module: str) -> None:
    assert pickle_violations(INSTALLED[module].read_text(), module) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    assert length_violations(path.read_text(), str(path.relative_to(ROOT))) == []


def test_every_python_file_is_measured() -> None:
    folders = {path.relative_to(ROOT).parts[0] for path in SOURCES}
    assert folders == {*FOLDERS, "docs", "examples"}
    assert len(set(SOURCES)) == len(SOURCES)


@pytest.mark.slow
def test_import_is_light() -> None:
    # torch itself loads tqdm where it is installed: only what we add counts.
    loaded = newly_imported("from learned_optim import *", after="import torch")
    assert "learned_optim.optimizer" in loaded
    assert sorted(name for name in loaded if is_within(name, *OPTIONAL)) == []


def test_import_of_the_command_line_does_not_load_torch() -> None:
    loaded = newly_imported("import learned_optim.cli", after="pass")
    assert "learned_optim.cli" in loaded
    assert sorted(name for name in loaded if is_within(name, "torch", "numpy")) == []


def test_public_names() -> None:
    assert set(learned_optim.__all__) == PUBLIC_NAMES
    assert undocumented(learned_optim) == []
    assert set(dir(learned_optim)) >= PUBLIC_NAMES
    with pytest.raises(AttributeError, match="'learned_optim' has no attribute 'LearnedOptimiser'"):
        learned_optim.LearnedOptimiser  # type: ignore[attr-defined]  # noqa: B018


class TestChecksCanFail:
    @pytest.mark.parametrize(
        ("module", "source"),
        [
            ("learned_optim.kernels.lstm", "import learned_optim"),
            ("learned_optim.kernels.lstm", "from learned_optim.rules import base"),
            ("learned_optim.kernels.lstm", "from ..rules import base"),
            ("learned_optim.kernels.lstm", "from .. import rules"),
            ("learned_optim.optimizer", "from learned_optim import meta_train"),
            ("learned_optim.optimizer", "def f():\n    import learned_optim.meta_train.trainer.trainer"),
            ("learned_optim.optimizer", "import importlib\nimportlib.import_module('learned_optim.meta_train')"),
            ("learned_optim.cli", "import learned_optim.meta_train"),
            ("learned_optim.cli", "if True:\n    from .meta_train import trainer"),
            ("learned_optim.cli", "def f():\n    import benchmarks.plots"),
            ("learned_optim.meta_train.trainer.trainer", "import benchmarks.plots"),
            ("benchmarks.plots", "import tests"),
            ("learned_optim.optimizer", "import kernels"),
            ("tests.test_optimizer", "from meta_train.tasks import base"),
            ("learned_optim.optimizer", "def f():\n    import triton.language as tl"),
            ("learned_optim.meta_train.trainer.trainer", "from triton import jit"),
        ],
    )
    def test_forbidden_import_is_found(self, module: str, source: str) -> None:
        assert len(import_violations(source, module)) == 1

    @pytest.mark.parametrize(
        ("module", "source"),
        [
            ("learned_optim.kernels.lstm", "import triton\nfrom learned_optim.kernels import pointers"),
            ("learned_optim.kernels.lstm", "from . import pointers\nfrom .pointers import table"),
            ("learned_optim.optimizer", "from learned_optim import kernels\nfrom .rules import base\nimport torch"),
            ("learned_optim.cli", "def meta_train():\n    from learned_optim.meta_train.trainer import trainer"),
            ("learned_optim.meta_train.tasks.mlp", "from ...rules import base\nfrom learned_optim import kernels"),
            ("tests.test_kernels", "import triton\nimport benchmarks.plots\nimport learned_optim.meta_train"),
        ],
    )
    def test_allowed_import_passes(self, module: str, source: str) -> None:
        assert import_violations(source, module) == []

    @pytest.mark.parametrize(
        ("module", "source"),
        [
            ("learned_optim.meta_train.inner.unroll", "from learned_optim.meta_train.trainer.pool import Pool"),
            ("learned_optim.meta_train.inner.unroll", "from ..trainer import pool"),
            ("learned_optim.meta_train.common.seeds", "from learned_optim.meta_train import data"),
            ("learned_optim.meta_train.config.load", "def f():\n    import learned_optim.meta_train.trainer.record"),
            ("learned_optim.meta_train.reports.runs", "from learned_optim.meta_train.few_shot import settings"),
            ("learned_optim.meta_train.few_shot.kind", "import learned_optim.meta_train.kinds"),
        ],
    )
    def test_import_from_a_later_room_is_found(self, module: str, source: str) -> None:
        assert len(room_violations(source, module)) == 1

    @pytest.mark.parametrize(
        ("module", "source"),
        [
            ("learned_optim.meta_train.trainer.pool", "from learned_optim.meta_train.inner import unroll"),
            ("learned_optim.meta_train.trainer.pool", "from . import loop\nfrom .loop import MetaTraining"),
            ("learned_optim.meta_train.few_shot.kind", "import learned_optim.meta_train.reports.runs"),
            ("learned_optim.meta_train.kinds", "from learned_optim.meta_train.few_shot import kind"),
            ("learned_optim.meta_train.inner.unroll", "from learned_optim.rules import base\nimport torch"),
        ],
    )
    def test_import_from_an_earlier_room_passes(self, module: str, source: str) -> None:
        assert room_violations(source, module) == []

    def test_module_in_no_room_is_found(self) -> None:
        with pytest.raises(AssertionError, match="lies in no room"):
            room_violations("", "learned_optim.meta_train.sessions")

    def test_relative_import_of_a_package_starts_at_the_package(self) -> None:
        assert import_violations("from .trainer import train", "learned_optim.meta_train", is_package=True) == []
        assert len(import_violations("from .meta_train import trainer", "learned_optim", is_package=True)) == 1

    @pytest.mark.parametrize(
        "source",
        [
            "import pickle",
            "from pickle import dumps",
            "def f():\n    import joblib",
            "import torch\ntorch.load('rule.pt')",
            "import torch as t\nt.save({}, 'rule.pt')",
            "from torch import load",
        ],
    )
    def test_pickle_is_found(self, source: str) -> None:
        assert len(pickle_violations(source, "learned_optim.checkpoint")) == 1

    def test_other_loading_passes(self) -> None:
        source = "import torch\nfrom safetensors import torch as st\nst.load(b'')\nst.save({})\nload = torch.zeros(1)"
        assert pickle_violations(source, "learned_optim.checkpoint") == []

    @pytest.mark.parametrize("kind", ["def", "async def"])
    @pytest.mark.parametrize("indent", ["", "    "])
    def test_long_function_is_found(self, kind: str, indent: str) -> None:
        head = "class Example:\n" if indent else ""
        for lines, found in ((LONGEST_FUNCTION, 0), (LONGEST_FUNCTION + 1, 1)):
            function = f"{indent}@decorated(\n    1\n)\n{indent}{kind} f():\n" + f"{indent}    pass\n" * (lines - 1)
            assert len(length_violations(head + function, "example.py")) == found

    def test_long_file_is_found(self) -> None:
        assert length_violations("pass\n" * LONGEST_FILE, "example.py") == []
        assert length_violations("pass\n" * (LONGEST_FILE + 1), "example.py") == [
            "example.py has 401 lines, more than 400"
        ]

    def test_folder_with_files_is_a_package(self, tmp_path: Path) -> None:
        files = "learned_optim/__init__.py", "learned_optim/weights/a.safetensors", "kernels/lstm.py", "tests/x.py"
        for path in map(tmp_path.joinpath, files):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (tmp_path / "learned_optim/empty").mkdir()
        (tmp_path / "learned_optim/kernels").symlink_to("../kernels")
        assert packages_in(tmp_path) == {"learned_optim", "learned_optim.weights", "learned_optim.kernels"}
        assert set(modules(tmp_path)) == {"learned_optim", "learned_optim.kernels.lstm", "tests.x"}

    def test_heavy_import_is_found(self, tmp_path: Path) -> None:
        (tmp_path / "heavy.py").write_text("import tomllib")
        assert "tomllib" in newly_imported("import heavy", after="pass", root=tmp_path)
        assert "tomllib" not in newly_imported("import heavy", after="import tomllib", root=tmp_path)

    def test_missing_docstring_is_found(self) -> None:
        module = ModuleType("example")
        exec("class A:\n    'Claim.'\n    def f(self): ...\n    def _g(self): ...\ndef h(): ...", vars(module))
        module.__all__ = ["A", "h"]  # type: ignore[attr-defined]
        assert undocumented(module) == ["h", "A.f"]


def test_kernels_know_no_rule() -> None:
    from learned_optim.rules import ARCHITECTURES

    words = {name.replace("-", mark) for name in ARCHITECTURES for mark in ("-", "_", "")} - {"mlp"}
    for file in sorted((ROOT / "kernels").rglob("*")):
        if file.suffix in (".py", ".c", ".h"):
            text = file.read_text().lower()
            assert not [word for word in words if word in text], file
            assert " mlp" not in text
