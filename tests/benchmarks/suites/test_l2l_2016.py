"""The figure of the 2016 paper's experiments shows the committed rows, under the names of the rules."""

import numpy as np
import pytest
from matplotlib.axes import Axes

from benchmarks.results import read_suite
from benchmarks.suites.l2l_2016 import EXPERIMENTS, FITTED, RESULTS, figure
from learned_optim import available_rules
from learned_optim.meta_train.benchmark.suites import load_suite
from learned_optim.meta_train.config.load import load_config
from learned_optim.meta_train.config.settings import RuleConfig


def drawn(panel: Axes, label: str) -> np.ndarray:
    """Losses of the one line with this label."""
    (line,) = (line for line in panel.get_lines() if line.get_label() == label)
    return np.asarray(line.get_ydata())


def test_figure_panels_follow_the_paper_and_show_the_rows() -> None:
    curves = read_suite(RESULTS).curves
    panels = [panel for panel in figure(curves).axes if panel.get_visible()]
    shown = [problem for problem in EXPERIMENTS if problem in curves]
    assert [panel.get_title() for panel in panels] == [EXPERIMENTS[problem].title for problem in shown]
    for panel, problem in zip(panels, shown, strict=True):
        experiment = EXPERIMENTS[problem]
        assert panel.get_xlim()[0] == experiment.first_step
        steps, losses, *_ = curves[problem][experiment.rule].T
        expected = losses[steps >= experiment.first_step]
        np.testing.assert_array_equal(drawn(panel, "lstm-l2l (the paper's architecture)"), expected)


def test_figure_tells_the_three_rules_apart() -> None:
    steps = np.arange(3.0)
    curves = {
        name: np.stack([steps, *[np.full(3, loss)] * 3], axis=1)
        for name, loss in (("Adam", 1.0), ("lstm-l2l-mnist", 2.0), ("specialised-mnist", 3.0), ("default", 4.0))
    }
    picture = figure({"mnist": curves})
    panel = picture.axes[0]
    for label, loss in (
        ("Adam", 1.0),
        ("lstm-l2l (the paper's architecture)", 2.0),
        ("specialised (the default's architecture)", 3.0),
        ("default rule", 4.0),
    ):
        np.testing.assert_array_equal(drawn(panel, label), [loss] * 3)
    colours = [line.get_color() for line in panel.get_lines()]
    assert len(set(colours)) == len(colours)
    assert "lstm-l2l-mnist, specialised-mnist" in [text.get_text() for text in panel.texts]
    (legend,) = picture.legends
    assert [text.get_text() for text in legend.get_texts()] == [line.get_label() for line in panel.get_lines()]


def test_suite_compares_the_rules_of_the_tables_as_far_as_they_are_shipped() -> None:
    problems = {problem.name: problem for problem in load_suite("l2l-2016").problems}
    assert list(problems) == list(EXPERIMENTS)
    for name, experiment in EXPERIMENTS.items():
        assert set(problems[name].rules) == set(experiment.learned) & set(available_rules())


@pytest.mark.parametrize(
    ("name", "paper_rule"),
    [
        ("specialised-quadratic", "lstm-l2l-quadratic"),
        ("specialised-mnist", "lstm-l2l-mnist"),
        ("specialised-cifar", "lstm-l2l-cifar"),
        ("specialised-neural-art", "lstm-l2l-neural-art"),
    ],
)
def test_specialised_rules_are_meta_trained_from_the_default_on_the_family_of_the_papers_rule(
    name: str, paper_rule: str
) -> None:
    own, paper = load_config(name), load_config(paper_rule, resuming=True)
    assert {task.family for task in own.tasks} == {task.family for task in paper.tasks}
    assert (own.rule, own.estimator.name) == (RuleConfig(start_from="default"), "es-single")
    assert own.validation.horizon == paper.validation.horizon


def test_specialised_rule_for_mnist_sees_the_networks_from_both_starts_at_both_lengths() -> None:
    config = load_config("specialised-mnist")
    problems = {problem.name: problem for problem in load_suite("l2l-2016").problems}
    assert [task.options for task in config.tasks] == [problems[name].options for name in ("mnist", f"mnist{FITTED}")]
    assert config.unroll.horizon == (problems["mnist"].steps, problems["mnist-200"].steps)
