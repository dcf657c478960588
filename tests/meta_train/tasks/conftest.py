"""Fixtures that skip tests where real data are missing."""

import os
from pathlib import Path

import pytest


def needs(dataset: str) -> None:
    """Skip the test unless LEARNED_OPTIM_DATA holds the data set."""
    folder = os.environ.get("LEARNED_OPTIM_DATA")
    if not folder or not (Path(folder) / dataset).is_dir():
        pytest.skip(f"needs real data: set LEARNED_OPTIM_DATA to a folder that holds {dataset}/")


@pytest.fixture
def mnist() -> None:
    needs("mnist")


@pytest.fixture
def cifar10() -> None:
    needs("cifar10")
