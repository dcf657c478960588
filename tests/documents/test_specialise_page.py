"""The page docs/specialise.md: its recipe is the one that runs, and its file becomes a rule."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import ROOT
from learned_optim import cli, load_rule
from learned_optim.meta_train.specialise import Request, recipe

PAGE = (ROOT / "docs" / "specialise.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_shown_recipe_is_the_one_that_runs() -> None:
    (shown,) = map(tomllib.loads, blocks("toml"))
    request = Request(task="mlp", options={}, steps=1000, minutes=20.0, rule="default")
    used: dict[str, Any] = recipe(request, 0, steps=1, every=1)
    assert shown["rule"].items() <= used["rule"].items()
    assert {**shown["validation"], "every": 1} == used["validation"]
    assert all(shown[table] == used[table] for table in ("unroll", "estimator", "meta_optimizer"))


@pytest.mark.slow
def test_file_of_the_page_becomes_a_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_model.py").write_text(blocks("python")[0])
    (command,) = re.findall(r"^learned-optim (specialise my_model.py) --steps 1000$", PAGE, flags=re.MULTILINE)
    assert cli.main([*command.split(), "--steps", "12", "--minutes", "0.05"]) == 0
    out = capsys.readouterr().out
    for words in ("take about", "meta-step 0: validation", "tuned Adam", "over the default rule", "95% interval"):
        assert words in out, words
    (used,) = re.findall(r'"(runs/specialise-my_model/specialised.safetensors)"', blocks("python")[1])
    assert out.splitlines()[-1] == f'use it: LearnedOptimizer(model.parameters(), "{used}")'
    assert load_rule(used).name == load_rule("default").name
    rows = Path("runs/specialise-my_model/comparison/summary.csv").read_text()
    assert all(f",{name}," in rows for name in ("default", "specialised", "Adam", "AdamW-cosine"))
    assert Path("runs/specialise-my_model/comparison/comparison.png").is_file()
