"""Stored results: found again when nothing has changed, and never when something has."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from learned_optim.meta_train.benchmark import cache as cache_module
from learned_optim.meta_train.benchmark.cache import (
    Cache,
    default_folder,
    held_out_fingerprint,
    problem_fingerprint,
    rule_fingerprint,
)
from learned_optim.meta_train.tasks import MLPFamily, QuadraticFamily, TaskFamily
from learned_optim.meta_train.tasks.lookup import build_family
from learned_optim.rules import LSTML2L, ScaleFreeLSTM

KEY = {"problem": "x", "steps": 3, "rate": 0.1}
ARRAYS = {"losses": np.array([[1.0, 2.0], [0.5, np.inf]])}


class Counter:
    """Computes the same arrays again and again, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Mapping[str, np.ndarray]:
        self.calls += 1
        return ARRAYS


def test_same_key_is_computed_once(tmp_path: Path) -> None:
    compute = Counter()
    for _ in range(3):
        found = Cache(tmp_path).get(KEY, compute)
        assert np.array_equal(found["losses"], ARRAYS["losses"])
        assert found["losses"].dtype == np.float64
    assert compute.calls == 1
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert Cache(tmp_path).path(KEY).is_file()


@pytest.mark.parametrize(
    "change", [{"problem": "y"}, {"steps": 4}, {"rate": 0.3}, {"rate": None}, {"more": 1}], ids=str
)
def test_other_key_is_computed(change: dict[str, object], tmp_path: Path) -> None:
    compute = Counter()
    Cache(tmp_path).get(KEY, compute)
    Cache(tmp_path).get({**KEY, **change}, compute)
    assert compute.calls == 2


@pytest.mark.parametrize(
    ("owner", "name", "value"), [(cache_module, "CACHE_VERSION", -1), (torch, "__version__", "9.9")]
)
def test_other_version_is_computed(
    owner: object, name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Counter()
    Cache(tmp_path).get(KEY, compute)
    monkeypatch.setattr(owner, name, value)
    Cache(tmp_path).get(KEY, compute)
    assert compute.calls == 2


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-5], lambda data: b"x" * 100], ids=["empty", "cut", "other"]
)
def test_damaged_file_is_recomputed_and_replaced(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    compute, cache = Counter(), Cache(tmp_path)
    cache.get(KEY, compute)
    path = cache.path(KEY)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert np.array_equal(cache.get(KEY, compute)["losses"], ARRAYS["losses"])
    assert compute.calls == 2
    assert path.read_bytes() == whole


def test_file_of_another_key_is_recomputed(tmp_path: Path) -> None:
    compute, cache = Counter(), Cache(tmp_path)
    cache.get(KEY, compute)
    other = {**KEY, "steps": 9}
    cache.path(other).parent.mkdir(parents=True, exist_ok=True)
    cache.path(other).write_bytes(cache.path(KEY).read_bytes())
    cache.get(other, compute)
    assert compute.calls == 2


def test_interrupted_computation_leaves_no_file(tmp_path: Path) -> None:
    def interrupted() -> Mapping[str, np.ndarray]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).get(KEY, interrupted)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_cache_without_a_folder_keeps_nothing() -> None:
    compute = Counter()
    Cache(None).get(KEY, compute)
    Cache(None).get(KEY, compute)
    assert compute.calls == 2


def test_folder_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "learned_optim" / "benchmark"


class TestProblem:
    family = MLPFamily("digits", width=(4, 9))

    def test_problem_fingerprint_is_reproducible(self) -> None:
        assert problem_fingerprint(self.family, "test", 0) == problem_fingerprint(self.family, "test", 0)

    @pytest.mark.parametrize(
        "other",
        [
            MLPFamily("digits", width=(4, 10)),
            MLPFamily("digits", width=(4, 9), batch_size=(127, 127)),
            MLPFamily("digits", width=(4, 9), gain=(2.0, 2.0)),
            QuadraticFamily(),
        ],
        ids=["size", "batch", "gain", "family"],
    )
    def test_problem_fingerprint_depends_on_options(self, other: TaskFamily) -> None:
        assert problem_fingerprint(other, "test", 0) != problem_fingerprint(self.family, "test", 0)

    def test_problem_fingerprint_depends_on_split_and_draw(self) -> None:
        prints = {problem_fingerprint(self.family, split, draw) for split in ("test", "train") for draw in (0, 1)}
        assert len(prints) == 4

    def test_problem_fingerprint_depends_on_code_but_not_on_comments(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.py"
        code = (
            "import torch\n"
            "class Model(torch.nn.Linear):\n"
            "    def __init__(self):\n"
            "        super().__init__(3, 1)\n"
            "def batch(generator):\n"
            "    return torch.randn(5, 3, generator=generator)\n"
            "def loss(model, batch):\n"
            "    return model(batch).square().mean()\n"
        )

        def fingerprint(text: str) -> str:
            path.write_text(text)
            return problem_fingerprint(build_family(f"{path}:Model", {}, "test"), "test", 0)

        first = fingerprint(code)
        assert fingerprint(code.replace("    def", '    """A model."""  # mine\n\n    def')) == first
        assert fingerprint(code.replace("square", "abs")) != first
        assert fingerprint(code) == first

    def test_accuracy_counts_for_what_is_measured_and_not_for_the_problem(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = self.family.sample(np.random.default_rng(0), "test")
        batch = task.batch(1, torch.Generator().manual_seed(0))
        prints = []
        read_text = Path.read_text
        for change in (("", ""), (".argmax(-1)", ".argmin(-1)"), ("F.cross_entropy", "F.nll_loss")):
            edited = lambda path, change=change, **options: read_text(path, **options).replace(*change)  # noqa: E731
            monkeypatch.setattr(Path, "read_text", edited)
            prints.append((problem_fingerprint(self.family, "test", 0), held_out_fingerprint(task, batch)))
        (problem, measured), (same, counted), (other, _) = prints
        assert problem == same != other
        assert measured != counted

    def test_held_out_fingerprint_depends_on_the_data(self) -> None:
        task = self.family.sample(np.random.default_rng(0), "test")
        first, second = (task.batch(1, torch.Generator().manual_seed(seed)) for seed in (0, 1))
        assert held_out_fingerprint(task, first) == held_out_fingerprint(task, first)
        assert held_out_fingerprint(task, first) != held_out_fingerprint(task, second)

    def test_problem_fingerprint_depends_on_base_classes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = problem_fingerprint(self.family, "test", 0)
        code = cache_module._code
        changed = lambda cls: code(cls) + ("changed" if cls.__name__ == "ClassificationTask" else "")  # noqa: E731
        monkeypatch.setattr(cache_module, "_code", changed)
        assert problem_fingerprint(self.family, "test", 0) != first


class TestRule:
    @staticmethod
    def rule(seed: int = 0, size: int = 2) -> ScaleFreeLSTM:
        rule = ScaleFreeLSTM(size)
        rule.reset_parameters(seed)
        return rule

    def test_rule_fingerprint_is_reproducible(self) -> None:
        assert rule_fingerprint(self.rule()) == rule_fingerprint(self.rule())

    def test_rule_fingerprint_depends_on_weights_settings_and_architecture(self) -> None:
        changed = self.rule()
        with torch.no_grad():
            next(changed.parameters()).view(-1)[-1] += 1e-6
        rules = [self.rule(), changed, self.rule(size=3), ScaleFreeLSTM(2, rate=0.1), LSTML2L(2)]
        assert len({rule_fingerprint(rule) for rule in rules}) == len(rules)


def test_edited_function_of_a_user_is_another_problem(tmp_path: Path) -> None:
    text = (
        "import torch\ndef model():\n    return torch.nn.Linear(2, 1)\ndef batch(generator):\n"
        "    return torch.randn(4, 2, generator=generator)\ndef loss(model, batch):\n"
        "    return model(batch).square().mean()\n"
    )
    file = tmp_path / "functions.py"
    fingerprints = []
    for version in (text, text.replace("square", "abs"), f"# the first with a comment\n{text}"):
        file.write_text(version)
        fingerprints.append(problem_fingerprint(build_family(f"{file}:model", {}, "test"), "test", 0))
    first, edited, commented = fingerprints
    assert first == commented != edited
