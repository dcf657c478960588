"""The figure of the 2016 paper's experiments shows the committed rows."""

import numpy as np

from benchmarks.results import read_suite
from benchmarks.suites.l2l_2016 import EXPERIMENTS, RESULTS, figure


def test_figure_panels_follow_the_paper_and_show_the_rows() -> None:
    curves = read_suite(RESULTS).curves
    panels = [panel for panel in figure(curves).axes if panel.get_visible()]
    shown = [problem for problem in EXPERIMENTS if problem in curves]
    assert [panel.get_title() for panel in panels] == [EXPERIMENTS[problem].title for problem in shown]
    for panel, problem in zip(panels, shown, strict=True):
        experiment = EXPERIMENTS[problem]
        assert panel.get_xlim()[0] == experiment.first_step
        (line,) = (line for line in panel.get_lines() if line.get_label() == "LSTM")
        steps, losses, *_ = curves[problem][experiment.rule].T
        np.testing.assert_array_equal(line.get_ydata(), losses[steps >= experiment.first_step])
