"""docs/using.md and docs/supported.md keep their promises: numbers of its tables, links to tests, code that runs."""

import ast
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from helpers.paths import ROOT
from learned_optim import LearnedOptimizer, available_rules

FOLDER = ROOT / "docs"
TEXT = (FOLDER / "using.md").read_text()
SUPPORTED = (FOLDER / "supported.md").read_text()


def table(heading: str, text: str = TEXT) -> list[list[str]]:
    """Cells of the rows of the first table below a heading, without the table's own head."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def bytes_a_parameter(make: Callable[..., Optimizer], dtype: torch.dtype, **options: Any) -> float:
    values = nn.Parameter(torch.ones(10, 7, dtype=dtype))
    values.grad = torch.ones_like(values)
    optimizer = make([values], **options)
    optimizer.step()
    state: dict[str, Tensor] = optimizer.state[values]
    of_tensor = [state[entry] for entry in ("step", "scale") if entry in state]
    assert all(value.numel() * value.element_size() == 4 for value in of_tensor)
    of_coordinates = [value for entry, value in state.items() if entry not in ("step", "scale")]
    total = sum(tensor.numel() * tensor.element_size() for tensor in of_coordinates)
    return total / values.numel()


def test_table_states_the_memory_of_the_state() -> None:
    rows = {name.strip("`"): cells for name, *cells in table("Memory")}
    assert set(rows) == {"Adam", *available_rules()}
    for name, (usual, double, *others) in rows.items():
        if name == "Adam":
            assert others == ["", ""]
            assert (bytes_a_parameter(Adam, torch.float32), bytes_a_parameter(Adam, torch.bfloat16)) == (8, 4)
            assert (int(usual), int(double)) == (8, bytes_a_parameter(Adam, torch.float64))
            continue
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert bytes_a_parameter(LearnedOptimizer, dtype, rule=name) == int(usual)
        assert bytes_a_parameter(LearnedOptimizer, torch.float64, rule=name) == int(double)
        for cell, state_dtype in zip(others, (torch.float32, torch.bfloat16), strict=True):
            needed = bytes_a_parameter(LearnedOptimizer, torch.float32, rule=name, state_dtype=state_dtype)
            assert needed == int(cell)


def test_readme_quotes_the_memory_of_the_table() -> None:
    readme = (FOLDER.parent / "README.md").read_text()
    (state,) = re.findall(r"the state takes (\d+) bytes a parameter \(Adam: (\d+)\)", readme)
    rows = {name.strip("`"): cells[0] for name, *cells in table("Memory")}
    assert state == (rows["default"], rows["Adam"])


def defined_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_support_table_links_to_existing_tests() -> None:
    rows = table("The table", SUPPORTED)
    assert len(rows) > 40
    for what, supported, test in rows:
        link = re.fullmatch(r"\[(test_\w+\.py)(?:::(\w+))?\]\((\.\./tests/[\w/.]+)\)", test)
        assert link is not None, what
        file, name, target = link.groups()
        path = FOLDER / target
        assert path.name == file, what
        assert path.is_file(), what
        assert name is None or name in defined_in(path), f"{what}: no {name} in {file}"
        assert supported, what


def test_support_table_marks_what_has_not_run_on_a_gpu() -> None:
    marked = {
        (path.name, node.name)
        for path in (FOLDER.parent / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and any("needs_cuda" in ast.unparse(each) for each in node.decorator_list)
    }
    assert marked
    for what, supported, test in table("The table", SUPPORTED):
        file, _, name = test.strip("[").partition("]")[0].partition("::")
        if (file, name) in marked:
            assert "not yet run on a GPU" in supported, what


def test_links_to_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT + SUPPORTED):
        assert (FOLDER / target).exists(), target


# What the prose says.


@pytest.mark.filterwarnings("ignore:lr=0.001 makes every learned step:UserWarning")
def test_adam_rate_makes_steps_a_thousand_times_smaller() -> None:
    def moved(lr: float = 1.0) -> Tensor:
        values = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        values.grad = torch.ones_like(values)
        LearnedOptimizer([values], lr=lr).step()
        return values.detach()

    torch.testing.assert_close(1000 * moved(1e-3), moved())


@pytest.mark.parametrize("weight_decay", [1e-2, 0.3])
def test_weight_decay_matches_adamw(weight_decay: float) -> None:
    ours, theirs = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    ours.grad = theirs.grad = torch.zeros(3, dtype=torch.float64)
    LearnedOptimizer([ours], weight_decay=weight_decay).step()
    torch.optim.AdamW([theirs], lr=1e-3, weight_decay=weight_decay).step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(("rule", "same"), [("default", True), ("lstm-l2l-quadratic", False)])
def test_default_rule_is_invariant_to_the_gradient_scale(rule: str, same: bool) -> None:
    ends: list[Tensor] = []
    for scale in (1.0, 2.0**-7):
        values = nn.Parameter(torch.zeros(5))
        optimizer = LearnedOptimizer([values], rule)
        for step in range(5):
            values.grad = scale * torch.randn(5, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        ends.append(values.detach())
    assert torch.allclose(ends[0], ends[1], rtol=1e-3, atol=0.0) == same


def test_one_cycle_without_momentum_is_accepted() -> None:
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(1))])
    OneCycleLR(optimizer, max_lr=1.0, total_steps=10, cycle_momentum=False)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 25)


# Snippets.


def snippets() -> dict[str, str]:
    """Heading -> code below it."""
    found = re.findall(r"^### ([^\n]+)\n(?:(?!^#).)*?^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    return dict(found)


def test_every_snippet_is_run() -> None:
    assert set(snippets()) == {"Lightning", "Accelerate", "Transformers", "PyTorch's own wrappers"}
    assert len(snippets()) == TEXT.count("```python")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # frameworks give advice, such as more workers
@pytest.mark.parametrize("name", snippets())
def test_snippet_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = snippets()[name]
    for package in re.findall(r"^import (\w+)$", code, flags=re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: the extra 'frameworks'")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(code, "docs/using.md", "exec"), names)
    with torch.no_grad():
        if name == "Transformers":
            names["model"].eval()
            loss = names["model"](input_ids=names["words"], labels=names["words"]).loss
            assert loss < 0.8 * torch.tensor(16.0).log()  # of guessing one of 16 words
            return
        network = names["model"].network if name == "Lightning" else names["model"]
        loss = (network(names["inputs"]) - names["targets"]).square().mean()
    assert loss < 0.9  # targets are N(0, 1): learning nothing leaves 1
