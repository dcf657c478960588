"""The training kernels: values, gradients and whole windows of meta-training, in Triton's interpreter and on a GPU."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.devices import needs_cuda
from helpers.rounding import OF_KERNELS, assert_only_rounded, spread
from helpers.rules import Build, each, normal, randomised
from helpers.training_steps import Case, StepResults, by_kernels, case_of, leaves_of, oracle, plain
from helpers.triton import HAS_TRITON, ONE_UNIT, StandInDriver
from learned_optim.kernels.gpu import training
from learned_optim.kernels.gpu.modules import module_of
from learned_optim.meta_train.estimators import PES, Estimator, Reparameterization, TruncatedBPTT
from learned_optim.meta_train.inner import training_kernels as dispatch
from learned_optim.meta_train.inner.particles import ParticleRule, flat_meta_parameters
from learned_optim.meta_train.inner.training_kernels import FusedRule, fused_equivalent
from learned_optim.meta_train.inner.unroll import start, unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks.quadratic import QuadraticTask
from learned_optim.rules import LSTML2L, MLP, RuleState, ScaleFreeLSTM, ScheduleFreeLSTM, UpdateRule, schedule_free_lstm
from learned_optim.step import particles

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (pip install learned-optim[gpu])")

RULES: dict[str, Build] = {
    "scale-free-lstm": functools.partial(ScaleFreeLSTM, rate=0.1),
    "scale-free-lstm-decay-zero": functools.partial(ScaleFreeLSTM, 1, momentum_decays=(0.9, 0.0, 0.99), rate=0.1),
    "scale-free-lstm-looped": functools.partial(ScaleFreeLSTM, 9, momentum_decays=(0.5, 0.9), rate=0.1),
    "schedule-free-lstm": functools.partial(ScheduleFreeLSTM, rate=0.1),
    "schedule-free-lstm-no-units": functools.partial(ScheduleFreeLSTM, 0, rate=0.1),
    "schedule-free-lstm-looped": functools.partial(ScheduleFreeLSTM, 9, rate=0.1),
    "lstm-l2l": functools.partial(LSTML2L, 4, output_scale=1.0),
    "lstm-l2l-one-layer": functools.partial(LSTML2L, 5, layers=1, p=5.0, output_scale=0.7),
    "lstm-l2l-three-layers": functools.partial(LSTML2L, 3, layers=3),
    "mlp": functools.partial(MLP, 5, rate=0.1, magnitude_rate=0.1),
}
SMALL: dict[str, Build] = {
    "scale-free-lstm": functools.partial(ScaleFreeLSTM, 2, momentum_decays=(0.5, 0.9), rate=0.1),
    "schedule-free-lstm": functools.partial(ScheduleFreeLSTM, 2, rate=0.1),
    "lstm-l2l": functools.partial(LSTML2L, 2, output_scale=1.0),
}


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=needs_cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_step_is_only_rounded(
    case: Case, device: str, unit: Callable[[StepResults], StepResults] = lambda results: results
) -> None:
    """Held to the plain path in float64, which is held to the oracle; the plain path in float32 is the control."""
    truth = plain(case, torch.float64)
    if case.grad.numel():
        for name, value in oracle(case).items():
            torch.testing.assert_close(truth[name], value, rtol=1e-9, atol=1e-12)
    truth = unit(truth)
    spreads = spread(lambda: unit(plain(case, torch.float64)))
    assert_only_rounded(unit(plain(case, torch.float32)), truth, spreads)
    assert_only_rounded(unit(by_kernels(case, device)), truth, spreads, roundings=OF_KERNELS)


@pytest.mark.slow
@each(RULES)
@pytest.mark.parametrize(("particles", "coordinates"), [(1, 65), (2, 64)])
@pytest.mark.usefixtures("poisoned")
def test_step_and_gradients_match_float64_within_rounding(
    build: Build, particles: int, coordinates: int, device: str
) -> None:
    assert_step_is_only_rounded(case_of(build(), particles, coordinates), device)


@each(SMALL)
@pytest.mark.parametrize(
    ("particles", "coordinates"),
    [
        (1, 0),
        (1, 63),
        *(
            pytest.param(*sizes, marks=pytest.mark.slow)
            for sizes in [(2, 1), (1, 1023), (1, 2 * training.INTERPRETED_BLOCK + 1)]
        ),
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_every_coordinate_counts_once(build: Build, particles: int, coordinates: int, device: str) -> None:
    assert_step_is_only_rounded(case_of(build(), particles, coordinates), device)


@pytest.mark.slow
@each(
    {
        "scale-free-lstm": functools.partial(ScaleFreeLSTM, 32),
        "schedule-free-lstm": functools.partial(ScheduleFreeLSTM, 32),
        "lstm-l2l": LSTML2L,
    }
)
def test_large_networks_match_float64(build: Build, device: str) -> None:
    assert_step_is_only_rounded(case_of(build(), 1, 300), device)


@pytest.mark.slow
def test_gradients_beyond_a_clip_match_float64(device: str) -> None:
    # Late, where a gradient can be more than the largest of its root mean square; log rates on both sides of a bound.
    case = case_of(ScheduleFreeLSTM(rate=0.1), 2, 64, step=400.0)
    state = {**case.state, "second_moment": 0.01 * case.state["second_moment"]}
    near = schedule_free_lstm.FACTOR_BOUND - 0.1 * case.state["log_rate"].abs()
    state["log_rate"] = near.copysign(case.state["log_rate"])
    case = case._replace(
        grad=case.grad.sign() * (0.1 + normal(2, 64, seed=4).square()),
        state={entry: tensor.float().double() for entry, tensor in state.items()},
    )
    case = case._replace(grad=case.grad.float().double())
    assert_step_is_only_rounded(case, device)
    found = by_kernels(case, device)
    direction = case.grad / (0.1 * case.grad.square() + 0.9 * case.state["second_moment"][:, 0]).sqrt()
    assert 0.2 < (direction.abs() > schedule_free_lstm.LARGEST_DIRECTION).double().mean() < 0.8
    cut = (found["log_rate"] == schedule_free_lstm.HIGHEST) | (found["log_rate"] == -schedule_free_lstm.FACTOR_BOUND)
    assert 0.2 < cut.double().mean() < 0.8


def test_gradient_passes_a_log_rate_at_its_bound(device: str) -> None:
    # What torch.clamp does: at the bound itself the gradient passes. Without weights and gradient nothing moves it.
    case = case_of(ScheduleFreeLSTM(2), 1, 4)
    case = case._replace(
        meta_parameters=torch.zeros_like(case.meta_parameters),
        grad=torch.zeros_like(case.grad),
        state={**case.state, "log_rate": torch.full_like(case.state["log_rate"], schedule_free_lstm.HIGHEST)},
    )
    truth, found = plain(case, torch.float64), by_kernels(case, device)
    assert (found["d_log_rate"] != 0).all()
    torch.testing.assert_close(found["d_log_rate"], truth["d_log_rate"], rtol=1e-5, atol=0)


@pytest.mark.slow
@each({"scale-free-lstm": ScaleFreeLSTM, "schedule-free-lstm": ScheduleFreeLSTM})
@pytest.mark.usefixtures("poisoned")
def test_first_step_from_the_zero_state_matches_float64(build: Callable[..., UpdateRule], device: str) -> None:
    # Several particles: inputs are signs in this step, so that all coordinates of one see but two different ones.
    case = case_of(build(rate=0.1), 4, 20, step=1.0)
    case = case._replace(state={entry: torch.zeros_like(tensor) for entry, tensor in case.state.items()})

    def in_units_of_the_gradient(results: StepResults) -> StepResults:
        """Averages are then 1 in all coordinates, and gradients with respect to them of one magnitude."""
        powers = {"momentum": 1, "second_moment": 2, "d_grad": -1, "d_momentum": -1, "d_second_moment": -2}
        return {
            name: value / case.grad.abs().view(len(case.grad), *[1] * (value.dim() - 2), -1) ** powers[name]
            if name in powers
            else value
            for name, value in results.items()
        }

    assert_step_is_only_rounded(case, device, in_units_of_the_gradient)


@each(SMALL)
def test_extreme_gradients_are_differentiated_as_by_autograd(build: Build, device: str) -> None:
    case = case_of(build(), 1, 6)
    extremes = torch.tensor([[0.0, -0.0, 1e-30, -1e30, 1e29, 1e-5]])
    case = case._replace(grad=extremes.double())
    truth, found = plain(case, torch.float32), by_kernels(case, device)
    torch.testing.assert_close(found["d_grad"], truth["d_grad"], rtol=1e-3, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(found["update"], truth["update"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@each(SMALL)
def test_non_contiguous_arguments_give_equal_results(build: Build, device: str) -> None:
    case = case_of(build(), 3, 17)
    expected = by_kernels(case, device)
    strided = [
        torch.stack([t, t], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1) for t in case.state.values()
    ]
    assert not strided[0].is_contiguous()
    weights = case.meta_parameters.t().contiguous().t()
    other = case._replace(
        meta_parameters=weights,
        grad=case.grad.t().contiguous().t(),
        state=dict(zip(case.state, strided, strict=True)),
    )
    found = by_kernels(other, device)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@each(SMALL)
def test_expanded_gradients_of_the_results_give_equal_gradients(build: Build, device: str) -> None:
    case = case_of(build(), 1, 5)
    ones = case._replace(weights_of_results=[torch.ones_like(tensor) for tensor in case.weights_of_results])
    weights, grad, *state = leaves_of(case, torch.float32, device)
    update, new_state = FusedRule(case.rule, weights)(
        grad, dict(zip(case.state, state, strict=True)), case.step.to(device)
    )
    total = update.sum() + sum(tensor.sum() for tensor in new_state.values())
    (found,) = torch.autograd.grad(total, weights)
    assert torch.equal(found.double().cpu(), by_kernels(ones, device)["d_meta_parameters"])


@pytest.mark.slow
@each(SMALL)
def test_second_run_is_bit_exact(build: Build, device: str) -> None:
    case = case_of(build(), 2, training.INTERPRETED_BLOCK + 9)
    first, second = by_kernels(case, device), by_kernels(case, device)
    assert all(torch.equal(first[name], second[name]) for name in first)


@each(SMALL)
def test_step_without_gradients_gives_the_same_update(build: Build, device: str) -> None:
    case = case_of(build(), 2, 9)
    weights, grad, *state = leaves_of(case, torch.float32, device)
    with torch.no_grad():
        update, _ = FusedRule(case.rule, weights)(grad, dict(zip(case.state, state, strict=True)), case.step.to(device))
    assert not update.requires_grad
    assert torch.equal(update.double().cpu(), by_kernels(case, device)["update"])


def test_differentiating_twice_is_refused(device: str) -> None:
    case = case_of(SMALL["lstm-l2l"](), 1, 3)
    weights, grad, *state = leaves_of(case, torch.float32, device)
    update, _ = FusedRule(case.rule, weights)(grad, dict(zip(case.state, state, strict=True)), case.step.to(device))
    (d_grad,) = torch.autograd.grad(update.square().sum(), grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_grad.sum().backward()


ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "truncated-bptt": TruncatedBPTT,
    "replay-coordinates": functools.partial(TruncatedBPTT, replay_coordinates=4),
    "second-derivatives": functools.partial(TruncatedBPTT, second_derivatives=True),
    "reparameterization": functools.partial(Reparameterization, 0.1, 2, 2),
    "reparameterization-second-derivatives": functools.partial(Reparameterization, 0.1, 1, 1, second_derivatives=True),
    "pes": functools.partial(PES, 0.1, 1, 2),
}


@pytest.mark.slow
@each(SMALL)
@pytest.mark.parametrize("estimator", list(ESTIMATORS.values()), ids=list(ESTIMATORS))
def test_meta_training_window_matches_the_plain_path(
    build: Build, estimator: Callable[[], Estimator], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = count_launches(monkeypatch)

    def window(use_kernels: bool) -> list[Tensor]:
        monkeypatch.setattr(dispatch, "uses_training_kernels", lambda device: use_kernels)
        rule = randomised(build()).float().to(device)
        task = VectorizedTask(QuadraticTask(3, None, 0.1, 1.0), 2, seed=0, device=torch.device(device))
        generator = torch.Generator().manual_seed(1)
        chosen = estimator()
        state = chosen.start(rule, task, start(rule, task, generator), generator)
        found = chosen.window(rule, task, state, 3, generator)
        assert bool(launches) == use_kernels
        return [*found.grads, found.meta_loss, found.losses, found.state.inner.parameters]

    for by_plain, by_kernel in zip(window(False), window(True), strict=True):
        # Roundings of three steps, which lie below 1e-5 in both; differences of losses over 2 sigma ** 2 in PES.
        torch.testing.assert_close(by_kernel, by_plain, rtol=1e-3, atol=3e-5 * max(1.0, float(by_plain.abs().max())))


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    original = training.Pass._launch

    def noting(half: training.Pass, *arguments: Any) -> None:
        names.append("backward" if "d_update" in half.program.features else "forward")
        original(half, *arguments)

    monkeypatch.setattr(training.Pass, "_launch", noting)
    return names


@each(SMALL)
def test_evaluation_matches_the_plain_path(build: Build, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = count_launches(monkeypatch)
    rule = randomised(build()).float().to(device)
    task = VectorizedTask(QuadraticTask(3, None, 0.1, 1.0), 2, seed=0, device=torch.device(device))
    losses = []
    for use_kernels in (False, True):
        monkeypatch.setattr(dispatch, "uses_training_kernels", lambda device, choice=use_kernels: choice)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            losses.append(unroll(rule, task, start(rule, task, generator), 3, generator).losses)
    assert launches == ["forward"] * 3
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


class TestDispatch:
    def test_cpu_uses_no_training_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert fused_equivalent(ScaleFreeLSTM(), torch.zeros(1)) is None

    def test_rule_without_a_kernel_keeps_the_plain_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Centred(ScaleFreeLSTM):
            def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
                return super().forward(grad - grad.mean(), state, step)

        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(dispatch, "uses_training_kernels", lambda device: True)
        like = torch.zeros(1)
        rule = ScaleFreeLSTM()
        assert fused_equivalent(rule, like) is not None
        assert fused_equivalent(ParticleRule(rule, torch.zeros(2, len(flat_meta_parameters(rule)))), like) is not None
        assert fused_equivalent(Centred(), like) is None
        assert fused_equivalent(LSTML2L(50), like) is None
        assert fused_equivalent(ScaleFreeLSTM().double(), like) is None
        assert fused_equivalent(lambda grad, state, step: (grad, state), like) is None


@pytest.mark.slow
@each(ONE_UNIT)
def test_launch_arguments_compile(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter does not look at types, specialisation and options of a launch; this does all but launch.
    from triton.runtime import driver

    compiled: list[Any] = []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    class Compiling:
        def __init__(self, module: Any) -> None:
            self.module = module

        def __getattr__(self, name: str) -> Any:
            kernel = getattr(self.module, name)

            class Launched:
                def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                    return lambda **arguments: compiled.append(kernel.warmup(grid=grid, **arguments))

            return Launched()

    monkeypatch.setattr(training, "module_of", lambda *which: Compiling(module_of(*which)))
    monkeypatch.setattr(driver, "_active", StandInDriver())
    case = case_of(build(), 2, 5)
    by_kernels(case, "cpu")
    step = particles.training_step(case.rule)
    assert len(compiled) == len(step.forward.segments) + len(step.backward.segments)
    assert all("cubin" in kernel.asm for kernel in compiled)
