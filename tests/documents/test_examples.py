"""Every example runs, at a tiny size, and prints what it promises."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT
from learned_optim import load_rule
from learned_optim.meta_train.data.datasets import DataNotFoundError, find

FOLDER = ROOT / "examples"
LOSS = r"step 3: loss (\d+\.\d+)"

pytestmark = pytest.mark.slow


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run an example in this process and return what it prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: the extra 'frameworks'")


def test_digits_example_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("digits.py", "--steps", "60", monkeypatch=monkeypatch, capsys=capsys)
    (accuracy,) = re.findall(r"^test accuracy: (\d+\.\d)%$", out, flags=re.MULTILINE)
    assert float(accuracy) > 70  # guessing: 10


@pytest.mark.parametrize("arguments", [(), ("--adam", "1e-3")], ids=["learned", "adam"])
def test_conv_net_example_runs(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        find("mnist")
    except DataNotFoundError as error:
        pytest.skip(str(error))
    out = run("mnist_conv_net.py", "--steps", "3", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert re.search(LOSS, out)
    assert re.search(r"^test accuracy: \d+\.\d%$", out, flags=re.MULTILINE)


def test_transformer_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 10)
    out = run("character_transformer.py", "--steps", "3", "--text", "text.txt", monkeypatch=monkeypatch, capsys=capsys)
    losses, written = out.split("\n", 1)
    assert re.fullmatch(LOSS, losses)
    assert len(written.rstrip("\n")) == 8 + 60
    assert set(written) <= set("abcdefghijklmnopqrstuvwxyz. \n")


@pytest.mark.filterwarnings("ignore")  # frameworks give advice, such as more workers
@pytest.mark.parametrize(
    ("name", "packages", "promise"),
    [
        ("lightning_digits.py", ("lightning",), r"loss \d+\.\d+ after 3 steps(.|\n)*^test accuracy: \d+\.\d%$"),
        ("hugging_face_trainer.py", ("transformers", "accelerate"), r"^mean loss \d+\.\d+\n58\+67=[\d+=]{3}$"),
    ],
    ids=["lightning", "transformers"],
)
def test_framework_example_runs(
    name: str,
    packages: tuple[str, ...],
    promise: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    needs(*packages)
    out = run(name, "--steps", "3", monkeypatch=monkeypatch, capsys=capsys)
    assert re.search(promise, out, flags=re.MULTILINE), out


def test_meta_training_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("meta_train_for_my_model.py", "--steps", "3", monkeypatch=monkeypatch, capsys=capsys)
    for line in ("meta-step 3: validation score", "default: ", "spirals.safetensors: ", "Adam at 0."):
        assert f"\n{line}" in f"\n{out}", line
    assert load_rule("spirals.safetensors").name == load_rule("default").name


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_fsdp_example_halves_the_state_of_each_process() -> None:
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(
        [*command, FOLDER / "fsdp2.py", "--steps", "3"], env=environment, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    assert re.search(LOSS, completed.stdout)
    ((*numbers,),) = re.findall(r"^state here: ([\d,]+) of ([\d,]+) bytes$", completed.stdout, flags=re.MULTILINE)
    here, whole = (int(number.replace(",", "")) for number in numbers)
    assert here == pytest.approx(whole / 2, rel=0.01)  # one row of one layer cannot be halved


def test_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat: the extra 'dev'")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient: the extra 'dev'")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    notebook = nbformat.read(FOLDER / "quickstart.ipynb", as_version=4)
    patience = {"timeout": 240, "startup_timeout": 240}  # seconds, for a busy machine
    nbclient.NotebookClient(notebook, **patience, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    scores = [float(score) for score in re.findall(r": (\d\.\d+)$", printed, flags=re.MULTILINE)]
    assert min(scores[1:]) < scores[0]  # meta-training has made the rule better than Adam at 0.003


def test_every_example_is_listed_and_tested() -> None:
    names = {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb")}
    assert set(re.findall(r"\(([\w.]+\.(?:py|ipynb))\)", (FOLDER / "README.md").read_text())) == names
    assert all(f'"{name}"' in Path(__file__).read_text() for name in names)
    for path in FOLDER.glob("*.py"):
        docstring = path.read_text().split('"""')[1]
        assert f"examples/{path.name}" in docstring, path.name
        assert "Prints" in " ".join(docstring.split()), path.name
