"""Branches of a step: a condition that all coordinates share decides what is computed, read and written."""

import functools

import pytest
import torch
from torch import Tensor, nn

from helpers.kernel_steps import (
    KernelPlace,
    apply_fused,
    assert_only_rounded_step,
    exact_step,
    needs_compiler,
    slots_of,
    values_of,
)
from helpers.periodic import Periodic
from helpers.rounding import OF_KERNELS, assert_only_rounded, spread
from helpers.rules import Build, each, normal, random_state, randomised
from helpers.slots import PLAIN, as_slots, assert_same_slots, clones
from helpers.training_steps import by_kernels, case_of, plain
from helpers.triton import HAS_TRITON
from learned_optim import LearnedOptimizer
from learned_optim.kernels.gpu.ahead_of_time import compile_for
from learned_optim.kernels.slots import StepSettings
from learned_optim.kernels.sources.c import macros
from learned_optim.kernels.sources.registry import Sources
from learned_optim.kernels.tracing.program import Input, Program
from learned_optim.meta_train.inner.particles import ParticleRule, flat_meta_parameters
from learned_optim.meta_train.inner.training_kernels import in_place_step
from learned_optim.rules import Conditions, RuleState, UpdateRule
from learned_optim.step import fused, programs
from learned_optim.step.plain import apply_per_tensor

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (pip install learned-optim[gpu])")


class Weighed(Periodic):
    """Its LSTM runs if a weight is positive: each particle has a condition of its own."""

    def condition(self, step: Tensor) -> Tensor:
        return self.output_weight[0, 0] > 0


class Nested(Periodic):
    """Four conditions, more than programs are made for; one of them counts in some outcomes of another only."""

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        update, new = super().forward(grad, state, step)
        early = torch.where(step < 3, 2 * update, update.tanh())
        late = torch.where(step > 4, early, torch.where(step % 2 == 0, -early, early.square()))
        return late, new


LOOPED = functools.partial(Periodic, 16)  # its product is a loop over units on a GPU
BUILDS: dict[str, Build] = {"periodic": Periodic, "weighed": Weighed, "nested": Nested}


def sources(rule: UpdateRule, dtype: torch.dtype = torch.float32) -> Sources:
    found = programs.sources_of(rule, dtype)
    assert isinstance(found, Sources), found
    return found


def entries(program: Program) -> tuple[set[str], set[str]]:
    """The names that a program reads, and the entries of the state that it writes."""
    return {s.entry for s in program.read if isinstance(s, Input)}, {f.entry for f in program.written} - {"update"}


# What is computed, read and written


def test_program_of_a_step_that_is_not_due_has_nothing_of_the_lstm() -> None:
    due, other = sources(Periodic(5)).branches.programs
    assert [(product.outputs, len(product.operands)) for product in due.products] == [(20, 7), (1, 5)]
    assert [(product.outputs, len(product.operands)) for product in other.products] == [(1, 5)]
    assert len(other.operations) < 10 < len(due.operations)
    assert entries(due) == ({"grad", "momentum", "hidden", "cell"}, {"momentum", "hidden", "cell"})
    assert entries(other) == ({"grad", "momentum", "hidden"}, {"momentum"})


def test_compiled_step_touches_only_the_entries_that_its_branch_needs() -> None:
    text = macros(sources(Periodic()).branches, (torch.float32,) * 5)
    assert (
        text.splitlines()[-1] == '#define EACH_UPDATE(of) of(0, update_0, "111", "111") of(1, update_1, "110", "100")'
    )


def test_rule_without_conditions_that_all_coordinates_share_has_one_program() -> None:
    class Own(Periodic):
        def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
            return torch.where(grad > 0, grad, -grad) * self.output_weight[0, 0], state

    (program,) = sources(Own()).branches.programs
    assert entries(program) == ({"grad"}, set())


def test_conditions_beyond_the_limit_stay_operations() -> None:
    found = sources(Nested()).branches.programs
    assert len(found) == 4
    choices = [sum(getattr(op, "name", "") == "where" for op in program.operations) for program in found]
    assert choices == [2, 2, 2, 2]


# Values


@pytest.mark.parametrize(
    ("dtype", "recurrent"),
    [
        pytest.param(torch.float32, torch.float32, id="float32"),
        pytest.param(torch.float32, torch.bfloat16, id="recurrent-bfloat16"),
        pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
        pytest.param(torch.float16, torch.float32, id="float16"),
    ],
)
@each(BUILDS)
def test_each_step_matches_float64_within_rounding(
    build: Build, dtype: torch.dtype, recurrent: torch.dtype, place: KernelPlace
) -> None:
    rule = randomised(build()).float()
    settings = StepSettings(0.7, 0.01, maximize=True, skip_nonfinite=True)
    slots = slots_of(rule, (1, 65, 1025) if dtype == recurrent else (65,), dtype, recurrent)
    for count in range(1, 6):
        slots = [slot._replace(step=torch.tensor(float(count))) for slot in slots]
        slots = assert_only_rounded_step(rule, slots, settings, place, exact_step)


@pytest.mark.slow
def test_layer_that_is_a_loop_matches_float64(interpreted: None) -> None:
    rule = randomised(LOOPED()).float()
    assert "= lstm_layer(" in sources(rule).triton.text
    slots = slots_of(rule, (65,), torch.float32, torch.float32)
    for count in (1, 2):
        slots = [slot._replace(step=torch.tensor(float(count))) for slot in slots]
        slots = assert_only_rounded_step(rule, slots, PLAIN, KernelPlace("cpu", 128), exact_step)


@needs_compiler
@each(BUILDS)
def test_float64_step_matches_the_plain_path(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rule = randomised(build())
    by_kernel = as_slots(rule, [normal(9), normal(30)], torch.float64)
    plain_slots = clones(by_kernel)
    for count in range(1, 6):
        step = torch.tensor(float(count))
        fused.apply_fused(programs.plan_of(rule), [slot._replace(step=step) for slot in by_kernel], PLAIN)
        apply_per_tensor(rule, [slot._replace(step=step) for slot in plain_slots], PLAIN)
    for name, values in values_of(plain_slots).items():
        torch.testing.assert_close(values_of(by_kernel)[name], values, rtol=1e-11, atol=1e-13)


def test_state_stays_in_every_bit_while_the_lstm_rests(place: KernelPlace) -> None:
    rule = randomised(Periodic()).float()
    slots = slots_of(rule, (1, 40, 300), torch.float32, torch.bfloat16)
    expected = clones(slots)
    for slot in slots:
        slot.state["cell"].fill_(torch.nan)  # whoever reads it gets NaN
        slot.grad[:1] = torch.nan  # of this coordinate nothing changes
    settings, step = PLAIN._replace(skip_nonfinite=True), torch.tensor(5.0)
    before = clones(slots)
    apply_fused(rule, [slot._replace(step=step) for slot in slots], settings, place)
    apply_per_tensor(rule, [slot._replace(step=step) for slot in expected], settings)
    for found, plain_slot, old in zip(slots, expected, before, strict=True):
        assert found.state["cell"].isnan().all()
        assert torch.equal(found.state["hidden"], old.state["hidden"])
        assert torch.equal(found.parameter[:1], old.parameter[:1])
        assert torch.equal(found.state["momentum"][:, :1], old.state["momentum"][:, :1])
        torch.testing.assert_close(found.parameter[1:], plain_slot.parameter[1:], rtol=2e-6, atol=1e-7)


def test_tensors_of_one_call_take_branches_by_their_own_counts(place: KernelPlace) -> None:
    rule = randomised(Periodic()).float()
    slots = as_slots(rule, [normal(n, seed=n) for n in (3, 4, 100, 7, 50)], torch.float32)
    slots = [slot._replace(step=torch.tensor(float(count))) for slot, count in zip(slots, (1, 2, 4, 9, 7), strict=True)]
    by_kernel, expected = clones(slots), clones(slots)
    apply_fused(rule, by_kernel, PLAIN, place)
    apply_per_tensor(rule, expected, PLAIN)
    assert_same_slots(by_kernel, expected, slots)
    rests = [torch.equal(one.state["cell"], slot.state["cell"]) for one, slot in zip(by_kernel, slots, strict=True)]
    assert rests == [False, True, False, True, False]


class Training:
    """Two parameters, of which the second joins after the first step."""

    def __init__(self, fused: bool) -> None:
        self.parameters = [nn.Parameter(normal(40, seed=seed).float()) for seed in (1, 2)]
        self.optimizer = LearnedOptimizer(self.parameters[:1], Periodic(), fused=fused)
        self.steps = 0

    def run(self, until: int) -> "Training":
        for count in range(self.steps, until):
            if count == 1:
                self.optimizer.add_param_group({"params": self.parameters[1:]})
            for place, parameter in enumerate(self.parameters):
                parameter.grad = normal(40, seed=10 * count + place).float()
            self.optimizer.step()
        self.steps = until
        return self

    def resumed(self, fused: bool) -> "Training":
        """A new training that continues this one, which has two groups."""
        other = Training(fused)
        other.optimizer.add_param_group({"params": other.parameters[1:]})
        other.optimizer.load_state_dict(self.optimizer.state_dict())
        with torch.no_grad():
            for copy, parameter in zip(other.parameters, self.parameters, strict=True):
                copy.copy_(parameter)
        other.steps = self.steps
        return other

    def values(self) -> list[Tensor]:
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        return [*(p.detach() for p in self.parameters), *(state[e] for state in states for e in state)]


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_compiler)], ids=["plain", "fused"])
@pytest.mark.parametrize("after", [2, 3, 4])
def test_resuming_within_a_period_is_bit_exact(after: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    resumed = Training(fused).run(after).resumed(fused).run(7)
    assert all(map(torch.equal, Training(fused).run(7).values(), resumed.values()))


def test_group_that_is_added_later_has_a_period_of_its_own(on_cpu: None) -> None:
    by_kernel, expected = Training(True).run(7).values(), Training(False).run(7).values()
    torch.testing.assert_close(by_kernel, expected, rtol=1e-5, atol=1e-6)


# Meta-training


@pytest.mark.parametrize("step", [1.0, 2.0, 4.0])
@each({"periodic": Periodic, "weighed": Weighed})
def test_gradients_match_float64_within_rounding(build: Build, step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = case_of(build(), 2, 40, step)
    truth = plain(case, torch.float64)
    found = by_kernels(case, "cpu")
    assert_only_rounded(found, truth, spread(lambda: plain(case, torch.float64)), roundings=OF_KERNELS)
    if build is Periodic and step == 2:
        assert torch.equal(found["d_cell"].float(), case.weights_of_results[-1].float())  # it comes out as it went in


@needs_compiler
@each({"periodic": Periodic, "weighed": Weighed, "nested": Nested})
def test_particles_match_the_plain_path(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rule = randomised(build()).float()
    weights = flat_meta_parameters(rule) + 0.3 * normal(6, len(flat_meta_parameters(rule))).float()
    particles = ParticleRule(rule, weights)
    state = {entry: value.movedim(1, 0).contiguous().float() for entry, value in random_state(rule, 6, 2, 9).items()}
    expected_state = {entry: tensor.clone() for entry, tensor in state.items()}
    parameters, expected = torch.ones(6, 2, 9), torch.ones(6, 2, 9)
    step = in_place_step(particles, parameters)
    assert step is not None
    for count in range(1, 6):
        grad, at, cell = normal(6, 2, 9, seed=count).float(), torch.tensor(float(count)), state["cell"].clone()
        step(parameters, grad, state, at, Conditions())
        update, expected_state = particles(grad, expected_state, at)
        expected += update
        runs = particles.stacked["output_weight"][:, 0, 0] > 0 if build is Weighed else torch.tensor(count % 3 == 1)
        assert torch.equal((state["cell"] != cell).flatten(1).all(1), runs.expand(6))
    torch.testing.assert_close(parameters, expected, rtol=1e-5, atol=1e-6)
    for entry, tensor in expected_state.items():
        torch.testing.assert_close(state[entry], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@each({"periodic": functools.partial(Periodic, 1), "looped": LOOPED})
def test_branches_compile_for_a_gpu_without_spills(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = compile_for(sources(build()).key, torch.float32, (torch.float32,) * 3, compute_capability=90, scaled=False)
    assert found.spill_stores == found.spill_loads == 0
