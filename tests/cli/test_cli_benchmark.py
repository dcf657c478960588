"""The command ``benchmark``: its list, its options, and an interruption."""

import json
from pathlib import Path

import pytest

from helpers.commands import run
from learned_optim import save_rule
from learned_optim.meta_train.benchmark.suites import load_suite, shipped_suites
from learned_optim.rules import ScaleFreeLSTM


def test_benchmark_list_names_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("benchmark", "--list", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert run("benchmark", "--list") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [name for suite, problems in found.items() for name in (suite, *problems)]
    suites = [load_suite(name) for name in shipped_suites()]
    assert names == [name for suite in suites for name in (suite.name, *(problem.name for problem in suite.problems))]


TINY = """
steps = 4
seeds = 2
tuning_seeds = 2
rates = [0.1, 0.01]
baselines = ["Adam"]
[[problems]]
name = "first"
family = "quadratic"
[[problems]]
name = "second"
family = "quadratic"
noise = 0.1
"""


def test_benchmark_options_reach_the_comparison(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("tiny.toml").write_text(TINY)
    save_rule(ScaleFreeLSTM(2), tmp_path / "mine.safetensors")
    chosen = ["--problems", "second", "--seeds", "3", "--rules", "mine.safetensors", "--baselines", "SGD,Adam@0.1"]
    assert run("benchmark", "tiny.toml", *chosen, "--cache", "stored", "--json") == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    (problem,) = document["problems"].values()
    assert [row["optimizer"] for row in problem] == ["Adam", "SGD", "Adam@0.1", "mine"]
    assert (document["suite"], document["seeds"]) == ("tiny", {"second": 3})
    assert "second, 4 steps: tuning SGD over 2 rates" in captured.err
    assert Path("benchmark/tiny/summary.csv").is_file()
    assert list(Path("stored").rglob("*.safetensors"))


OWN = """
import torch
inputs = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
def build():
    return torch.nn.Linear(2, 2)
def batch(generator):
    rows = torch.randint(40, (8,), generator=generator)
    return inputs[rows]
def held_out(generator):
    return inputs[40:]
def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch), (batch.sum(1) > 0).long())
def accuracy(model, batch):
    return (model(batch).argmax(1) == (batch.sum(1) > 0)).float().mean()
"""


def test_function_of_a_file_is_compared_on_its_held_out_data(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.py").write_text(OWN)
    short = ["--steps", "5", "--seeds", "2", "--baselines", "Adam", "--cache", "stored"]
    assert run("benchmark", "own.py:build", *short) == 0
    shown = capsys.readouterr().out
    assert "held out, end  held out, best  at step  accuracy, end  best" in shown
    assert "held out / Adam, end" in shown
    assert {"summary.csv", "held_out.csv", "held_out.png"} <= {path.name for path in Path("benchmark/build").iterdir()}
    assert not Path("benchmark/build/timing.csv").exists()


def test_steps_of_a_suite_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("benchmark", "quick", "--steps", "5") == 1
    assert "--steps goes with --model" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_shows_held_out_losses_and_accuracies(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--problems", "digits-relu", "--seeds", "2", "--baselines", "Adam@0.01", "--cache", "stored", "--json"]
    assert run("benchmark", "quick", *short, "--seconds") == 0
    document = json.loads(capsys.readouterr().out)
    for row in document["problems"]["digits-relu"]:
        assert 0 < row["held_out_best"] <= row["held_out_end"]
        assert 0.5 < row["accuracy_end"] <= row["accuracy_best"] <= 1
        assert row["seconds_per_step"] > 0
        assert row["adam_steps_in_equal_seconds"] >= 1
    assert document["scores_in_seconds"][0]["optimizer"] == "default"


def test_interrupted_benchmark_says_how_to_resume(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr("learned_optim.meta_train.benchmark.evaluation.train", interrupted)
    Path("tiny.toml").write_text(TINY)
    assert run("benchmark", "tiny.toml", "--cache", "stored") == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == [
        "finished runs are stored; the same command continues from there",
        "learned-optim: interrupted",
    ]


def test_file_in_place_of_a_folder_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.txt").write_text("mine")
    for arguments in (
        ["benchmark", "quick", "--out", "notes.txt"],
        ["meta-train", "demo", "--output", "notes.txt"],
        ["demo", "--output", "notes.txt/deeper"],
    ):
        assert run(*arguments) == 1
        folder = arguments[-1]
        message = f"learned-optim: error: {arguments[-2]} {folder}: notes.txt is a file; name a folder\n"
        assert capsys.readouterr().err == message
    assert Path("notes.txt").read_text() == "mine"


def test_model_without_its_class_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text("")
    assert run("benchmark", "--model", "mine.py") == 1
    assert "mine.py? write FILE.py:CLASS" in capsys.readouterr().err
