"""The site's pages: links that leave docs/ lead somewhere, and no page is left out. `make docs` builds it."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import ROOT

pytest.importorskip("sphinx", reason="needs sphinx: the extra 'docs'")

CONF: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "conf.py"))
with_links: Callable[[str, Path], str] = CONF["with_links_from_here"]


@pytest.mark.parametrize(
    ("folder", "text", "expected"),
    [
        (".", "[a](docs/using.md)", "[a](using.md)"),
        (".", "[a](docs/meta-training.md#runs)", "[a](meta-training.md#runs)"),
        (".", "![a](docs/how_it_works.svg)", "![a](how_it_works.svg)"),
        (".", "![a](benchmarks/results/paper/comparison.png)", "![a](../benchmarks/results/paper/comparison.png)"),
        (".", "[a](kernels/README.md)", "[a](kernels.md)"),
        ("docs", "[a](../kernels/README.md#registers)", "[a](kernels.md#registers)"),
        ("docs", "[a](../README.md#results)", "[a](index.md#results)"),
        ("docs", "[a](../tests/optimizer/test_contract.py)", "[a](../tests/optimizer/test_contract.py)"),
        ("docs", "[`a`](../benchmarks/results) and [b](rules.md)", "`a` and [b](rules.md)"),
        ("examples", "[a](digits.py)", "[a](../examples/digits.py)"),
        (".", "[a](learned_optim/weights/default.md)", "[a](rules.md#default)"),
        (".", "[a](#results) [b](https://example.org/a)", "[a](#results) [b](https://example.org/a)"),
    ],
)
def test_link_leads_to_the_same_target_in_the_site(folder: str, text: str, expected: str) -> None:
    assert with_links(text, ROOT / folder) == expected


def test_page_of_another_folder_links_to_its_source() -> None:
    for name, file in CONF["FILES"].items():
        assert (ROOT / file).is_file()
        assert f"(../{file})" in (ROOT / "docs" / f"{name}.md").read_text(), name  # for readers on a code host


def test_contents_list_every_page() -> None:
    contents = (ROOT / "docs" / "index.md").read_text()
    listed = {
        line
        for block in re.findall(r"^```{toctree}\n(.*?)^```", contents, flags=re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
        if line and not line.startswith(":")
    }
    pages = {path.stem for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".rst")}
    assert listed == pages - {"index"}


def test_rules_page_holds_the_card_of_every_rule() -> None:
    cards = CONF["cards"]()
    for path in (ROOT / CONF["CARDS"]).glob("*.md"):
        assert f"## {path.stem}\n" in cards, path.name
        assert f"(../{CONF['CARDS']}/{path.name})" in (ROOT / "docs" / "rules.md").read_text(), path.name


def test_diagram_matches_its_script(tmp_path: Path) -> None:
    matplotlib: Any = pytest.importorskip("matplotlib", reason="needs matplotlib: the extra 'demo'")
    matplotlib.use("agg")
    committed = (ROOT / "docs" / "how_it_works.svg").read_text()
    if f"Matplotlib v{matplotlib.__version__}," not in committed:
        pytest.skip("another matplotlib draws other bytes")
    drawn: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "diagram.py"))
    drawn["main"].__globals__["PATH"] = tmp_path / "drawn.svg"
    drawn["main"]()
    assert (tmp_path / "drawn.svg").read_text() == committed
