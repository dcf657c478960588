"""docs/benchmarks.md keeps its promises: its example runs, its suite is one, its numbers are the code's."""

import json
import re
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT
from learned_optim import cli
from learned_optim.meta_train.benchmark.evaluation import LADDER, MOMENTUM
from learned_optim.meta_train.benchmark.harness import MOST_LONGER
from learned_optim.meta_train.benchmark.held_out import LOOKS, ROWS
from learned_optim.meta_train.benchmark.scores import DIVERGED, LARGEST_RATIO, POINTS
from learned_optim.meta_train.benchmark.suites import load_suite, shipped_suites
from learned_optim.meta_train.inner.speedups import FASTEST, SLOWEST

FOLDER = ROOT / "docs"
TEXT = (FOLDER / "benchmarks.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("my_model.py").write_text(block("python"))


@pytest.mark.slow
def test_model_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--steps", "30", "--seeds", "2", "--baselines", "Adam@1e-2", "--cache", "stored", "--json"]
    assert cli.main(["benchmark", "--model", "my_model.py:MyModel", *short]) == 0
    document = json.loads(capsys.readouterr().out)
    first, _, last = document["problems"]["MyModel"]
    assert (first["optimizer"], last["optimizer"]) == ("Adam", "default")
    assert last["final_loss"] < 5.0  # the variance of the targets is 10 times that of a sine, 0.43
    assert last["held_out_best"] < 5.0
    assert Path("benchmark/MyModel/summary.csv").is_file()


def test_function_of_the_page_is_measured_by_doctor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learned_optim.meta_train.benchmark.timing.SECONDS_A_ROUND", 0.001)
    assert cli.main(["doctor", "--model", "my_model.py:build", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 10 * 64 + 64 + 64 + 1


def test_suite_of_the_page_loads() -> None:
    Path("mine.toml").write_text(block("toml"))
    assert [problem.name for problem in load_suite("mine.toml").problems] == ["digits-200", "digits-1000", "mine"]


def test_commands_of_the_page_are_parsed() -> None:
    commands = re.findall(r"^learned-optim (.*?)(?:\s*#.*)?$", TEXT, flags=re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        options = cli._parser().parse_args(command.split())
        if getattr(options, "suite", None):
            suite = load_suite(options.suite)
            assert suite.only(options.problems or [problem.name for problem in suite.problems])


def test_table_lists_every_shipped_suite() -> None:
    assert set(re.findall(r"^\| `([\w-]+)` \|", TEXT, flags=re.MULTILINE)) == set(shipped_suites()) - {"demo"}


def test_numbers_of_the_page_are_those_of_the_code() -> None:
    text = " ".join(TEXT.split())
    assert f"cut to {SLOWEST:g} ... {FASTEST:g}, and a problem with a diverged run counts as {SLOWEST:g}" in text
    assert DIVERGED == 2
    assert "above twice the initial loss" in text
    assert f"between {min(LADDER):g} and {max(LADDER):g}" in text.replace("1e-7", "1e-07")
    assert f"momentum is {MOMENTUM:g}" in text
    assert f"at most {POINTS} a curve" in text
    assert f"Every {1 / LOOKS:.0%} of the steps the loss is taken on {ROWS} rows" in text
    assert (LARGEST_RATIO, MOST_LONGER) == (10, 10)
    assert "at least 1/10 and at most 10" in text
    assert "more than ten times as long as Adam's" in text


def test_links_to_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (FOLDER / target).exists(), target
