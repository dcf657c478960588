"""Fixtures that choose where a kernel runs: in Triton's interpreter, in C, or on a GPU."""

import pytest

from helpers.devices import needs_cuda
from helpers.kernel_steps import INTERPRETED_BLOCK_SIZE, KernelPlace, needs_compiler
from helpers.triton import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (pip install learned-optim[gpu])")


@pytest.fixture(
    params=[
        pytest.param("interpreter", marks=pytest.mark.slow),
        pytest.param("c", marks=needs_compiler),
        pytest.param("cuda", marks=needs_cuda),
    ]
)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> KernelPlace:
    if request.param == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        return KernelPlace("cpu", INTERPRETED_BLOCK_SIZE, cuts=True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return KernelPlace("cpu" if request.param == "c" else "cuda", None)


@pytest.fixture(params=["interpreter", pytest.param("c", marks=needs_compiler)])
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
