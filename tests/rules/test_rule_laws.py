"""Laws that every update rule keeps: coordinatewise, pure, differentiable, reproducible, rebuilt from its settings."""

import json
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.func import functional_call, vmap

from helpers.histories import SMALL, run
from helpers.reference import Array
from helpers.rules import RULES, VARIANTS, Build, each, few_examples, normal, random_state, randomised
from learned_optim.rules import ARCHITECTURES, LSTML2L, MLP, Conditions, ScaleFreeLSTM, ScheduleFreeLSTM

# Coordinatewise laws.
#
# Which coordinates share a block changes the last bits, and nothing else: torch's sigmoid takes a vector path for full
# registers and a scalar path for the rest, sums over the leading axis add in another order there, and BLAS takes
# another kernel for a matrix with a single column. So a coordinate that changes its place, or the size of its block,
# is held to float64 rounding; reshaping changes neither, and is held to the bit.
LAW_TOLERANCE = 1e-12  # relative to the block's largest update; a leak between coordinates is of order one

histories = hnp.arrays(
    np.float64, st.tuples(st.just(3), st.integers(1, 24)), elements=st.floats(-1e6, 1e6, allow_subnormal=False)
)


def assert_same_block(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=LAW_TOLERANCE * expected.abs().max().item())


@each(RULES)
@few_examples
@given(history=histories, data=st.data())
def test_updates_are_equivariant_to_permutation(build: Build, history: Array, data: st.DataObject) -> None:
    rule, grads = randomised(build()), torch.from_numpy(history)
    order = data.draw(st.permutations(range(grads.shape[1])))
    updates, state = run(rule, grads)
    permuted_updates, permuted_state = run(rule, grads[:, order])
    assert_same_block(permuted_updates, updates[:, order])
    for entry, value in state.items():
        assert_same_block(permuted_state[entry], value[:, order])


@each(RULES)
@few_examples
@given(history=histories, data=st.data())
def test_updates_are_independent_of_block_boundaries(build: Build, history: Array, data: st.DataObject) -> None:
    rule, grads = randomised(build()), torch.from_numpy(history)
    cut = data.draw(st.integers(0, grads.shape[1]))
    updates, state = run(rule, grads)
    (left, left_state), (right, right_state) = run(rule, grads[:, :cut]), run(rule, grads[:, cut:])
    assert_same_block(torch.cat([left, right], dim=1), updates)
    for entry, value in state.items():
        assert_same_block(torch.cat([left_state[entry], right_state[entry]], dim=1), value)


@each(RULES)
@few_examples
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 1000))
def test_flattening_a_parameter_is_bit_exact(build: Build, rows: int, columns: int, seed: int) -> None:
    rule, grads = randomised(build()), normal(3, rows, columns, seed=seed)
    updates, state = run(rule, grads)
    flat_updates, flat_state = run(rule, grads.flatten(1))
    assert torch.equal(flat_updates, updates.flatten(1))
    for entry, value in state.items():
        assert torch.equal(flat_state[entry], value.flatten(1))


@each(RULES)
def test_scalar_parameter_steps_as_a_vector_of_one(build: Build) -> None:
    rule, grads = randomised(build()), normal(4)
    updates, state = run(rule, grads)
    vector_updates, vector_state = run(rule, grads[:, None])
    assert torch.equal(updates, vector_updates[:, 0])
    for entry, value in state.items():
        assert torch.equal(value, vector_state[entry][:, 0])


@each(RULES)
@pytest.mark.parametrize("coordinates", [(0,), (3, 0)], ids=str)
def test_empty_parameter_is_accepted(build: Build, coordinates: tuple[int, ...]) -> None:
    rule = randomised(build())
    updates, state = run(rule, torch.empty(2, *coordinates, dtype=torch.float64))
    assert updates.shape == (2, *coordinates)
    for entry, features in rule.state_features.items():
        assert state[entry].shape == (features, *coordinates)


@each(RULES)
def test_forward_is_pure(build: Build) -> None:
    rule = randomised(build())
    grad, state, step = normal(5), random_state(rule, 5), torch.tensor(3)
    before = [value.clone() for value in (grad, *state.values(), step, *rule.state_dict().values())]
    names = list(state)

    first, first_state = rule(grad, state, step)
    second, second_state = rule(grad, state, step)

    after = [grad, *state.values(), step, *rule.state_dict().values()]
    assert list(state) == names
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert torch.equal(first, second)
    assert all(torch.equal(first_state[entry], second_state[entry]) for entry in names)


@each(RULES)
def test_global_random_state_is_unchanged(build: Build) -> None:
    torch_before, python_before = torch.get_rng_state(), random.getstate()
    rule = build()
    rule.reset_parameters(seed=1)
    run(rule, torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert random.getstate() == python_before


@each(RULES)
def test_seed_determines_the_weights(build: Build) -> None:
    def weights(seed: int) -> Tensor:
        rule = build()
        rule.reset_parameters(seed)
        return torch.nn.utils.parameters_to_vector(rule.parameters())

    assert torch.equal(weights(0), torch.nn.utils.parameters_to_vector(build().parameters()))
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@each(SMALL)
def test_forward_passes_gradcheck(build: Build) -> None:
    rule = randomised(build())
    entries, names = list(rule.state_features), [name for name, _ in rule.named_parameters()]

    def forward(grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        state = dict(zip(entries, values[: len(entries)], strict=True))
        weights = dict(zip(names, values[len(entries) :], strict=True))
        update, new_state = functional_call(rule, weights, (grad, state, torch.tensor(3)))
        return (update, *(new_state[entry] for entry in entries))

    # One gradient on the steep branch of the log-and-sign preprocessing, none on its corners 0 and exp(-10).
    grad = torch.tensor([0.5, -2e-5, 2.0], dtype=torch.float64)
    inputs = [grad, *random_state(rule, 3).values(), *(value.detach() for value in rule.parameters())]
    # eps 1e-7 moves that gradient by 0.5 % only, where the slope is exp(10); rounding then costs 1e-16 / 1e-7.
    assert torch.autograd.gradcheck(forward, [value.requires_grad_() for value in inputs], eps=1e-7, atol=1e-7)


@each(RULES)
def test_meta_gradient_is_finite_for_an_input_that_is_always_zero(build: Build) -> None:
    # A pixel that is black in every image: its weight's gradient is zero, and with second derivatives the
    # meta-gradient flows back through that gradient.
    rule = randomised(build())
    images = torch.tensor([[0.0, 1.0, 0.5], [0.0, -1.0, 2.0]], dtype=torch.float64)

    def loss(pixel_weights: Tensor) -> Tensor:
        return ((images @ pixel_weights).tanh() - 1).square().sum()

    pixel_weights = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    state = rule.init_state((3,), dtype=torch.float64)
    for step in range(1, 4):
        (grad,) = torch.autograd.grad(loss(pixel_weights), pixel_weights, create_graph=True)
        update, state = rule(grad, state, torch.tensor(step))
        pixel_weights = pixel_weights + update
    meta_gradients = torch.autograd.grad(loss(pixel_weights), list(rule.parameters()))
    assert all(gradient.isfinite().all() for gradient in meta_gradients)


@each(RULES)
def test_vmap_over_meta_parameters_matches_a_loop(build: Build) -> None:
    rule = build()
    members = [{n: p.detach().clone() for n, p in randomised(build(), seed).named_parameters()} for seed in range(3)]
    stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}

    def unroll(weights: dict[str, Tensor], grads: Tensor) -> Tensor:
        state, updates = rule.init_state((4,), dtype=torch.float64), []
        for step, grad in enumerate(grads, start=1):
            update, state = functional_call(rule, weights, (grad, state, torch.tensor(step)))
            updates.append(update)
        return torch.stack(updates)

    grads = normal(4, 4)
    looped = torch.stack([unroll(member, grads) for member in members])
    together = vmap(unroll, in_dims=(0, None))(stacked, grads)
    # A batched matrix product sums in another order.
    torch.testing.assert_close(together, looped, rtol=1e-12, atol=1e-14)


@each(RULES)
def test_tasks_use_their_own_step_counts(build: Build) -> None:
    rule = randomised(build())
    grads, state, steps = normal(3, 4), random_state(rule, 3, 4), torch.tensor([[1], [7], [4000]])

    updates, new_state = rule(grads, state, steps)

    for task in range(3):
        own_state = {entry: value[:, task] for entry, value in state.items()}
        update, own_state = rule(grads[task], own_state, steps[task, 0])
        assert_same_block(updates[task], update)
        for entry, value in own_state.items():
            assert_same_block(new_state[entry][:, task], value)


@each(RULES)
@pytest.mark.parametrize("everything", [False, True], ids=["recurrent", "everything"])
def test_bfloat16_state_is_upcast_for_arithmetic(build: Build, everything: bool) -> None:
    rule = randomised(build()).float()
    grad, step = normal(5).float(), torch.tensor(3)
    assert rule.recurrent_state == {"hidden", "cell"} & rule.state_features.keys()
    stored = {
        entry: value.to(torch.bfloat16 if everything or entry in rule.recurrent_state else torch.float32)
        for entry, value in random_state(rule, 5).items()
    }

    update, state = rule(grad, stored, step)
    expected, expected_state = rule(grad, {entry: value.float() for entry, value in stored.items()}, step)

    assert update.dtype == torch.float32
    assert torch.equal(update, expected)
    for entry, value in state.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected_state[entry])


@each(RULES | VARIANTS)
def test_settings_rebuild_the_rule(build: Build) -> None:
    rule = randomised(build())
    written = json.loads(json.dumps(dict(rule.settings)))  # as a file carries them: tuples come back as lists
    rebuilt = ARCHITECTURES[rule.name](**written).double()
    assert type(rebuilt) is type(rule)
    assert rebuilt.settings == rule.settings
    assert rebuilt.state_features == rule.state_features
    rebuilt.load_state_dict(rule.state_dict())
    grads = normal(3, 4)
    assert torch.equal(run(rebuilt, grads)[0], run(rule, grads)[0])


NAN = float("nan")


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        pytest.param(partial(LSTML2L, hidden_size=0), "hidden_size", id="lstm-l2l-no-units"),
        pytest.param(partial(LSTML2L, layers=0), "layers", id="lstm-l2l-no-layers"),
        pytest.param(partial(LSTML2L, p=0.0), "p", id="lstm-l2l-p-zero"),
        pytest.param(partial(LSTML2L, p=NAN), "p", id="lstm-l2l-p-nan"),
        pytest.param(partial(LSTML2L, output_scale=-0.1), "output_scale", id="lstm-l2l-negative-scale"),
        pytest.param(partial(ScaleFreeLSTM, hidden_size=0), "hidden_size", id="scale-free-lstm-no-units"),
        pytest.param(partial(ScaleFreeLSTM, momentum_decays=()), "momentum_decays", id="scale-free-lstm-no-decays"),
        pytest.param(partial(ScaleFreeLSTM, momentum_decays=(0.5,)), "momentum_decays", id="scale-free-lstm-no-0.9"),
        pytest.param(partial(ScaleFreeLSTM, momentum_decays=(0.9, 1.0)), "momentum_decays", id="scale-free-lstm-1.0"),
        pytest.param(partial(ScaleFreeLSTM, momentum_decays=(-0.1, 0.9)), "momentum_decays", id="scale-free-lstm-neg"),
        pytest.param(partial(ScaleFreeLSTM, momentum_decays=(0.9, NAN)), "momentum_decays", id="scale-free-lstm-nan"),
        pytest.param(partial(ScaleFreeLSTM, rate=0.0), "rate", id="scale-free-lstm-no-rate"),
        pytest.param(partial(ScaleFreeLSTM, rate=NAN), "rate", id="scale-free-lstm-rate-nan"),
        pytest.param(partial(ScheduleFreeLSTM, hidden_size=-1), "hidden_size", id="schedule-free-lstm-negative-units"),
        pytest.param(partial(ScheduleFreeLSTM, rate=-0.1), "rate", id="schedule-free-lstm-negative-rate"),
        pytest.param(partial(ScheduleFreeLSTM, rate=NAN), "rate", id="schedule-free-lstm-rate-nan"),
        pytest.param(partial(MLP, hidden_size=0), "hidden_size", id="mlp-no-units"),
        pytest.param(partial(MLP, rate=0.0), "rate", id="mlp-no-rate"),
        pytest.param(partial(MLP, magnitude_rate=NAN), "magnitude_rate", id="mlp-magnitude-rate-nan"),
    ],
)
def test_invalid_setting_is_refused(build: Build, argument: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        build()


# Laws of the default's architecture, whatever its weights are.


def with_large_weights(seed: int, deviation: float) -> ScheduleFreeLSTM:
    """A rule whose weights are all normal with this deviation."""
    rule = ScheduleFreeLSTM().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.normal_(0, deviation, generator=generator)
    return rule


@few_examples
@given(history=histories, seed=st.integers(0, 1000))
def test_opposite_gradients_give_opposite_updates(history: Array, seed: int) -> None:
    rule, grads = with_large_weights(seed, 1.0), torch.from_numpy(history)
    torch.testing.assert_close(run(rule, -grads)[0], -run(rule, grads)[0], rtol=0, atol=0)


@few_examples
@given(
    seed=st.integers(0, 1000),
    deviation=st.floats(0.1, 100.0),
    averaging=st.sampled_from([0.0, 1.0]),
    scale=st.floats(1e-6, 1e6),
)
def test_no_weights_let_a_parameter_grow_exponentially(
    seed: int, deviation: float, averaging: float, scale: float
) -> None:
    """In each step the decay takes at most a tenth, and the rest moves by at most a multiple of the rate."""
    rule, steps = with_large_weights(seed, deviation), 40
    generator = torch.Generator().manual_seed(seed)
    parameter = scale * torch.randn(64, generator=generator, dtype=torch.float64)
    state = rule.init_state((64,), dtype=torch.float64)
    # rate, exp(6), a direction and two momenta of at most 3 each; fast and averaged sequence move by no more in a step
    largest_move = rule.rate * math.exp(6) * 9
    for step in range(1, steps + 1):
        grad = parameter + torch.randn(64, generator=generator, dtype=torch.float64)
        update, state = rule(grad, state, torch.tensor(float(step)), Conditions(parameter, averaging=averaging))
        assert bool((update.abs() <= 0.1 * parameter.abs() + step * largest_move).all())
        parameter = parameter + update
