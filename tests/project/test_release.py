"""Versions and extras are stated alike in all files that name them."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import learned_optim
from helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
README = " ".join((ROOT / "README.md").read_text().split())
PINNED: dict[str, Version] = {
    str(canonicalize_name(name)): Version(version)
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
}
TORCH = next(Requirement(each) for each in PROJECT["dependencies"] if each.startswith("torch"))


def test_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["dynamic"]
    assert Version(learned_optim.__version__)
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert cited == learned_optim.__version__


def test_changelog_begins_with_the_version_or_unreleased() -> None:
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] in ("Unreleased", learned_optim.__version__)


def test_oldest_versions_agree_everywhere() -> None:
    (python,) = re.findall(r"^>=(3\.\d+)$", PROJECT["requires-python"])
    (torch,) = (str(specifier).removeprefix(">=") for specifier in TORCH.specifier)
    pinned = ".".join(str(PINNED["torch"]).split(".")[:2])
    assert f"Python {python} or newer and torch {torch} or newer (tested with {pinned})" in README
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    assert f"Python {python} or newer is needed" in (ROOT / "Makefile").read_text()


def test_page_on_using_names_every_extra() -> None:
    rows = re.findall(r"^\| (`[\w`(), -]+) \|", (ROOT / "docs" / "using.md").read_text(), flags=re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row)} >= set(EXTRAS)


@pytest.mark.parametrize("extra", EXTRAS)
def test_constraints_pin_suitable_versions_of_every_extra(extra: str) -> None:
    for text in EXTRAS[extra]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            assert requirement.extras <= set(EXTRAS), text
            continue
        name = canonicalize_name(requirement.name)
        assert name in PINNED, f"{text} is not in constraints.txt"
        assert requirement.specifier.contains(PINNED[name]), text


def test_pinned_torch_is_supported() -> None:
    assert TORCH.specifier.contains(PINNED["torch"])
