"""Meta-gradients of the few-shot algorithms: against finite differences, closed forms, loops and each other."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from helpers.small_few_shot import MATRIX, SMALL_SINUSOID, Clouds, Quadratic, generator, learner_and_episodes, one
from learned_optim import LearnedOptimizer
from learned_optim.checkpoint import load_rule
from learned_optim.meta_train.few_shot.algorithms import (
    FOMAML,
    MAML,
    Algorithm,
    Leap,
    Matching,
    MetaLSTM,
    MetaSGD,
    NearestNeighbour,
    Pretraining,
    Prototypical,
    Reptile,
    Scratch,
)
from learned_optim.meta_train.few_shot.algorithms.gradient import AdaptedParameters, GradientAlgorithm, minibatches
from learned_optim.meta_train.few_shot.episodes import Episodes, FewShotTask
from learned_optim.meta_train.few_shot.inner import SGD, Adam
from learned_optim.meta_train.few_shot.learner import Learner
from learned_optim.rules import UpdateRule

pytestmark = pytest.mark.usefixtures("one_thread", "double")


def default_rule() -> UpdateRule:
    rule = load_rule("default").double()
    with torch.no_grad():  # with outputs of zero nothing would depend on the LSTM
        rule.output_weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))  # type: ignore[operator]
    return rule.requires_grad_(True)


ALGORITHMS: dict[str, Callable[[Tensor], Algorithm]] = {
    "maml": lambda initial: MAML(initial, SGD(0.1), 2),
    "maml, minibatches": lambda initial: MAML(initial, SGD(0.1), 3, batch_size=4),
    "maml, adam": lambda initial: MAML(initial, Adam(0.05), 2),
    "maml, rule": lambda initial: MAML(initial, default_rule(), 3),
    "fomaml": lambda initial: FOMAML(initial, SGD(0.1), 2),
    "meta-sgd": lambda initial: MetaSGD(initial, 0.1, 2),
    "reptile": lambda initial: Reptile(initial, SGD(0.1), 3),
    "reptile, adam": lambda initial: Reptile(initial, Adam(0.05, (0.0, 0.999)), 3),
    "reptile, combination": lambda initial: Reptile(initial, SGD(0.1), 3, combination=(0.0, 1.0, 0.5)),
    "leap": lambda initial: Leap(initial, SGD(0.1), 3),
    "meta-lstm": lambda initial: MetaLSTM(initial, 3, hidden_size=4),
    "pre-training": lambda initial: Pretraining(initial, SGD(0.1)),
}


def meta_loss(algorithm: Algorithm, learner: Learner, episodes: Episodes) -> float:
    return float(algorithm.meta_gradient(learner, episodes, generator()).meta_loss)


def assert_derivative(algorithm: Algorithm, learner: Learner, episodes: Episodes) -> None:
    """The meta-gradient's product with random directions in all that is learned is the slope of the meta-loss there."""
    step = 1e-5  # of float64: truncation and rounding both below 1e-8 at losses and curvatures around 1
    grads = algorithm.meta_gradient(learner, episodes, generator()).grads
    learned = algorithm.learned()
    random = generator()
    for part in range(len(learned)):
        for _ in range(2):
            direction = torch.randn(learned[part].shape, generator=random)
            sides = []
            for side in (step, -2 * step):
                with torch.no_grad():
                    learned[part].add_(side * direction)
                sides.append(meta_loss(algorithm, learner, episodes))
            with torch.no_grad():
                learned[part].add_(step * direction)
            slope = (sides[0] - sides[1]) / (2 * step)
            assert abs(slope) > 1e-6  # else nothing would have been compared
            assert float((grads[part] * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("task", [SMALL_SINUSOID, Clouds(), Clouds(batch_norm=False)], ids=["waves", "norm", "no norm"])
@pytest.mark.parametrize("name", ["maml", "maml, minibatches", "maml, adam", "meta-sgd", "maml, rule"])
def test_meta_gradient_is_the_derivative_of_the_meta_loss(name: str, task: FewShotTask) -> None:
    learner, episodes = learner_and_episodes(task, 2)
    algorithm = ALGORITHMS[name](learner.fresh_parameters)
    assert_derivative(algorithm, learner, episodes)


class TestQuadratic:
    """Gradient descent with the rate r contracts ``w - c`` by ``I - r A`` in every step."""

    rate, steps = 0.2, 3

    @pytest.fixture
    def problem(self) -> tuple[Learner, Episodes, Tensor, Tensor, Tensor]:
        learner, episodes = learner_and_episodes(Quadratic())
        start = learner.fresh_parameters
        contraction = torch.eye(3) - self.rate * MATRIX.double()
        centre, query = episodes.support[0][:, 0], episodes.query[0][:, 0]
        adapted = centre + (start - centre) @ torch.linalg.matrix_power(contraction, self.steps)
        return learner, episodes, contraction, adapted, (adapted - query) @ MATRIX.double()

    def test_fomaml_is_the_gradient_at_the_adapted_weights(
        self, problem: tuple[Learner, Episodes, Tensor, Tensor, Tensor]
    ) -> None:
        learner, episodes, _, _, final_grads = problem
        algorithm = FOMAML(learner.fresh_parameters, SGD(self.rate), self.steps)
        (grad,) = algorithm.meta_gradient(learner, episodes, generator()).grads
        torch.testing.assert_close(grad, final_grads.mean(0))

    def test_maml_is_the_final_gradient_times_the_contraction(
        self, problem: tuple[Learner, Episodes, Tensor, Tensor, Tensor]
    ) -> None:
        learner, episodes, contraction, _, final_grads = problem
        algorithm = MAML(learner.fresh_parameters, SGD(self.rate), self.steps)
        (grad,) = algorithm.meta_gradient(learner, episodes, generator()).grads
        expected = (final_grads @ torch.linalg.matrix_power(contraction, self.steps)).mean(0)
        torch.testing.assert_close(grad, expected)

    def test_reptile_is_start_minus_adapted_weights(
        self, problem: tuple[Learner, Episodes, Tensor, Tensor, Tensor]
    ) -> None:
        learner, episodes, _, adapted, _ = problem
        start = learner.fresh_parameters
        (grad,) = Reptile(start, SGD(self.rate), self.steps).meta_gradient(learner, episodes, generator()).grads
        torch.testing.assert_close(grad, (start - adapted).mean(0))
        summed = Reptile(start, SGD(self.rate), self.steps, combination=[self.rate] * self.steps)
        torch.testing.assert_close(summed.meta_gradient(learner, episodes, generator()).grads[0], grad)

    def test_leap_follows_its_formula(self, problem: tuple[Learner, Episodes, Tensor, Tensor, Tensor]) -> None:
        learner, episodes, _, _, _ = problem
        matrix, expected = MATRIX.double(), torch.zeros(3)
        for centre in episodes.support[0][:, 0]:
            point = learner.fresh_parameters
            for _ in range(self.steps):
                grad = matrix @ (point - centre)
                following = point - self.rate * grad
                loss, next_loss = (0.5 * (w - centre) @ matrix @ (w - centre) for w in (point, following))
                moved, fallen = following - point, next_loss - loss  # gradient descent only falls here
                expected -= (moved + fallen * grad) / (moved @ moved + fallen**2).sqrt() / len(episodes.support[0])
                point = following
        (grad,) = (
            Leap(learner.fresh_parameters, SGD(self.rate), self.steps)
            .meta_gradient(learner, episodes, generator())
            .grads
        )
        torch.testing.assert_close(grad, expected)

    def test_meta_lstm_with_constant_gates_is_gradient_descent(
        self, problem: tuple[Learner, Episodes, Tensor, Tensor, Tensor]
    ) -> None:
        learner, episodes, _, _, final_grads = problem
        algorithm = MetaLSTM(learner.fresh_parameters, self.steps)
        with torch.no_grad():
            for gate, bias in (
                (algorithm.forget_gate, 50.0),
                (algorithm.input_gate, torch.logit(torch.tensor(self.rate))),
            ):
                gate.weight.zero_()
                gate.bias.fill_(bias)
        gradient = algorithm.meta_gradient(learner, episodes, generator())
        by_name = dict(zip([name for name, _ in algorithm.named_parameters()], gradient.grads, strict=True))
        torch.testing.assert_close(by_name["initial"], final_grads.mean(0))
        assert float(by_name["input_gate.weight"].abs().max()) > 0


def test_leap_counts_a_rise_of_the_loss_as_a_fall() -> None:
    learner, episodes = learner_and_episodes(Quadratic())
    start, rate = learner.fresh_parameters, 2.0  # beyond 2 / 2.13: gradient descent climbs
    centre, matrix = episodes.support[0][0, 0], MATRIX.double()
    grad = matrix @ (start - centre)
    moved = -rate * grad
    rise = 0.5 * (start + moved - centre) @ matrix @ (start + moved - centre) - 0.5 * (start - centre) @ grad
    assert rise > 0
    expected = -(moved - rise * grad) / (moved @ moved + rise**2).sqrt()
    result = Leap(start, SGD(rate), 1).meta_gradient(learner, one(episodes, 0), generator())
    torch.testing.assert_close(result.grads[0], expected)


def test_meta_sgd_with_equal_rates_is_maml() -> None:
    learner, episodes = learner_and_episodes(Clouds())
    start = learner.fresh_parameters
    grads = MetaSGD(start, 0.1, 2).meta_gradient(learner, episodes, generator()).grads
    (expected,) = MAML(start, SGD(0.1), 2).meta_gradient(learner, episodes, generator()).grads
    torch.testing.assert_close(grads[0], expected)
    assert float(grads[1].abs().max()) > 0


# Minibatches are drawn for all episodes together: alone, an episode gets others.
@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - {"maml, minibatches"}))
def test_batched_episodes_match_single_episodes(name: str) -> None:
    learner, episodes = learner_and_episodes(Clouds() if name != "pre-training" else SMALL_SINUSOID, 3)
    algorithm = ALGORITHMS[name](learner.fresh_parameters)
    together = algorithm.meta_gradient(learner, episodes, generator())
    alone = [algorithm.meta_gradient(learner, one(episodes, index), generator()) for index in range(3)]
    for index, grad in enumerate(together.grads):
        torch.testing.assert_close(grad, torch.stack([each.grads[index] for each in alone]).mean(0))
    torch.testing.assert_close(together.meta_loss, torch.stack([each.meta_loss for each in alone]).mean())
    torch.testing.assert_close(together.initial_loss, torch.stack([each.initial_loss for each in alone]).mean())


def test_inner_adam_matches_torch() -> None:
    learner, episodes = learner_and_episodes(Clouds(batch_norm=False), 1)
    algorithm = FOMAML(learner.fresh_parameters, Adam(0.05, (0.9, 0.99)))
    *_, adapted = algorithm.adapt(learner, episodes.support, 4, generator())
    assert isinstance(adapted, AdaptedParameters)
    module = learner.module_with(learner.fresh_parameters)
    optimizer = torch.optim.Adam(module.parameters(), 0.05, (0.9, 0.99), eps=0.0)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(episodes.support[0][0]), episodes.support[1][0]).backward()
        optimizer.step()
    expected = torch.cat([parameter.flatten() for parameter in module.parameters()])
    torch.testing.assert_close(adapted.parameters[0], expected, rtol=1e-6, atol=1e-9)


def test_adaptation_lowers_the_loss_and_keeps_the_learned_state() -> None:
    learner, episodes = learner_and_episodes(Clouds(), 20)
    for name, build in ALGORITHMS.items():
        algorithm = build(learner.fresh_parameters)
        before = copy.deepcopy(algorithm.state_dict())
        adapted = list(algorithm.adapt(learner, episodes.support, 5, generator()))
        assert len(adapted) == 6
        losses = [
            learner.few_shot.losses(each.predict(episodes.query[0]), episodes.query[1]).mean() for each in adapted
        ]
        if name != "meta-lstm":  # its gates are random yet
            assert losses[-1] < losses[0], name
        assert all(torch.equal(value, before[key]) for key, value in algorithm.state_dict().items())


def test_scratch_draws_fresh_weights_for_every_task_and_learns_nothing() -> None:
    learner, episodes = learner_and_episodes(Clouds(), 3)
    algorithm = Scratch(learner.fresh_parameters, SGD(0.1), seed=7)
    first, *_ = algorithm.adapt(learner, episodes.support, 1, generator())
    assert isinstance(first, AdaptedParameters)
    assert len(first.parameters.unique(dim=0)) == 3
    assert algorithm.learned() == []
    with pytest.raises(ValueError, match="learns nothing"):
        algorithm.meta_gradient(learner, episodes, generator())


def test_minibatches_hold_every_example_once_an_epoch() -> None:
    inputs = torch.arange(12.0).reshape(2, 6, 1)
    batches = minibatches((inputs, inputs), 2, generator())
    for _ in range(2):
        seen = torch.cat([next(batches)[0] for _ in range(3)], 1)
        assert torch.equal(seen.sort(1).values, inputs)
    odd = minibatches((inputs, inputs), 4, generator())
    assert next(odd)[0].shape == next(odd)[0].shape == (2, 4, 1)


def test_pretraining_learns_all_classes() -> None:
    learner, episodes = learner_and_episodes(Clouds(batch_norm=False))
    algorithm = Pretraining(learner.fresh_parameters, SGD(0.1), features=5, classes=6)
    optimizer = torch.optim.Adam(algorithm.learned(), 0.03)
    losses = []
    for _ in range(60):
        result = algorithm.meta_gradient(learner, episodes, generator())
        losses.append(float(result.meta_loss))
        for parameter, grad in zip(algorithm.learned(), result.grads, strict=True):
            parameter.grad = grad
        optimizer.step()
    assert losses[0] == pytest.approx(torch.log(torch.tensor(6.0)).item())  # the head starts at zero
    assert losses[-1] < 0.5 * losses[0]


class TestComparisons:
    @pytest.fixture
    def problem(self) -> tuple[Learner, Episodes]:
        return learner_and_episodes(Clouds(batch_norm=False), 3)

    def test_prototypical_logits_match_their_formula(self, problem: tuple[Learner, Episodes]) -> None:
        learner, episodes = problem
        algorithm = Prototypical(learner.fresh_parameters)
        embed = learner.module_with(learner.fresh_parameters)[:-1]  # type: ignore[index]
        support, query = (embed(examples[0][1]) for examples in (episodes.support, episodes.query))
        means = torch.stack([support[episodes.support[1][1] == label].mean(0) for label in range(3)])
        expected = -(query[:, None] - means).square().sum(-1)
        (adapted,) = algorithm.adapt(learner, episodes.support, 3, generator())
        torch.testing.assert_close(adapted.predict(episodes.query[0])[1], expected)

    def test_matching_probabilities_match_their_formula(self, problem: tuple[Learner, Episodes]) -> None:
        learner, episodes = problem
        embed = learner.module_with(learner.fresh_parameters)[:-1]  # type: ignore[index]
        support, query = (embed(examples[0][0]) for examples in (episodes.support, episodes.query))
        attention = torch.cosine_similarity(query[:, None], support[None], dim=-1).softmax(1)
        labels = episodes.support[1][0]
        expected = torch.stack([attention[:, labels == label].sum(1) for label in range(3)], 1)
        (adapted,) = Matching(learner.fresh_parameters).adapt(learner, episodes.support, 0, generator())
        torch.testing.assert_close(adapted.predict(episodes.query[0])[0].exp(), expected)

    @pytest.mark.parametrize("pixels", [True, False])
    def test_nearest_neighbour_predicts_the_label_of_the_nearest(
        self, pixels: bool, problem: tuple[Learner, Episodes]
    ) -> None:
        learner, episodes = problem
        embed = nn.Identity() if pixels else learner.module_with(learner.fresh_parameters)[:-1]  # type: ignore[index]
        support, query = (embed(examples[0][2]) for examples in (episodes.support, episodes.query))
        nearest = (query[:, None] - support[None]).norm(dim=-1).argmin(1)
        algorithm = NearestNeighbour(learner.fresh_parameters, pixels=pixels)
        (adapted,) = algorithm.adapt(learner, episodes.support, 0, generator())
        assert torch.equal(adapted.predict(episodes.query[0])[2].argmax(-1), episodes.support[1][2][nearest])

    @pytest.mark.parametrize("kind", [Prototypical, Matching])
    def test_meta_gradient_is_the_derivative_of_the_query_loss(self, kind: type[Algorithm]) -> None:
        learner, episodes = learner_and_episodes(Clouds(), 2)
        algorithm = kind(learner.fresh_parameters)
        assert_derivative(algorithm, learner, episodes)

    def test_regression_is_refused(self) -> None:
        learner, episodes = learner_and_episodes(SMALL_SINUSOID)
        with pytest.raises(ValueError, match="Prototypical classifies; Sinusoid is a regression"):
            list(Prototypical(learner.fresh_parameters).adapt(learner, episodes.support, 1, generator()))


@pytest.mark.parametrize("kind", ["gradient", "comparison"])
def test_non_transductive_prediction_is_independent_of_other_queries(kind: str) -> None:
    learner, episodes = learner_and_episodes(Clouds(), 3)
    start = learner.fresh_parameters
    algorithm: Algorithm = FOMAML(start, SGD(0.3)) if kind == "gradient" else Prototypical(start)
    *_, adapted = algorithm.adapt(learner, episodes.support, 1, generator())
    inputs = episodes.query[0]
    others = torch.cat([inputs[:, :1], 9 * inputs[:, 1:]], 1)
    for transductive in (True, False):
        same = torch.allclose(
            adapted.predict(inputs, transductive=transductive)[:, 0],
            adapted.predict(others, transductive=transductive)[:, 0],
        )
        assert same != transductive


def test_non_transductive_prediction_equals_one_batch_with_the_support() -> None:
    learner, episodes = learner_and_episodes(Clouds(), 2)
    algorithm = FOMAML(learner.fresh_parameters, SGD(0.3))
    *_, adapted = algorithm.adapt(learner, episodes.support, 1, generator())
    assert isinstance(adapted, AdaptedParameters)
    module = learner.module_with(adapted.parameters[1])
    batch = torch.cat([episodes.support[0][1], episodes.query[0][1, 4:5]])
    predictions = adapted.predict(episodes.query[0], transductive=False)
    torch.testing.assert_close(predictions[1, 4], module(batch)[-1])


def test_learner_with_running_statistics_is_refused() -> None:
    class Running(Clouds):
        def embedding(self) -> nn.Sequential:
            return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))

    with pytest.raises(ValueError, match="track_running_stats=False"):
        Learner(Running(), 0)


def test_combination_needs_a_factor_for_each_step() -> None:
    with pytest.raises(ValueError, match="a factor for each of 3 inner steps"):
        Reptile(torch.zeros(2), SGD(0.1), 3, combination=[1.0])
    assert isinstance(Reptile(torch.zeros(2), SGD(0.1), 1, combination=[1.0]), GradientAlgorithm)


def test_inner_rule_matches_the_optimizer() -> None:
    learner, episodes = learner_and_episodes(Clouds(batch_norm=False), 1)
    learner.initial_parameters *= 0.01  # small weights take small steps
    rule, generator = default_rule().requires_grad_(False), torch.Generator().manual_seed(0)
    scales = learner.scales(rule)
    assert scales is not None
    assert float(scales.min()) < 0.5
    algorithm = MAML(learner.fresh_parameters, rule, 3)
    *_, adapted = algorithm.adapt(learner, episodes.support, 3, generator)

    module = learner.module_with(learner.fresh_parameters)
    optimizer = LearnedOptimizer(module.parameters(), rule)
    inputs, labels = (part[0] for part in episodes.support)
    for _ in range(3):
        optimizer.zero_grad()
        learner.few_shot.losses(module(inputs)[None], labels[None]).sum().backward()
        optimizer.step()
    # the optimizer keeps scales in float32
    torch.testing.assert_close(adapted.predict(inputs[None])[0], module(inputs), rtol=1e-6, atol=1e-9)
