"""Rules run over histories of gradients, and small rules whose updates are far above the tolerances of the checks."""

from functools import partial

import torch
from torch import Tensor

from helpers.rules import Build
from learned_optim.rules import LSTML2L, MLP, RuleState, ScaleFreeLSTM, ScheduleFreeLSTM, UpdateRule

# Factors of 1 on the updates: derivatives are then far above the absolute tolerances of the checks.
SMALL: dict[str, Build] = {
    "lstm-l2l": partial(LSTML2L, hidden_size=2, output_scale=1.0),
    "scale-free-lstm": partial(ScaleFreeLSTM, 2, momentum_decays=(0.5, 0.9), rate=1.0),
    "schedule-free-lstm": partial(ScheduleFreeLSTM, 2, rate=1.0),
    "mlp": partial(MLP, 3, rate=1.0, magnitude_rate=1.0),
}


def call_forward(rule: UpdateRule, grad: Tensor, state: RuleState, step: int) -> tuple[Tensor, RuleState]:
    """One step of a rule with the step count as a tensor."""
    update, state = rule(grad, state, torch.tensor(step))
    return update, state


@torch.no_grad()
def run(rule: UpdateRule, grads: Tensor) -> tuple[Tensor, RuleState]:
    """Updates ``(steps, *coordinates)`` for gradients of that shape, from the zero state; and the last state."""
    state = rule.init_state(tuple(grads.shape[1:]), dtype=grads.dtype)
    updates = []
    for step, grad in enumerate(grads, start=1):
        update, state = call_forward(rule, grad, state, step)
        updates.append(update)
    return torch.stack(updates), state
