"""Every fenced block of every document holds: Python runs, configurations are accepted, commands exist.

A block that another test runs says so in a comment above it, ``<!-- run by tests/test_x.py -->``, and one that cannot
run says why, ``<!-- not run: it needs eight GPUs -->``. All other Python blocks of a page are run here, in order and in
one namespace.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from helpers.architecture import pyproject
from helpers.paths import ROOT
from learned_optim import cli
from learned_optim.meta_train.config.load import config_from_tables, shipped_configs
from learned_optim.meta_train.few_shot.settings import shipped_few_shot_configs

PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("examples", "kernels")),
]
PROSE = {"text", "{toctree}", "bibtex"}
"""Languages of blocks that hold no code."""
SHELL = {"", "sh"}
NEEDS = {"torchrun": "torch", "tensorboard": "tensorboard", "pip": "", "git": "", "cd": "", "export": ""}
"""Commands that are not ours, which may be named; the rest are checked."""


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    comment: str
    """Text of the comment on the line above, or empty."""

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> Iterator[Block]:
    for match in re.finditer(r"^( *)```([^\n]*)\n(.*?)^\1```$", text, flags=re.MULTILINE | re.DOTALL):
        before = text[: match.start()]
        comment = re.search(r"<!-- ([^\n]*) -->\n\Z", before)
        yield Block(page, before.count("\n") + 1, match[2].strip(), match[3], comment[1] if comment else "")


BLOCKS = [block for page in PAGES for block in blocks_of(page.read_text(), str(page.relative_to(ROOT)))]
RUN_HERE = {
    page: [block for block in BLOCKS if block.page == page and block.language == "python" and not block.comment]
    for page in dict.fromkeys(block.page for block in BLOCKS)
}


def of(*languages: str) -> pytest.MarkDecorator:
    chosen = [block for block in BLOCKS if block.language in languages and not block.comment.startswith("not run: ")]
    return pytest.mark.parametrize("block", chosen, ids=[block.name for block in chosen])


def test_every_block_has_a_known_language() -> None:
    for block in BLOCKS:
        assert block.language in {"python", "toml", "c"} | SHELL | PROSE, block.name  # of C there is a test of its own


@of("python", "toml")
def test_comment_names_a_test_that_reads_the_page(block: Block) -> None:
    if block.comment:
        (file,) = re.findall(r"^run by (tests/[\w/]+\.py)$", block.comment)
        assert Path(block.page).name in (ROOT / file).read_text(), f"{file} does not read {block.page}"


@pytest.mark.parametrize("page", [page for page, blocks in RUN_HERE.items() if blocks])
def test_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "page"}
    for block in RUN_HERE[page]:
        exec(compile("\n" * block.line + block.code, page, "exec"), names)


@of("toml")
def test_configuration_is_accepted(block: Block) -> None:
    import tomllib

    tables = tomllib.loads(block.code)
    if not block.comment:  # else its family is in a block beside it, and the test that runs both reads it
        config_from_tables({"steps": 1, **tables})


def commands(code: str) -> Iterator[list[str]]:
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def check_command(words: list[str]) -> None:
    """Raise, or fail, where a command of ours does not exist or would refuse its arguments."""
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :] if "-m" in words else ["python", words[-1]]
        words = ["learned-optim", *words[1:]] if words[0] == "learned_optim.cli" else words
    match words:
        case ["learned-optim", *arguments]:
            options = cli._parser().parse_args(arguments)
            config = str(getattr(options, "config", None) or "default.toml")
            shipped = shipped_configs() | shipped_few_shot_configs()
            assert config in shipped or config.endswith(".toml") or config == "CONFIG", config
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target
        case ["python", "-m", module, *_]:
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
        case ["python", file, *_]:
            assert (ROOT / file).is_file(), file
        case ["pip", "install", *arguments]:
            listed = re.findall(r"\[(.*?)\]", " ".join(arguments))
            extras = {extra for names in listed for extra in names.split(",")}
            assert extras <= set(pyproject()["project"]["optional-dependencies"]), extras
        case [name, *_]:
            assert name in NEEDS, name


@of(*SHELL)
def test_command_exists(block: Block) -> None:
    for words in commands(block.code):
        check_command(words)


class TestChecksCanFail:
    @pytest.mark.parametrize(
        "command",
        [
            "learned-optim meta-trian default",
            "learned-optim meta-train default --rules x",
            "learned-optim meta-train defualt",
            "torchrun --nproc-per-node 8 -m learned_optim.cli meta-train default --ouput runs/mine",
            "torchrun --nproc-per-node 2 examples/fsdp3.py",
            "make demos",
            "python -m benchmarks.nothing",
            "pip install 'learned-optim[tarin]'",
            "learned_optim demo",
        ],
    )
    def test_wrong_command_is_found(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises((AssertionError, SystemExit)):
            check_command(shlex.split(command))

    def test_blocks_and_their_comments_are_found(self) -> None:
        text = "# T\n\n<!-- not run: why -->\n```python\nx\n```\n\n```\ny\n```\n"
        assert list(blocks_of(text, "p")) == [
            Block("p", 4, "python", "x\n", "not run: why"),
            Block("p", 8, "", "y\n", ""),
        ]
