"""Public names are those of the list, and each has a docstring that explains its arguments."""

import ast
import importlib
import inspect
import itertools
import re
from types import ModuleType

import pytest

import learned_optim
from helpers.architecture import INSTALLED, undocumented

PUBLIC = {
    "learned_optim": {"LearnedOptimizer", "UpdateRule", "__version__", "available_rules", "load_rule", "save_rule"},
    "learned_optim.rules": {
        "ARCHITECTURES",
        "LSTML2L",
        "MLP",
        "NO_CONDITIONS",
        "Conditions",
        "RuleSettings",
        "RuleState",
        "ScaleFreeLSTM",
        "ScheduleFreeLSTM",
        "UpdateRule",
    },
    "learned_optim.meta_train.config.load": {
        "Config",
        "ConfigError",
        "TaskConfig",
        "config_from_tables",
        "differences",
        "flat",
        "load_config",
        "load_tables",
        "shipped_configs",
        "tables_of",
        "toml_files",
    },
    "learned_optim.meta_train.estimators": {
        "ES",
        "ESTIMATORS",
        "PES",
        "Combination",
        "Combined",
        "Directions",
        "ESSingle",
        "Estimate",
        "Estimator",
        "OutputES",
        "Part",
        "Reparameterization",
        "Trajectory",
        "TruncatedBPTT",
        "WindowGradient",
        "WindowShare",
        "truncated_bptt",
    },
    "learned_optim.meta_train.few_shot": {"AdaptedModel", "Evaluation", "FewShotModel", "evaluate"},
    "learned_optim.meta_train.few_shot.algorithms": {
        "FOMAML",
        "MAML",
        "Adapted",
        "Algorithm",
        "GradientAlgorithm",
        "Leap",
        "Matching",
        "MetaGradient",
        "MetaLSTM",
        "MetaSGD",
        "NearestNeighbour",
        "Pretraining",
        "Prototypical",
        "Reptile",
        "Scratch",
    },
    "learned_optim.meta_train.tasks": {
        "FAMILIES",
        "Augmentation",
        "AutoencoderFamily",
        "Batch",
        "ClassificationTask",
        "ConvNetFamily",
        "DataTask",
        "FactorizationFamily",
        "FineTuningFamily",
        "ImplicitPictureFamily",
        "LanguageModelFamily",
        "MLPFamily",
        "NeuralArtFamily",
        "PhysicsFamily",
        "QuadraticFamily",
        "ResidualFamily",
        "SoftmaxRegressionFamily",
        "Split",
        "TableFamily",
        "Task",
        "TaskFamily",
        "ValleyFamily",
        "VisionTransformerFamily",
    },
}
"""The public names of each module. A change here is a change for users, and goes into CHANGELOG.md."""

WITH_NAMES = [name for name, path in INSTALLED.items() if "__all__ = [" in path.read_text()]
"""Every module that defines ``__all__``."""


def parts(module: ModuleType) -> dict[str, object]:
    return {name: getattr(module, name) for name in module.__all__ if not name.startswith("__")}


def text_of(thing: object) -> str:
    """Docstring, with those of base classes: ``Args: see Base`` is an answer."""
    classes = inspect.getmro(thing) if inspect.isclass(thing) else (thing,)
    return "\n".join(each.__doc__ or "" for each in classes if each.__module__.startswith("learned_optim"))


def unexplained(thing: object) -> list[str]:
    """Arguments of a public function, or of a class's constructor, that its docstring does not name."""
    try:
        names = inspect.signature(thing).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return []
    described = text_of(thing) + field_texts(thing)
    return [name for name in names if name not in ("args", "kwargs") and not re.search(rf"\b{name}\b", described)]


def field_texts(thing: object) -> str:
    """The annotated names below which a class says, in a string, what they are."""
    if not inspect.isclass(thing):
        return ""
    found = []
    for cls in inspect.getmro(thing):
        if cls.__module__.startswith("learned_optim"):
            (node,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls))).body
            assert isinstance(node, ast.ClassDef)
            found += documented_names(node.body)
    return " ".join(found)


def documented_names(body: list[ast.stmt]) -> list[str]:
    """Names that are assigned or annotated, and followed by a string."""
    names = []
    for statement, following in itertools.pairwise(body):
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        names += [target.id for target in targets if is_text and isinstance(target, ast.Name)]
    return names


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_those_of_the_list(name: str) -> None:
    module = importlib.import_module(name)
    assert set(module.__all__) == PUBLIC[name]
    assert len(module.__all__) == len(PUBLIC[name])


def test_every_listed_module_defines_public_names() -> None:
    assert set(WITH_NAMES) >= set(PUBLIC)


@pytest.mark.parametrize("name", WITH_NAMES)
def test_every_public_name_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    constants = [
        part for part, value in parts(module).items() if not (inspect.isclass(value) or inspect.isroutine(value))
    ]
    assert set(undocumented(module)) <= set(constants)
    for constant in constants:
        sources = [path.read_text() for path in INSTALLED.values() if f"\n{constant}" in path.read_text()]
        assert any(constant in documented_names(ast.parse(source).body) for source in sources), constant


@pytest.mark.parametrize("name", WITH_NAMES)
def test_every_argument_is_explained(name: str) -> None:
    missing = {part: unexplained(value) for part, value in parts(importlib.import_module(name)).items()}
    assert {part: names for part, names in missing.items() if names} == {}


class TestChecksCanFail:
    def test_unexplained_argument_is_found(self) -> None:
        def function(rate: float, steps: int) -> None:
            """Do it for so many ``steps``."""

        function.__module__ = learned_optim.__name__
        assert unexplained(function) == ["rate"]

    def test_undocumented_constant_is_found(self) -> None:
        body = ast.parse("A = 1\n'''What it is.'''\nB = 2\nC: int = 3\n'''Another.'''").body
        assert documented_names(body) == ["A", "C"]
