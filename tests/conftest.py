"""Fixtures of several test files."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

# Imports of torch are inside the fixtures: xdist's own process, for which its workers wait, loads this file too.


@pytest.fixture
def double() -> Iterator[None]:
    """Float64 by default, for comparisons with finite differences and plain loops."""
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Matrices of four columns gain nothing from more, and results are compared bit for bit with other processes'."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small_neural_art(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data that holds ``neural_art/``, with small random networks and pictures."""
    from helpers.small_families import write_neural_art

    folder = tmp_path_factory.mktemp("data")
    write_neural_art(folder)
    return folder


@pytest.fixture
def neural_art(small_neural_art: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Neural art on that folder, whatever data this machine has; other data are not found."""
    from learned_optim.meta_train import tasks

    monkeypatch.setenv("LEARNED_OPTIM_DATA", str(small_neural_art))
    caches = (tasks.neural_art.picture, tasks.neural_art.feature_network)
    for cache in caches:
        cache.cache_clear()
    yield small_neural_art
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def _tuning_is_stored_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what meta-training finds about Adam's rate out of the user's cache."""
    if importlib.util.find_spec("pydantic") is None:
        yield
        return
    folder = tmp_path_factory.mktemp("tuning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("learned_optim.meta_train.trainer.baselines.default_folder", lambda: folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def _language_is_patched_once_a_launch() -> None:
    """Spare Triton's interpreter two thirds of its time.

    A launch exchanges all functions of ``triton.language`` for the interpreter's. Each call of a device function looks
    through them again, though nothing is left to exchange; here it does not.
    """
    if importlib.util.find_spec("triton") is not None:
        from triton.runtime.interpreter import InterpretedFunction

        InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
