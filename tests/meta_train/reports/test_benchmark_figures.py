"""Figures of benchmarks show every problem, and every optimizer once."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as matplotlib_image

from helpers.benchmarks import RESULTS, result, timed
from helpers.pictures import number_of_colours
from learned_optim.meta_train.reports.plots import (
    comparison_figure,
    plot_all,
    profile_figure,
    speeds_of,
    speedup_figure,
)


class TestFigures:
    @pytest.mark.parametrize("problems", [1, 2, 3, 4, 5])
    def test_every_panel_shows_a_problem(self, problems: int) -> None:
        names = [f"problem {number}" for number in range(problems)]
        figure = comparison_figure({name: [result("Adam", rate=0.1, problem=name)] for name in names})
        titles = [panel.get_title() for panel in figure.axes if panel.get_visible()]
        assert titles == [f"{name}, 20 steps" for name in names]

    def test_legend_names_every_optimizer_once_and_panels_their_rates(self) -> None:
        untuned = result("Adam@0.001", rate=0.001, tuning={})
        group = [result("Adam", rate=0.1), untuned, result("NAG", rate=0.03), result("mine")]
        figure = comparison_figure({"p": group, "q": group})
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["Adam", "Adam@0.001", "NAG", "mine"]
        for panel in figure.axes:
            assert panel.get_legend() is None
            assert [text.get_text() for text in panel.texts] == ["lr: Adam 0.1, NAG 0.03"]

    def test_profile_and_speedup_show_every_optimizer_once(self) -> None:
        labels = {line.get_label() for line in profile_figure(speeds_of(RESULTS)).axes[0].lines}
        assert labels == {"Adam", "SGD", "NAG", "mine"}
        figure = speedup_figure(speeds_of(RESULTS))
        shown = [line.get_label() for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]
        assert sorted(map(str, shown)) == ["NAG", "SGD", "mine"]
        assert [text.get_text() for text in figure.axes[0].texts] == ["tuned Adam"]  # the line of what is compared with
        assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["p, 20 steps", "q, 20 steps"]

    def test_held_out_figure_shows_the_problems_with_such_data_and_marks_the_lowest(self, tmp_path: Path) -> None:
        losses = np.array([[2.0], [0.5], [1.0]]).repeat(2, axis=1)
        rule = result("mine", held_out=np.concatenate([losses] * 7)[:21])
        groups = {"p": [result("Adam", rate=0.1, held_out=rule.held_out), rule], "q": RESULTS["q"]}
        assert "held_out.png" in {path.name for path in plot_all(groups, tmp_path)}
        (panel,) = comparison_figure({"p": groups["p"]}, "held out").axes
        assert panel.get_ylabel() == "held-out loss"
        dots = [line.get_xydata() for line in panel.lines if line.get_marker() == "o"]
        assert [np.asarray(dot).tolist() for dot in dots] == [[[1.0, 0.5]]] * 2

    def test_seconds_figure_stretches_steps_by_their_seconds(self) -> None:
        group = timed({"p": [result("Adam", rate=0.1), result("mine")]}, 0.5, of_rules=2.0)
        (panel,) = comparison_figure(group, "seconds").axes
        ends = {str(line.get_label()): np.asarray(line.get_xdata())[-1] for line in panel.lines}
        assert ends == {"Adam": 10.0, "mine": 40.0}
        assert panel.get_xlabel() == "seconds"

    def test_profile_falls_from_all_to_none(self) -> None:
        for line in profile_figure(speeds_of(RESULTS)).axes[0].lines:
            shares = np.asarray(line.get_ydata())
            assert bool((np.diff(shares) <= 0).all())
            assert (shares[0], shares[-1]) == (1.0, 0.0)

    @pytest.mark.slow
    def test_figures_are_drawn_where_everything_diverged(self, tmp_path: Path) -> None:
        groups = {"p": [result("Adam", rate=0.01), result("broken")]}
        for found in groups["p"]:
            found.losses[1:] = np.inf
        for path in plot_all(timed(groups, 0.1, 0.2), tmp_path):
            assert min(matplotlib_image.imread(path).shape[:2]) >= 150
            assert number_of_colours(path) > 50  # something is drawn
