"""Figures of what a rule does."""

from pathlib import Path

import numpy as np
import pytest

from learned_optim.meta_train.rule_plots import PANELS, binned, plot_rule
from learned_optim.rules import LSTML2L


def test_bins_are_single_steps_at_first_and_cover_every_step() -> None:
    steps, quartiles = binned(np.arange(1.0, 1001.0))
    assert steps[:5].tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(quartiles[1], steps)  # the median of numbers in a row is their middle
    assert np.all(np.diff(steps) > 0)
    assert steps[-1] == pytest.approx(1000, rel=0.1)
    widths = np.diff(steps[-10:])
    assert np.all(np.diff(widths) > 0)  # on a logarithmic axis as wide as each other


def test_bins_gather_samples() -> None:
    _, (low, median, high) = binned(np.tile([0.0, 1.0, 2.0, 3.0, 4.0], (10, 1)))
    assert (low[0], median[0], high[0]) == (1, 2, 3)


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_vector_formats_are_written(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rule.{suffix}"
    plot_rule(LSTML2L(2), path, steps=10)
    assert path.read_bytes().lstrip().startswith({"svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    if suffix == "svg":
        assert all(panel.title in path.read_text() for panel in PANELS)


def test_other_formats_are_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learned_optim.meta_train.rule_plots.portrait", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=r"must end in \.png, \.svg, \.pdf"):
        plot_rule("default", tmp_path / "rule.gif")
    assert list(tmp_path.iterdir()) == []
