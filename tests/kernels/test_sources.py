"""The generated sources of a rule: those that the documents show, and those that the command line prints."""

import linecache
import re
from typing import Any

import pytest
import torch

from helpers.paths import ROOT
from learned_optim import cli
from learned_optim.kernels.sources.registry import Sources
from learned_optim.step.programs import sources_of


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture
def shown() -> Sources:
    """The sources of the rule in the documentation."""
    code, names = blocks("docs/own-rule.md", "python")[0], dict[str, Any]()
    linecache.cache["own_rule.py"] = len(code), None, code.splitlines(True), "own_rule.py"
    exec(compile(code.rsplit("\n\n", 1)[0], "own_rule.py", "exec"), names)  # all but its entry among the architectures
    sources = sources_of(names["Mixture"](), torch.float32)
    assert isinstance(sources, Sources)
    return sources


def test_documented_sources_are_current(shown: Sources) -> None:
    (in_c,) = blocks("kernels/README.md", "c")
    (in_triton,) = blocks("kernels/README.md", "text")
    assert in_c == shown.c.text
    assert in_triton in shown.triton.text


def test_key_is_reproducible_and_depends_on_the_dtype(shown: Sources) -> None:
    assert shown.key == Sources(shown.traced, shown.dtype, shown.name).key
    assert shown.key != Sources(shown.traced, torch.float64, shown.name).key


@pytest.mark.parametrize(
    ("kind", "beginning"), [("c", "/* The step of lstm-l2l,"), ("triton", '"""The step of lstm-l2l,')]
)
def test_source_is_printed(kind: str, beginning: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rules", "show", "lstm-l2l-mnist", "--source", kind]) == 0
    assert capsys.readouterr().out.startswith(beginning)


def test_source_with_plot_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rules", "show", "default", "--source", "c", "--plot", "x.png"]) == 1
    assert "leave out --plot" in capsys.readouterr().err
