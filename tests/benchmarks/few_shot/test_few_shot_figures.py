"""Figures of few-shot learning show the committed rows."""

import numpy as np

from benchmarks.colours import colour
from benchmarks.few_shot.figures import FITS, SHOWN_WAVES, errors, fitted, points
from benchmarks.few_shot.run import RESULTS
from benchmarks.few_shot.trainings import SHOTS, SINUSOID
from benchmarks.results import read, read_parts


def test_a_wave_its_points_and_its_fits_are_drawn() -> None:
    rows = read(RESULTS / "waves.csv")
    panels = fitted(rows).axes
    assert [panel.get_title() for panel in panels] == list(SHOWN_WAVES)
    for panel, name in zip(panels, SHOWN_WAVES, strict=True):
        own = [row for row in rows if row["algorithm"] == name]
        kinds = ["truth", *FITS, "support"]
        assert len(panel.get_lines()) == len(kinds)
        for line, kind in zip(panel.get_lines(), kinds, strict=True):
            np.testing.assert_array_equal(line.get_xydata(), np.transpose(points(own, kind)))


def test_errors_have_a_panel_for_each_number_of_points_and_a_colour_for_each_algorithm() -> None:
    panels = errors(read(RESULTS / "sinusoid.csv")).axes
    assert len(panels) == len(SHOTS)
    for panel in panels:
        colours = {line.get_label(): line.get_color() for line in panel.get_lines()}
        assert colours == {name: colour(name) for name in SINUSOID if name in colours}
        assert len(colours) >= len(SINUSOID) - 1


def test_every_training_has_its_provenance() -> None:
    keys = {"sinusoid": ("algorithm", "shots"), "omniglot": ("algorithm", "ways", "shots")}
    for name, columns in keys.items():
        parts = read_parts(RESULTS / f"{name}.json")
        for row in read(RESULTS / f"{name}.csv"):
            details = parts[", ".join(row[column] for column in columns)]
            assert {"date", "commit", "processor", "config", "episodes"} <= set(details)
