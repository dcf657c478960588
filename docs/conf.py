"""The documentation as a site: `make docs` writes it to build/docs, without network, and every warning is an error.

The pages are those of this folder, as they read in the repository. Links from them to files of the repository that are
no pages become downloads.
"""

import re
import sys
from os.path import relpath
from pathlib import Path

from sphinx.application import Sphinx

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
sys.path.insert(0, str(ROOT))

from learned_optim import __version__  # noqa: E402

project = "learned_optim"
author = "the learned_optim authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"learned_optim {release}"
html_copy_source = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures are in the source; docstrings give shapes and units
napoleon_use_rtype = False

FILES = {
    "index": "README.md",
    "kernels": "kernels/README.md",
    "examples": "examples/README.md",
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
}
"""Pages that stand elsewhere in the repository: name here -> file."""
CARDS = "learned_optim/weights"
"""Folder of the weights' cards, which the page `rules` ends with."""

LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]*)?(?=\))")


def with_links_from_here(text: str, folder: Path) -> str:
    """Markdown of a file in `folder`, its relative links turned into links from this folder's pages.

    Files that are pages are named by their page; links to folders, of which a site has no listing, lose their target.
    """
    pages = {ROOT / file: f"{name}.md" for name, file in FILES.items()}

    def target(match: re.Match[str]) -> str:
        path = (folder / match[2]).resolve()
        anchor = match[3] or ""
        if path.parent == ROOT / CARDS and path.suffix == ".md":
            return f"{match[1]}rules.md#{path.stem}"
        return f"{match[1]}{pages.get(path) or relpath(path, FOLDER)}{anchor}"

    text = re.sub(r"(?<!!)\[([^\]\[]+)\]\(([^)#:\s]+)\)", lambda m: m[1] if (folder / m[2]).is_dir() else m[0], text)
    return LINK.sub(target, text)


def cards() -> str:
    """The weights' cards, one below the other, their headings one level down."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / CARDS).glob("*.md"))]
    return "\n\n".join(with_links_from_here(re.sub(r"^#", "##", text, flags=re.M), ROOT / CARDS) for text in texts)


def put_together(app: Sphinx, name: str, source: list[str]) -> None:
    """What Sphinx reads for a page: its file, wherever that is, with links that hold in the site."""
    if not (FOLDER / f"{name}.md").exists():
        return
    text = with_links_from_here(source[0], FOLDER)
    if name in FILES:
        file = ROOT / FILES[name]
        whole = with_links_from_here(file.read_text(encoding="utf-8"), file.parent)
        text = whole + "".join(f"\n{block}" for block in re.findall(r"^```{toctree}.*?^```$", text, flags=re.M | re.S))
    if name == "rules":
        text = f"{text}\n{cards()}"
    source[0] = text


def setup(app: Sphinx) -> None:
    """Connect the above."""
    app.connect("source-read", put_together)
