"""The code in the README runs as it stands."""

import re
import sys
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT
from learned_optim import cli

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_code_for_users_is_not_out_of_date() -> None:
    promise, training, _ = blocks("python")
    exec(compile(promise, "README.md", "exec"), {"model": torch.nn.Linear(2, 1)})
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(training, "README.md", "exec"), names)
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor)
    assert float(loss.detach()) < 0.9  # targets are N(0, 1): learning nothing leaves 1


def test_own_task_of_the_readme_is_not_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_tasks.py").write_text(blocks("python")[2])
    (tmp_path / "my_rule.toml").write_text(blocks("toml")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as for an installed command
    short = ["--set", "steps=4", "--set", "validation.horizon=5"]
    assert cli.main(["meta-train", "my_rule.toml", *short]) == 0
    assert (tmp_path / "runs" / "my_rule" / "best.safetensors").is_file()
    assert "best validation" in capsys.readouterr().out


def test_links_to_files_are_not_broken() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
