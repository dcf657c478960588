"""Figures of a rule's responses to synthetic gradients."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from learned_optim.meta_train.reports.rule_plots import PANELS, binned, plot_rule
from learned_optim.rules import LSTML2L


def test_bins_are_single_steps_at_first_and_cover_every_step() -> None:
    steps, quartiles = binned(np.arange(1.0, 1001.0))
    assert steps[:5].tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(quartiles[1], steps)  # the median of numbers in a row is their middle
    assert np.all(np.diff(steps) > 0)
    assert steps[-1] == pytest.approx(1000, rel=0.1)
    widths = np.diff(steps[-10:])
    assert np.all(np.diff(widths) > 0)  # on a logarithmic axis as wide as each other


def test_bins_give_quartiles_of_samples() -> None:
    _, (low, median, high) = binned(np.tile([0.0, 1.0, 2.0, 3.0, 4.0], (10, 1)))
    assert (low[0], median[0], high[0]) == (1, 2, 3)


@pytest.mark.slow
def test_picture_names_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    plot_rule(LSTML2L(2), tmp_path / "rule.svg", steps=10, scale=7)
    text = (tmp_path / "rule.svg").read_text()
    assert [panel.title for panel in PANELS if f">{panel.title}<" not in text] == []
    assert ">lstm-l2l beside Adam at 0.001; gradients times 7<" in text


def test_unknown_format_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "learned_optim.meta_train.reports.rule_plots.portrait", lambda *_, **__: pytest.fail("work was done")
    )
    with pytest.raises(ValueError, match=r"must end in \.png, \.svg, \.pdf"):
        plot_rule("default", tmp_path / "rule.gif")
    assert list(tmp_path.iterdir()) == []
