"""The command ``doctor`` reports wrong steps and old packages, and what a step takes on a user's model."""

import importlib.metadata
import json
import re
from pathlib import Path

import pytest
import torch

from learned_optim import __version__, available_rules, cli, installation
from learned_optim.cli.common import coloured
from learned_optim.cli.doctor import RED
from learned_optim.step import plain


def test_sound_installation_passes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEARNED_OPTIM_DATA", "/nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["learned-optim"] == __version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["data"]["mnist"] == "not here: learned-optim data fetch mnist"
    assert found["problems"] == []
    verdicts = found["a step of each rule"]
    assert all(verdicts[f"{name}, cpu"].startswith("right (relative error ") for name in available_rules())
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("\nnothing is wrong\n")  # no colours: this is no terminal


def test_wrong_step_is_reported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = plain._change
    monkeypatch.setattr(plain, "_change", lambda *arguments, **named: right(*arguments, **named) * (1 + 1e-4))
    assert cli.main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("learned-optim: error: default, cpu: WRONG: relative error 1.0e-04")
    assert "nothing is wrong" not in captured.out


def test_failing_step_is_reported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **named: object) -> object:
        raise AssertionError("no such\ninstruction")

    monkeypatch.setattr(plain, "_change", broken)
    assert cli.main(["doctor", "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert "lstm-l2l-mnist, cpu: WRONG: AssertionError: no such instruction" in problems


def test_missing_and_old_packages_are_distinguished(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package in ("triton", "safetensors"):
            raise importlib.metadata.PackageNotFoundError
        return "2.10.1+cu128"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = installation.versions()
    assert found["triton"] == "not installed: pip install 'learned-optim[gpu]'"
    assert found["safetensors"] == "WRONG: not installed"
    assert found["torch"] == "WRONG: 2.10.1+cu128 is too old: pip install 'torch>=2.11'"
    assert found["numpy"] == "2.10.1+cu128"


@pytest.mark.parametrize(
    ("terminal", "no_color", "expected"),
    [(True, "", "\x1b[31mWRONG\x1b[0m"), (True, "1", "WRONG"), (False, "", "WRONG")],
    ids=["terminal", "NO_COLOR", "file"],
)
def test_colours_only_on_terminals(
    terminal: bool, no_color: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert coloured("WRONG", RED) == expected


MODEL = """
import torch
def build():
    return torch.nn.Linear(3, 2)
def batch(generator):
    return torch.randn(4, 3, generator=generator)
def loss(model, batch):
    return model(batch).square().mean()
"""


def test_seconds_of_a_step_on_a_users_model_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learned_optim.meta_train.benchmark.timing.SECONDS_A_ROUND", 0.001)
    Path("mine.py").write_text(MODEL)
    assert cli.main(["doctor", "--model", "mine.py:build"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("a training step of mine.py:build: 8 parameters on cpu, ")
    assert {line.split("  ")[0] for line in shown.splitlines()} >= {"default rule", "Adam", "Adam, fused"}
    assert shown.count("beside Adam") == 2
    assert cli.main(["doctor", "--model", "mine.py:build", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["optimizers"]["Adam"]["step_ms"] > found["forward_and_backward_ms"] > 0
    assert set(found["steps_to_save"]) == {"Adam", "Adam, fused"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mine.py"], "which class of .*mine.py. write FILE.py:CLASS"),
        (["--model", "mine.py:nothing"], "mine.py defines no 'nothing'"),
        (["--model", "absent.py:build"], "no file .*absent.py"),
        (["--model", "mine.py:build", "--device", "nowhere"], "--device nowhere: "),
        (["--device", "cpu"], "--device goes with --model"),
    ],
    ids=["class", "name", "file", "device", "alone"],
)
def test_wrong_arguments_are_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(MODEL)
    assert cli.main(["doctor", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(message, captured.err)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fused_kernels_are_tried_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["a step of each rule"]["default, cuda fused"].startswith("right")
