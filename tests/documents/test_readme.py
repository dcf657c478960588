"""The code in the README runs as it stands."""

import re

import pytest
import torch

from helpers.paths import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_code_for_users_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn: the extra 'demo'")
    promise, training = blocks("python")
    exec(compile(promise, "README.md", "exec"), {"model": torch.nn.Linear(2, 1)})
    exec(compile(training, "README.md", "exec"), {})
    (accuracy,) = re.findall(r"^test accuracy (\d+\.\d)%$", capsys.readouterr().out, flags=re.MULTILINE)
    (promised,) = re.findall(r"gets about (\d+)% of the test images right", README)
    assert float(accuracy) == pytest.approx(float(promised), abs=1.5)  # 450 images: one of them is 0.2%


def test_configuration_of_the_readme_is_that_of_the_tutorial() -> None:
    tutorial = (ROOT / "docs" / "meta-training.md").read_text()
    (configuration,) = blocks("toml")
    assert f"```toml\n{configuration}```" in tutorial


def test_links_to_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
