"""Update rules to test with: every architecture, with random meta-parameters and states, and its float64 reference."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from helpers.reference import Array, LSTML2LReference, MLPReference, ScaleFreeLSTMReference
from helpers.schedule_free_reference import ScheduleFreeLSTMReference
from learned_optim.rules import LSTML2L, MLP, RuleState, ScaleFreeLSTM, ScheduleFreeLSTM, UpdateRule

Build = Callable[[], UpdateRule]
Reference = LSTML2LReference | ScaleFreeLSTMReference | ScheduleFreeLSTMReference | MLPReference

RULES: dict[str, Build] = {
    "lstm-l2l": LSTML2L,
    "scale-free-lstm": ScaleFreeLSTM,
    "schedule-free-lstm": ScheduleFreeLSTM,
    "mlp": MLP,
}
"""Every architecture with its default settings."""

VARIANTS: dict[str, Build] = {
    "lstm-l2l-three-layers": partial(LSTML2L, hidden_size=3, layers=3, p=5.0, output_scale=0.7),
    "scale-free-lstm-decay-zero": partial(ScaleFreeLSTM, 4, momentum_decays=(0.9, 0.0, 0.99), rate=0.1),
    "schedule-free-lstm-one-unit": partial(ScheduleFreeLSTM, 1, rate=1.0),
    "schedule-free-lstm-no-units": partial(ScheduleFreeLSTM, 0),
    "mlp-large-magnitudes": partial(MLP, 5, rate=0.1, magnitude_rate=1.0),
}
"""The architectures with other sizes and settings."""

# Few examples, the same in every run: a broken law fails on almost any input. No deadline: machines are shared.
few_examples = settings(max_examples=20, deadline=None, derandomize=True)


def each(builds: Mapping[str, Build]) -> pytest.MarkDecorator:
    """Parametrise a test by ``build``, the constructor of a rule, with the names as ids."""
    return pytest.mark.parametrize("build", list(builds.values()), ids=list(builds))


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(rule: UpdateRule, seed: int = 0, deviation: float = 0.3) -> UpdateRule:
    """The rule in float64 with normal meta-parameters, so that no term is absent because its weight starts at zero.

    Deviation 0.3 moves the gates well away from their middle and saturates few of them.
    """
    rule.double()
    with torch.no_grad():
        for index, parameter in enumerate(rule.parameters()):
            parameter.copy_(deviation * normal(*parameter.shape, seed=1000 * seed + index))
    return rule


def random_state(rule: UpdateRule, *coordinates: int) -> RuleState:
    """A state as after some steps: nothing is zero, second moments are positive."""
    zeros = rule.init_state(coordinates, dtype=torch.float64)
    state = {entry: 0.5 * normal(*value.shape, seed=index) for index, (entry, value) in enumerate(zeros.items())}
    if "second_moment" in state:
        state["second_moment"] = state["second_moment"].square() + 0.1
    return state


def as_reference(rule: UpdateRule, weights: Mapping[str, Array] | None = None) -> Reference:
    """The float64 reference with the rule's meta-parameters, or with ``weights`` under the same names."""
    if weights is None:
        weights = {name: value.double().numpy() for name, value in rule.state_dict().items()}
    if isinstance(rule, LSTML2L):
        cells = [(weights[f"cells.{layer}.weight"], weights[f"cells.{layer}.bias"]) for layer in range(rule.layers)]
        return LSTML2LReference(cells, weights["output_weight"], weights["output_bias"], rule.p, rule.output_scale)
    if isinstance(rule, MLP):
        return MLPReference(
            weights["hidden_weight"],
            weights["step_weight"],
            weights["hidden_bias"],
            weights["output_weight"],
            weights["output_bias"],
            rule.rate,
            rule.magnitude_rate,
        )
    if isinstance(rule, ScheduleFreeLSTM) and not rule.hidden_size:  # the oracle with a unit that has no weight
        zeros = {"cell.weight": (4, 10), "cell.bias": (4,), "step_weight": (4, 5), "output_weight": (7, 1)}
        weights = {**{name: np.zeros(shape) for name, shape in zeros.items()}, **weights}
    layer = (
        weights["cell.weight"],
        weights["cell.bias"],
        weights["step_weight"],
        weights["output_weight"],
        weights["output_bias"],
    )
    if isinstance(rule, ScheduleFreeLSTM):
        return ScheduleFreeLSTMReference(*layer, rule.rate)
    assert isinstance(rule, ScaleFreeLSTM)
    return ScaleFreeLSTMReference(*layer, rule.momentum_decays, rule.rate)
