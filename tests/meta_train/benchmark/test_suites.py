"""Suites: what is shipped works, and what a user writes is understood or refused with a reason."""

from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT
from learned_optim import available_rules
from learned_optim.meta_train.benchmark.contenders import baselines
from learned_optim.meta_train.benchmark.evaluation import RATES, comparison_task
from learned_optim.meta_train.benchmark.suites import (
    SUITES_FOLDER,
    Suite,
    chosen_suite,
    load_suite,
    shipped_suites,
    suite_of_model,
)
from learned_optim.meta_train.common.strict import ConfigError
from learned_optim.meta_train.data.datasets import DataNotFoundError
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import MLPFamily, QuadraticFamily

ENTRY = '[[problems]]\nname = "q"\nfamily = "quadratic"\nsteps = 5\n'


def suite(text: str, folder: Path) -> Suite:
    path = folder / "mine.toml"
    path.write_text(text)
    return load_suite(path)


@pytest.mark.parametrize("name", shipped_suites())
def test_shipped_suite_is_valid(name: str) -> None:
    found = load_suite(name)
    assert (found.name, bool(found.title)) == (name, True)
    assert {rule for problem in found.problems for rule in problem.rules} <= set(available_rules())
    assert baselines(found.baselines)
    for problem in found.problems:
        assert problem.build()
        assert problem.title
    assert load_suite(SUITES_FOLDER / f"{name}.toml") == found


PROBLEMS = {f"{name}/{problem.name}": problem for name in shipped_suites() for problem in load_suite(name).problems}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_shipped_problem_has_finite_losses_and_gradients(name: str) -> None:
    problem = PROBLEMS[name]
    try:
        task = VectorizedTask(comparison_task(problem.build(), problem.split, problem.draw), 2, seed=0)
    except DataNotFoundError as error:
        pytest.skip(f"needs real data: {error}")
    losses, grads = task.losses_and_grads(task.initial_parameters, task.batch(torch.Generator().manual_seed(0)))
    assert losses.isfinite().all()
    assert grads.isfinite().all()
    assert grads.abs().sum() > 0


def test_quick_suite_needs_no_download() -> None:
    families = [problem.build() for problem in load_suite("quick").problems]
    assert {family.dataset for family in families if isinstance(family, MLPFamily)} == {"digits"}
    assert all(isinstance(family, MLPFamily | QuadraticFamily) for family in families)


def test_suite_defaults_apply_to_its_problems(tmp_path: Path) -> None:
    found = suite(
        f'seeds = 3\nrules = ["lstm-l2l-mnist"]\nsplit = "validation"\n{ENTRY}dimensions = [4, 4]\n', tmp_path
    )
    (problem,) = found.problems
    assert (found.name, found.rates, problem.seeds, problem.tuning_seeds) == ("mine", RATES, 3, 8)
    assert (problem.rules, problem.split, problem.label) == (("lstm-l2l-mnist",), "validation", "q, 5 steps")
    assert problem.build() == QuadraticFamily((4, 4))
    own = suite(f"seeds = 3\n{ENTRY}seeds = 4\n", tmp_path).problems[0]
    assert own.seeds == 4


def test_list_of_steps_makes_one_problem_each(tmp_path: Path) -> None:
    found = suite(ENTRY.replace("steps = 5", "steps = [5, 1_000]"), tmp_path)
    assert [(problem.name, problem.steps) for problem in found.problems] == [("q-5", 5), ("q-1000", 1000)]
    assert found.problems[1].label == "q-1000, 1,000 steps"


def test_evaluation_only_family_is_accepted(tmp_path: Path) -> None:
    text = '[[problems]]\nname = "f"\nfamily = "mlp"\nsteps = 5\ndataset = "fashion-mnist"\n'
    assert suite(text, tmp_path).problems[0].build().evaluation_only


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["mine.toml: ", "problems", "Field required"]),
        ("problems = []", ["at least one [[problems]] entry"]),
        ("problems = 3", ["problems"]),
        ("= 3", ["not valid TOML"]),
        (ENTRY + ENTRY, ["two problems have the name 'q'"]),
        (
            ENTRY.replace("quadratic", "quadratik"),
            ["problem 'q': unknown name 'quadratik' (did you mean 'quadratic'?)"],
        ),
        (ENTRY + "dimension = [3, 3]", ["problem 'q': unknown key 'dimension' (did you mean 'dimensions'?)"]),
        (ENTRY + "dimensions = [3, 1]", ["problem 'q': ", "low <= high"]),
        (ENTRY + "seeds = 1", ["problems.0.seeds", "greater than or equal to 2"]),
        ("rates = [0.1, 0]\n" + ENTRY, ["rates.1", "greater than 0"]),
        ("rates = []\n" + ENTRY, ["one of rates"]),
        ("baseline = []\n" + ENTRY, ["unknown key 'baseline' (did you mean 'baselines'?)"]),
        (ENTRY.replace("steps = 5", "steps = 0"), ["problems.0.steps"]),
        (ENTRY.replace("steps = 5", ""), ["problems.0.steps: Field required"]),
    ],
    ids=str,
)
def test_invalid_suite_is_refused_with_the_reason(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        suite(text, tmp_path)
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


def test_unknown_suite_error_lists_the_known() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown name 'quik' \(did you mean 'quick'\?\); known: .*l2l-2016.*TOML file"
    ):
        load_suite("quik")
    with pytest.raises(ConfigError, match=r"no suite file absent\.toml"):
        load_suite("absent.toml")


def test_only_and_with_seeds_select_problems_and_seeds(tmp_path: Path) -> None:
    found = suite(ENTRY + ENTRY.replace('"q"', '"r"') + "tuning_seeds = 3\n", tmp_path)
    assert [problem.name for problem in found.only(["r", "q", "r"]).problems] == ["r", "q"]
    with pytest.raises(ConfigError, match="suite 'mine': problems: unknown name 's'; known: q, r"):
        found.only(["s"])
    assert [(p.seeds, p.tuning_seeds) for p in found.with_seeds(20).problems] == [(20, 8), (20, 3)]
    assert [(p.seeds, p.tuning_seeds) for p in found.with_seeds(2).problems] == [(2, 2), (2, 2)]
    with pytest.raises(ConfigError, match="at least 2 seeds"):
        found.with_seeds(1)


def test_user_model_is_a_suite_of_one_problem(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\nclass Net(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(2, 1)\n"
        "def batch(generator):\n    return torch.zeros(2)\ndef loss(model, batch):\n    return model(batch).sum()\n"
    )
    found = suite_of_model(f"{tmp_path}/model.py:Net", 30)
    assert [(problem.name, problem.steps) for problem in found.problems] == [("Net", 30)]
    with pytest.raises(ConfigError, match=r"--model .*steps.*greater than or equal to 1"):
        suite_of_model(f"{tmp_path}/model.py:Net", 0)
    assert chosen_suite(f"{tmp_path}/model.py:Net", steps=30) == chosen_suite(
        None, f"{tmp_path}/model.py:Net", steps=30
    )
    with pytest.raises(ConfigError, match=r"which class of .*model.py. write FILE.py:CLASS"):
        chosen_suite(f"{tmp_path}/model.py")


def test_suite_chooses_seconds_and_held_out_rows(tmp_path: Path) -> None:
    assert not suite(ENTRY, tmp_path).seconds
    assert suite(ENTRY, tmp_path).problems[0].held_out is None
    found = suite(f"seconds = true\nheld_out = 0\n{ENTRY}", tmp_path)
    assert (found.seconds, found.problems[0].held_out) == (True, 0)
    assert load_suite(ROOT / "benchmarks" / "suites" / "larger.toml").seconds
