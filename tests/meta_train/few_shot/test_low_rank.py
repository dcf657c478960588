"""Low-rank adaptation of perceptrons: the same meta-gradients as by adapted weights, and where it is not used."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from helpers.small_few_shot import SMALL_SINUSOID, Clouds, generator, learner_and_episodes
from learned_optim.meta_train.few_shot.algorithms import FOMAML, MAML, MetaLSTM, MetaSGD
from learned_optim.meta_train.few_shot.episodes import FewShotTask
from learned_optim.meta_train.few_shot.inner import SGD, Adam
from learned_optim.meta_train.few_shot.learner import Learner
from learned_optim.meta_train.few_shot.low_rank import applies, is_cheaper, is_perceptron
from learned_optim.meta_train.few_shot.sinusoid import Sinusoid

pytestmark = pytest.mark.usefixtures("one_thread", "double")


@pytest.mark.parametrize("second_order", [True, False], ids=["maml", "fomaml"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("task", [SMALL_SINUSOID, Clouds()], ids=["waves", "norm"])
def test_low_rank_adaptation_has_the_same_meta_gradient(task: FewShotTask, steps: int, second_order: bool) -> None:
    learner, episodes = learner_and_episodes(task)
    algorithm = (MAML if second_order else FOMAML)(learner.fresh_parameters, SGD(0.3), steps)
    results = []
    for low_rank in (True, False):
        algorithm.low_rank = low_rank
        results.append(algorithm.meta_gradient(learner, episodes, generator()))
    for value, expected in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(value, expected)


def test_low_rank_is_for_perceptrons_and_few_examples() -> None:
    learner = Learner(Clouds(batch_norm=False), 0)
    assert applies(learner, torch.zeros(2, 3, 4))
    assert is_cheaper(learner, 2)
    assert not is_cheaper(learner, 1000)
    assert not is_perceptron(nn.Sequential(nn.Conv2d(1, 1, 3)))
    assert not is_perceptron(nn.Sequential(nn.Linear(2, 2, bias=False)))
    assert not is_perceptron(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))


class Doubled(nn.Linear):
    """A linear layer only by name."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def twice(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4), layer)


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def tied(first: nn.Linear, second: nn.Linear) -> nn.Sequential:
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


EMBEDDINGS: dict[str, Callable[[], nn.Sequential]] = {
    "activation used twice": lambda: twice(nn.Tanh()),
    "layer used twice": lambda: twice(nn.Linear(4, 4)),
    "activation in place": lambda: twice(nn.ELU(inplace=True)),
    "sub-class of a known layer": lambda: nn.Sequential(Doubled(4, 4), nn.Tanh()),
    "frozen layer": lambda: nn.Sequential(frozen(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 4)),
    "reparametrised layer": lambda: nn.Sequential(register_parametrization(nn.Linear(4, 4), "weight", nn.Tanh())),
    "tied layers": lambda: tied(nn.Linear(4, 4), nn.Linear(4, 4)),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("kind", [MAML, FOMAML])
def test_low_rank_falls_back_for_other_networks(name: str, kind: type[MAML]) -> None:
    class Embedded(Clouds):
        @property
        def features(self) -> int:
            return 4

        def embedding(self) -> nn.Sequential:
            return EMBEDDINGS[name]()

    learner, episodes = learner_and_episodes(Embedded())
    algorithm = kind(learner.fresh_parameters, SGD(0.1), 2)
    results = []
    for low_rank in (True, False):
        algorithm.low_rank = low_rank
        results.append(algorithm.meta_gradient(learner, episodes, generator()))
    for value, expected in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(value, expected)


def test_low_rank_falls_back_for_other_inner_optimizers() -> None:
    """Whether requested or not; with few rows and wide layers low rank would be cheaper."""
    learner, episodes = learner_and_episodes(Sinusoid(shots=1, queries=4, hidden=(20, 20)))
    initial = learner.fresh_parameters
    for build in (MetaLSTM, lambda start: MetaSGD(start, 0.1, 2), lambda start: MAML(start, Adam(0.05), 2)):
        algorithm = build(initial)
        expected = algorithm.adapt(learner, episodes.support, algorithm.steps, generator())
        *_, last = (adapted.predict(episodes.query[0]) for adapted in expected)
        if isinstance(algorithm, MAML):
            algorithm.low_rank = True
        result = algorithm.meta_gradient(learner, episodes, generator())
        torch.testing.assert_close(result.meta_loss, learner.few_shot.losses(last, episodes.query[1]).mean())
        assert len(result.grads) == len(algorithm.learned())
