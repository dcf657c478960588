"""The smallest configuration of meta-training, written to a file, and the error with which a changed one is refused."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from learned_optim.meta_train.common.strict import ConfigError
from learned_optim.meta_train.config.load import load_config

SMALLEST = 'steps = 3\n\n[[tasks]]\nfamily = "quadratic"\n'


def write(folder: Path, text: str) -> Path:
    """Write ``folder/mine.toml`` and return its path."""
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(text: str, folder: Path, overrides: Sequence[str] = ()) -> str:
    """The message with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message
