"""A contender has one colour in all figures."""

import pytest

from benchmarks import colours
from benchmarks.estimators.equal_time import NAMES
from benchmarks.few_shot.trainings import SINUSOID
from helpers.benchmarks import result
from learned_optim.meta_train.benchmark.evaluation import BASELINES, DECAYED
from learned_optim.meta_train.benchmark.rivals import RIVALS
from learned_optim.meta_train.reports.plots import COLOURS, OTHER_COLOUR, comparison_figure


@pytest.mark.parametrize("order", [("default", "mine"), ("mine", "default"), ("other", "mine", "default")])
def test_the_default_rule_has_its_colour_beside_whatever_it_stands(order: tuple[str, ...]) -> None:
    figure = comparison_figure({"p": [result("Adam", rate=0.1), *map(result, order)]})
    drawn = {line.get_label(): line.get_color() for line in figure.axes[0].get_lines()}
    assert drawn["default"] == COLOURS["default"] == colours.colour("default")
    assert drawn["Adam"] == colours.colour("Adam")
    assert len(set(drawn.values())) == len(drawn)


def test_every_baseline_and_kind_of_rule_has_one_of_its_own() -> None:
    names = [*BASELINES, "default", "lstm-l2l-mnist", "specialised-mnist"]
    assert len({colours.colour(name) for name in names}) == len(names)
    for kind in ("lstm-l2l", "specialised"):
        assert colours.colour(f"{kind}-mnist") == colours.colour(f"{kind}-cifar")


def test_every_rival_as_it_comes_has_one_of_its_own() -> None:
    untuned = [f"{name}@{rate:g}" for name, rival in RIVALS.items() for rate in rival.untuned]
    names = [*BASELINES, *DECAYED, *untuned, "default", "mine"]
    assert len({colours.colour(name) for name in names}) == len(names)
    assert all(colours.colour(name) in {colours.colour(each) for each in untuned} for name in RIVALS)


def test_estimators_and_algorithms_have_one_each() -> None:
    assert len({colours.colour(name) for name in NAMES.values()} - {OTHER_COLOUR}) == len(NAMES)
    assert colours.colour("TBPTT, 10 steps") == colours.ESTIMATORS["TBPTT"]
    assert len({colours.colour(name) for name in SINUSOID}) == len(SINUSOID)
