"""Families of a user's own are found beside the configuration, whatever the current folder, and again on resume."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from learned_optim import cli
from learned_optim.meta_train.common import module_search
from learned_optim.meta_train.common.strict import ConfigError
from learned_optim.meta_train.config.load import load_config

MODULE = """
from dataclasses import dataclass

from learned_optim.meta_train.tasks.quadratic import QuadraticFamily


@dataclass(frozen=True)
class Mine(QuadraticFamily):
    place: str = {place!r}
"""
CONFIG = """
steps = 2
[[tasks]]
family = "{family}"
[unroll]
horizon = [2, 2]
truncation = 2
instances = 2
[validation]
every = 2
horizon = 2
instances = 2
"""


@pytest.fixture(autouse=True)
def _search_as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module_search, "_folders", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if "searched_tasks" in name]:
        del sys.modules[name]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with modules and a configuration; the current one is another, with modules of the same names."""
    for place in ("elsewhere", "here"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "searched_tasks.py").write_text(MODULE.format(place=place))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "elsewhere"


@pytest.mark.parametrize("family", ["searched_tasks:Mine", "searched_tasks.py:Mine"], ids=["module", "file"])
def test_module_beside_the_configuration_comes_first(family: str, elsewhere: Path) -> None:
    (elsewhere / "mine.toml").write_text(CONFIG.format(family=family))
    config = load_config(elsewhere / "mine.toml")
    assert getattr(config.tasks[0].build(), "place") == "elsewhere"  # noqa: B009  # not known to type checkers


@pytest.mark.parametrize("family", ["searched_tasks:Mine", "searched_tasks.py:Mine"], ids=["module", "file"])
def test_module_in_the_current_folder_is_found(family: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "searched_tasks.py").unlink()
    (elsewhere / "mine.toml").write_text(CONFIG.format(family=family))
    assert cli.main(["meta-train", str(elsewhere / "mine.toml"), "--output", "run"]) == 0


def test_resumed_run_finds_its_modules(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "mine.toml").write_text(CONFIG.format(family="searched_tasks:Mine"))
    assert cli.main(["meta-train", str(elsewhere / "mine.toml"), "--output", "run"]) == 0
    del sys.modules["searched_tasks"]
    sys.path.remove(str(elsewhere))
    module_search._folders.clear()
    Path("searched_tasks.py").unlink()
    assert cli.main(["meta-train", "--resume", "run"]) == 0


def test_error_lists_the_searched_folders(elsewhere: Path) -> None:
    (elsewhere / "mine.toml").write_text(CONFIG.format(family="searched_tasks_absent:Mine"))
    with pytest.raises(ConfigError, match=rf"; looked beside .* in {elsewhere}, then in the current folder, "):
        load_config(elsewhere / "mine.toml")


def test_byte_order_mark_is_skipped(elsewhere: Path) -> None:
    (elsewhere / "mine.toml").write_bytes(b"\xef\xbb\xbf" + CONFIG.format(family="quadratic").encode())
    assert load_config(elsewhere / "mine.toml").steps == 2
