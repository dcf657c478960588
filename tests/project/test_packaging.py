"""The wheel, as a user gets it: built from the checkout, installed elsewhere, beside somebody else's ``kernels``."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from helpers.paths import ROOT

pytestmark = pytest.mark.slow

SHIPPED = {".c", ".h", ".py", ".safetensors", ".toml", ".typed"}
"""Kinds of file that belong into the wheel wherever they lie; weights/ brings its cards (.md) as well."""

THEIR_KERNELS = 'OWNER = "Hugging Face"\n'

TRAIN = """
import sys
sys.modules["triton"] = None  # import triton fails
import kernels, torch, learned_optim
print(kernels.OWNER)
print(learned_optim.__file__)

torch.manual_seed(0)
model = torch.nn.Linear(10, 1)
inputs = torch.randn(64, 10)
targets = inputs @ torch.randn(10, 1)
optimizer = learned_optim.LearnedOptimizer(model.parameters())
for _ in range(20):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    optimizer.step()
    print(loss.item())
"""


def run(*command: str | Path, cwd: Path) -> str:
    completed = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert completed.returncode == 0, f"{command}\n{completed.stdout}\n{completed.stderr}"
    return completed.stdout


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks or would add, links kept: building leaves no trace in the tree that is tested."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    copy = tmp_path_factory.mktemp("checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():  # not deleted since it was added
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built straight from the checkout."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, cwd=checkout)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_whole_package_and_nothing_else(checkout: Path, wheel: Path) -> None:
    packages = {"learned_optim": Path(), "kernels": Path("learned_optim"), "meta_train": Path("learned_optim")}
    expected = {
        (parent / path.relative_to(checkout)).as_posix()
        for folder, parent in packages.items()
        for path in (checkout / folder).rglob("*")
        if path.suffix in SHIPPED or path.parent.name == "weights"
    }
    metadata = {name for name in files_in(wheel) if name.startswith("learned_optim-")}
    assert files_in(wheel) - metadata == expected
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_sdist_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    # Without --wheel or --sdist, build makes the sdist and then the wheel from it.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    (rebuilt,) = tmp_path.glob("*.whl")
    assert files_in(rebuilt) == files_in(wheel)
    with tarfile.open(sdist) as archive:
        assert {Path(name).name for name in archive.getnames()} >= {"LICENSE", "README.md", "pyproject.toml"}


def new_environment(folder: Path) -> tuple[Path, Path]:
    """A fresh virtual environment: its interpreter, and the folder of its packages."""
    venv.create(folder, symlinks=True)  # without pip: that of the running environment is faster
    (site,) = folder.glob("lib/python*/site-packages")
    return folder / "bin" / "python", site


def borrow_packages(site: Path) -> Path:
    """Let an environment see torch & co. of the running one, after its own packages.

    The folders of a .pth file are not searched for further .pth files, so an editable install of this checkout stays
    out of sight.
    """
    borrowed = site / "borrowed.pth"
    borrowed.write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return borrowed


def test_installed_wheel_trains_beside_other_packages(wheel: Path, tmp_path: Path) -> None:
    python, site = new_environment(tmp_path / "venv")
    pip = (sys.executable, "-m", "pip", "--python", python)
    theirs = site / "kernels" / "__init__.py"
    theirs.parent.mkdir()
    theirs.write_text(THEIR_KERNELS)

    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    borrowed = borrow_packages(site)
    owner, location, *losses = run(python, "-I", "-c", TRAIN, cwd=tmp_path).splitlines()
    assert owner == "Hugging Face"
    assert Path(location).parent == site / "learned_optim"
    assert len(losses) == 20
    assert float(losses[-1]) < float(losses[0])

    borrowed.unlink()
    run(*pip, "uninstall", "--yes", "learned-optim", cwd=tmp_path)
    assert not (site / "learned_optim").exists()
    assert theirs.read_text() == THEIR_KERNELS


WITHOUT_LINKS = """
import learned_optim.meta_train.config.load, torch
from learned_optim.kernels.cpu import kernel as cpu_kernel

parameter = torch.nn.Parameter(torch.ones(10))
parameter.grad = torch.ones(10)
learned_optim.LearnedOptimizer([parameter]).step()
print(float(parameter.detach().max()) < 1)
print(cpu_kernel.__file__)
print(learned_optim.meta_train.config.load.__file__)
"""


def test_editable_install_of_a_clone_without_links_works(checkout: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(checkout, clone, symlinks=True)
    links = [path for path in (clone / "learned_optim").iterdir() if path.is_symlink()]
    assert {link.name for link in links} == {"kernels", "meta_train"}
    for link in links:  # as git does where core.symlinks is false, the default on Windows
        target = link.readlink().as_posix()
        link.unlink()
        link.write_text(target)
    python, site = new_environment(tmp_path / "venv")
    borrow_packages(site)
    options = ("--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, "--editable", clone, cwd=tmp_path)
    moved, *places = run(python, "-I", "-c", WITHOUT_LINKS, cwd=tmp_path).splitlines()
    assert moved == "True"
    assert places == [str(clone / "kernels/cpu/kernel.py"), str(clone / "meta_train/config/load.py")]
    assert "default" in run(python, "-I", "-m", "learned_optim.cli", "rules", "list", cwd=tmp_path)
