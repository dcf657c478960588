"""The figure at the README's top shows the committed rows."""

import numpy as np
from PIL import Image

from benchmarks.results import RESULTS, read_suite
from benchmarks.suites.readme_figure import PANELS, PATH, ROWS, SHOWN, coarser, digest, figure

CURVES = read_suite(RESULTS / "generalization").curves


def test_the_committed_picture_is_of_the_committed_rows() -> None:
    with Image.open(PATH) as picture:
        assert picture.info[ROWS] == digest(CURVES), "run python -m benchmarks.suites.figures readme"
        assert 900 <= picture.width <= 1_800  # sharp where it is shown 900 pixels wide


def test_changed_row_is_found() -> None:
    other = {problem: {name: points.copy() for name, points in own.items()} for problem, own in CURVES.items()}
    before = digest(other)
    other[next(iter(PANELS))]["default"][-1, 1] *= 1.001
    assert digest(other) != before


def test_panels_have_every_contender_with_its_band() -> None:
    panels = figure(CURVES).axes
    assert [panel.get_title() for panel in panels] == list(PANELS.values())
    for panel, problem in zip(panels, PANELS, strict=True):
        lines = {line.get_label(): line.get_xydata() for line in panel.get_lines()}
        assert set(lines) == set(SHOWN.values())
        assert len(panel.collections) == len(SHOWN)
        for optimizer, name in SHOWN.items():
            np.testing.assert_array_equal(lines[name], coarser(CURVES[problem][optimizer])[:, :2])


def test_points_that_are_drawn_are_means_of_those_of_the_rows() -> None:
    curve = np.arange(9.0)[:, None] * [5.0, 1.0, 2.0, 3.0]
    np.testing.assert_array_equal(coarser(curve, 4)[:, 0], [0, 20, 40])
    np.testing.assert_array_equal(coarser(curve, 4)[:, 1], [0, 2.5, 6.5])
