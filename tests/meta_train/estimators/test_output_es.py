"""ES on outputs: the output gradient of a task, what is remembered of it, and what the LSTM makes of that."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.small_runs import QUADRATIC, assert_same_outcome, plain, run, weights
from learned_optim.meta_train.config.load import Config, ConfigError
from learned_optim.meta_train.estimators import OutputES, output_es
from learned_optim.meta_train.estimators.output_es import (
    ANCHORED,
    CHUNK,
    COORDINATES,
    LARGEST_SIGNAL,
    PHASES,
    Experience,
    experiences,
    observed,
    per_step_gradient,
    some_coordinates,
    with_outputs,
    without_outputs,
)
from learned_optim.meta_train.estimators.perturbation import as_particles
from learned_optim.meta_train.inner.distributed import World
from learned_optim.meta_train.inner.speedups import log_slowdowns
from learned_optim.meta_train.inner.unroll import start, unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import Task
from learned_optim.meta_train.tasks.quadratic import QuadraticTask
from learned_optim.meta_train.trainer.checkpoint import read_checkpoint, write_checkpoint
from learned_optim.meta_train.trainer.trainer import Trainer
from learned_optim.rules import ScheduleFreeLSTM
from learned_optim.rules.schedule_free_lstm import LSTM_INPUTS as SIGNALS
from learned_optim.rules.schedule_free_lstm import OUTPUTS

pytestmark = pytest.mark.usefixtures("one_thread")

OUTPUT_ES = {"name": "output-es", "meta_loss": "speedup", "pairs": 2}


def steered(seed: int = 0) -> ScheduleFreeLSTM:
    """A rule whose outputs are not zero."""
    rule = ScheduleFreeLSTM(hidden_size=4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        rule.output_weight.normal_(0, 0.3, generator=generator)
        rule.output_bias.normal_(0, 0.1, generator=generator)
    return rule


def quadratics(instances: int = 4, distance: float = 1.0, *, anchor: bool = False) -> VectorizedTask:
    return VectorizedTask(QuadraticTask(4, 30.0, 0.0, distance), instances, seed=0, anchor=anchor)


class Cliff(Task):
    """A slope that ends in a plain: there no gradient is left."""

    def module(self) -> nn.Module:
        return nn.Linear(2, 1)

    def batch(self, instances: int, generator: torch.Generator) -> Tensor:
        return torch.ones(instances, 1, 2)

    def loss(self, module: nn.Module, batch: Tensor) -> Tensor:
        height: Tensor = module(batch)
        return (height + 1.0).relu().mean()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def remembered(signal: float, output_gradient: Tensor, *, anchor: bool, steps: int = 40) -> Experience:
    """A task whose signals are all ``signal``."""
    signals = torch.full((steps, SIGNALS, COORDINATES), signal, dtype=torch.float16)
    return Experience(signals, output_gradient, torch.tensor(anchor))


class TestOutputGradient:
    @pytest.mark.parametrize(
        ("steps", "phases", "sigma", "pairs"),
        [(90, 1, 0.1, 300), pytest.param(600, 3, 0.05, 300, marks=pytest.mark.slow)],
    )
    def test_output_gradient_is_that_of_the_log_speedup(
        self, steps: int, phases: int, sigma: float, pairs: int
    ) -> None:
        rule, task = steered(), quadratics(distance=100.0)  # so far that the last phase is needed
        inner = start(rule, task, generator())
        found = OutputES(sigma=sigma, pairs=pairs).output_gradient(rule, task, inner, steps, 5, generator())
        assert found.shape == (len(PHASES), OUTPUTS)
        assert found[phases:].count_nonzero() == 0  # phases that these trainings do not reach
        bounds = [min(bound, steps) for bound in (*PHASES, steps)]
        exact = torch.zeros(phases, OUTPUTS)
        for phase, output in itertools.product(range(phases), range(OUTPUTS)):
            moved = torch.zeros(2, OUTPUTS)
            moved[:, output] = torch.tensor([sigma, -sigma])
            particles, losses = as_particles(inner, 1, 2), []
            for now, (begin, end) in enumerate(itertools.pairwise(bounds[: phases + 1])):
                given = with_outputs(rule, moved if now == phase else torch.zeros(2, OUTPUTS))
                with torch.no_grad():
                    window = unroll(given, task, particles, end - begin, generator())
                particles = window.state
                losses.append(window.losses)
            above, below = log_slowdowns(torch.cat(losses), particles.initial_loss, 2)
            exact[phase, output] = (below - above) / (2 * sigma)
        assert (found[:phases] - exact).norm() < 0.3 * exact.norm()
        assert (exact.abs().amax(1) > 0.1).all()

    def test_output_gradient_of_an_anchor_is_zero(self) -> None:
        rule, task = steered(), quadratics(anchor=True)
        estimator = OutputES(pairs=2)
        state = estimator.start(rule, task, start(rule, task, generator()), generator())
        learned: dict[str, Tensor] = {}
        estimator.window(rule, task, state, 30, generator(), learned)
        (experience,) = experiences(learned)
        assert experience.anchor
        assert experience.output_gradient.count_nonzero() == 0


class TestExperience:
    def test_signals_are_those_of_a_training_with_zero_outputs(self) -> None:
        rule, task, steps = steered(), quadratics(), 130
        inner = start(rule, task, generator())
        signals, losses, end = observed(rule, task, inner, steps, 5, generator(7))
        index = some_coordinates(task, generator(7))
        unsteered = without_outputs(rule)
        with torch.no_grad():
            whole = unroll(unsteered, task, inner, steps, generator(), record_grads=True)
        torch.testing.assert_close(losses, whole.losses)
        torch.testing.assert_close(end.parameters, whole.state.parameters)
        state = unsteered.init_state(tuple(inner.parameters.shape))
        for step, grad in enumerate((whole.grads or ())[:-1], 1):
            seen, _ = rule.observe(grad, state, torch.tensor(float(step)))
            expected = seen.flatten(1)[:, index].clamp(-10, 10)
            torch.testing.assert_close(signals[step - 1], expected, rtol=1e-3, atol=1e-4)
            _, state = unsteered(grad, state, torch.tensor(float(step)))

    def test_signals_of_a_long_training_are_cut_to_its_beginning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(output_es, "RECORDED", CHUNK)
        rule, task, steps = steered(), quadratics(), 2 * CHUNK + 7
        inner = start(rule, task, generator())
        signals, losses, end = observed(rule, task, inner, steps, 5, generator(7))
        assert (len(signals), len(losses), int(end.step)) == (CHUNK, steps, steps)

    @pytest.mark.slow
    def test_vanishing_gradients_give_finite_signals(self) -> None:
        # Recent gradients vanish beside those of the whole training: the log of the ratio falls without bound.
        rule, task = steered(), VectorizedTask(Cliff(), 2, seed=0)
        estimator = OutputES(pairs=1)
        state = estimator.start(rule, task, start(rule, task, generator()), generator())
        learned: dict[str, Tensor] = {}
        estimate = estimator.window(rule, task, state, 700, generator(), learned)
        (experience,) = experiences(learned)
        assert experience.signals.isfinite().all()
        assert experience.signals[-1].min() == -LARGEST_SIGNAL
        assert all(grad.isfinite().all() for grad in estimate.grads)

    def test_coordinates_are_drawn_evenly_from_tensors_and_instances(self) -> None:
        task = quadratics(instances=3)
        task.shapes = {"small": torch.Size([1]), "large": torch.Size([3])}
        draws = torch.cat([some_coordinates(task, generator(seed)) for seed in range(400)])
        counts = draws.bincount(minlength=12).view(3, 4) / len(draws)
        assert counts[:, 0].sum() == pytest.approx(0.5, abs=0.05)
        assert counts.sum(1).tolist() == pytest.approx([1 / 3] * 3, abs=0.05)

    def test_output_gradient_of_a_phase_is_divided_among_its_steps(self) -> None:
        gradient = 1 + torch.arange(3.0 * OUTPUTS).view(3, OUTPUTS)
        for steps, phases in ((40, 1), (100, 1), (300, 2), (900, 3)):
            credit = per_step_gradient(gradient, steps)
            assert credit.shape == (steps, OUTPUTS)
            torch.testing.assert_close(credit.sum(0), gradient[:phases].sum(0))
            torch.testing.assert_close(credit[: min(100, steps)].sum(0), gradient[0])


class TestReplay:
    def test_replay_of_constant_outputs_matches_its_formula(self) -> None:
        rule = ScheduleFreeLSTM(hidden_size=2)  # the output layer is zero, but for the bias
        bias = torch.linspace(-0.2, 0.3, OUTPUTS)
        with torch.no_grad():
            rule.output_bias.copy_(bias)
        estimator = OutputES(caution=5.0)
        gradient = torch.arange(3.0 * OUTPUTS).view(3, OUTPUTS)
        experience = [
            remembered(0.5, gradient, anchor=False, steps=300),  # two phases
            remembered(0.5, torch.zeros(3, OUTPUTS), anchor=True, steps=20),
        ]
        gain, size = (value.detach() for value in estimator.replay(rule, experience, generator()))
        assert float(gain) == pytest.approx(float(gradient[:2].sum(0) @ bias) / 2, rel=1e-5)
        assert float(size) == pytest.approx(float(bias @ bias) * (1 + ANCHORED) / 2, rel=1e-5)

    def test_replay_trains_the_lstm_to_distinguish_tasks(self) -> None:
        torch.manual_seed(0)
        rule = ScheduleFreeLSTM(hidden_size=4)
        estimator = OutputES(caution=2.0)
        gradient = torch.zeros(3, OUTPUTS)
        gradient[0, :2] = torch.tensor([0.5, -0.5])
        experience = [
            remembered(1.0, gradient, anchor=False),
            remembered(-1.0, torch.zeros(3, OUTPUTS), anchor=True),
        ]
        optimizer = torch.optim.Adam(rule.parameters(), lr=0.03)
        for step in range(150):
            gain, size = estimator.replay(rule, experience, generator(step))
            optimizer.zero_grad()
            (estimator.caution / 2 * size - gain).backward()
            optimizer.step()
        known, anchor = (rule.outputs(task.signals.float())[20:].mean((0, 2)).detach() for task in experience)
        torch.testing.assert_close(
            known, gradient[0] / estimator.caution, rtol=0, atol=0.06
        )  # where the gain is largest
        assert anchor.abs().max() < 0.05

    def test_window_returns_the_gradient_of_the_objective(self) -> None:
        rule, task = steered(), quadratics()
        estimator = OutputES(pairs=2, caution=3.0)
        state = estimator.start(rule, task, start(rule, task, generator()), generator())
        learned: dict[str, Tensor] = {}
        estimate = estimator.window(rule, task, state, 30, generator(), learned)
        experience = experiences(learned)
        assert estimate.losses.shape == (30, 4)
        assert estimate.state.step == 30
        gain, size = (
            value.detach() for value in estimator.replay(rule, experience, generator())
        )  # there is a single task
        assert float(estimate.meta_loss) == pytest.approx(float(1.5 * size - gain))
        assert float(estimate.report["outputs"]) == pytest.approx(float(size.sqrt()))
        moved = steered()
        with torch.no_grad():
            for parameter, grad in zip(moved.parameters(), estimate.grads, strict=True):
                parameter.sub_(1e-3 * grad / grad.norm().clamp(min=1e-12))
        new_gain, new_size = estimator.replay(moved, experience, generator())
        assert 1.5 * new_size - new_gain < estimate.meta_loss


def output_es_config(**changes: Any) -> Config:
    tables: dict[str, Any] = {
        "steps": 6,
        "rule": {"architecture": "schedule-free-lstm", "settings": {"hidden_size": 2}},
        "unroll": {"truncation": "whole", "horizon": [40, 60], "stagger": False},
        "tasks": [QUADRATIC, {**QUADRATIC, "gradient_noise": 1.0, "anchor": True}],
        "estimator": OUTPUT_ES,
    }
    return plain(**{**tables, **changes})


@pytest.mark.slow
def test_output_es_resume_is_bit_exact(tmp_path: Path) -> None:
    before = weights(Trainer(output_es_config()).module)
    whole = Trainer(output_es_config(), tmp_path / "whole")
    run(whole)
    assert not weights(whole.module).equal(before)
    for progress in Trainer(output_es_config(), tmp_path / "parts").run():
        if progress.meta_step == 3:
            break
    resumed = Trainer.resume(tmp_path / "parts")
    run(resumed)
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")
    anchors = [bool(experience.anchor) for experience in experiences(resumed.pool.learned)]
    assert len(anchors) == 6
    assert set(anchors) == {True, False}


def test_experience_of_an_earlier_version_is_read_under_its_former_name(tmp_path: Path) -> None:
    trainer = Trainer(output_es_config(), tmp_path)
    for progress in trainer.run():
        if progress.meta_step == 2:
            break
    checkpoint = read_checkpoint(tmp_path)
    tensors = {name.replace("output_gradient", "asked"): tensor for name, tensor in checkpoint.tensors.items()}
    assert tensors.keys() != checkpoint.tensors.keys()
    write_checkpoint(tmp_path, checkpoint._replace(tensors=tensors))
    learned = Trainer.resume(tmp_path).pool.learned
    assert learned.keys() == trainer.pool.learned.keys()
    assert all(tensor.equal(trainer.pool.learned[name]) for name, tensor in learned.items())


class TestRefused:
    def test_conflicting_options_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"output-es needs a rule that is steered by outputs.*scale-free-lstm"):
            output_es_config(rule={"architecture": "scale-free-lstm", "settings": {"hidden_size": 2}})
        with pytest.raises(ConfigError, match=r"estimator\.meta_loss: Input should be 'speedup', got 'log'"):
            output_es_config(estimator={**OUTPUT_ES, "meta_loss": "log"})
        with pytest.raises(ConfigError, match="anchor needs estimator"):
            plain(tasks=[{**QUADRATIC, "anchor": True}])
        with pytest.raises(ConfigError, match="estimator 'output-es' has no option 'groups'"):
            output_es_config(estimator={**OUTPUT_ES, "groups": 2})

    @pytest.mark.parametrize("options", [{"sigma": 0.0}, {"pairs": 0}, {"caution": -1.0}])
    def test_numbers_out_of_range_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="must be positive"):
            OutputES(**options)

    def test_windows_shorter_than_a_training_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r'whole inner trainings: set unroll\.truncation = "whole"'):
            run(Trainer(output_es_config(unroll={"truncation": 5, "horizon": [10, 30]})))

    def test_several_processes_are_refused(self) -> None:
        world = World()
        world.size = 2
        with pytest.raises(ValueError, match="output-es runs in one process, got 2"):
            Trainer(output_es_config(), world=world)

    def test_foreign_experience_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"not an experience of output-es: .*0\.signal"):
            OutputES().check_learned({"0.signal": torch.zeros(1)})
