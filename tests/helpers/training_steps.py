"""Steps of particles with random gradients of their results: by the training kernels, by autograd and by the oracle."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from helpers.rules import as_reference, normal, random_state, randomised
from learned_optim.meta_train.inner.particles import flat_meta_parameters
from learned_optim.meta_train.inner.training_kernels import FusedRule
from learned_optim.rules import RuleState, UpdateRule


class Case(NamedTuple):
    """Arguments of a step of P particles in float64, and random gradients of its results."""

    rule: UpdateRule
    meta_parameters: Tensor
    """``(P, M)``"""
    grad: Tensor
    """``(P, C)``"""
    state: RuleState
    """``(P, features, C)``"""
    step: Tensor
    weights_of_results: list[Tensor]


StepResults = dict[str, Tensor]
"""Update, new state, and gradients of meta-parameters, gradient and state, by name."""


def case_of(rule: UpdateRule, particles: int, coordinates: int, step: float = 7.0) -> Case:
    """Gradients of all kinds, also below the threshold of ``lstm-l2l``; every number is a float32."""
    rule = randomised(rule).float().double()
    weights = flat_meta_parameters(rule)
    weights = weights + 0.1 * normal(particles, len(weights), seed=1)
    magnitudes = 10 ** normal(particles, coordinates, seed=2).clamp(-6, 3)
    grad = normal(particles, coordinates, seed=3) * magnitudes
    state = {entry: tensor.movedim(1, 0) for entry, tensor in random_state(rule, particles, coordinates).items()}
    results = [grad, *state.values()]
    rounded = [tensor.float().double() for tensor in (weights, *results)]
    return Case(
        rule,
        rounded[0],
        rounded[1],
        dict(zip(state, rounded[2:], strict=True)),
        torch.tensor(step),
        [normal(*tensor.shape, seed=20 + index) for index, tensor in enumerate(results)],
    )


def collect(case: Case, leaves: list[Tensor], update: Tensor, state: RuleState) -> StepResults:
    values = {"update": update, **state}
    total = torch.zeros((), dtype=update.dtype, device=update.device)
    for value, weight in zip(values.values(), case.weights_of_results, strict=True):
        total = total + (value * weight.to(value)).sum()
    found = torch.autograd.grad(total, leaves)
    names = ["d_meta_parameters", "d_grad", *(f"d_{entry}" for entry in case.state)]
    results = {**values, **dict(zip(names, found, strict=True))}
    return {name: tensor.detach().double().cpu() for name, tensor in results.items()}


def leaves_of(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    tensors = [case.meta_parameters, case.grad, *case.state.values()]
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def by_kernels(case: Case, device: str) -> StepResults:
    weights, grad, *state = leaves_of(case, torch.float32, device)
    rule = FusedRule(case.rule, weights)
    update, new_state = rule(grad, dict(zip(case.state, state, strict=True)), case.step.to(device))
    return collect(case, [weights, grad, *state], update, new_state)


def plain(case: Case, dtype: torch.dtype) -> StepResults:
    """The rule itself, one particle after the other, by autograd."""
    rule = case.rule.to(dtype)
    weights, grad, *state = leaves_of(case, dtype, "cpu")
    updates, states = [], []
    for particle, vector in enumerate(weights):
        parts = vector.split([parameter.numel() for parameter in rule.parameters()])
        named = {
            name: part.view(parameter.shape)
            for (name, parameter), part in zip(rule.named_parameters(), parts, strict=True)
        }
        entries = {entry: tensor[particle] for entry, tensor in zip(case.state, state, strict=True)}
        update, new_state = functional_call(rule, named, (grad[particle], entries, case.step))
        updates.append(update)
        states.append(new_state)
    stacked = {entry: torch.stack([new_state[entry] for new_state in states]) for entry in case.state}
    return collect(case, [weights, grad, *state], torch.stack(updates), stacked)


@torch.no_grad()
def oracle(case: Case) -> StepResults:
    """Update and new state by the oracle that was written from the papers."""
    found: list[dict[str, Tensor]] = []
    for particle, vector in enumerate(case.meta_parameters):
        torch.nn.utils.vector_to_parameters(vector, case.rule.double().parameters())
        reference = as_reference(case.rule)
        for entry, tensor in case.state.items():
            setattr(reference, entry, tensor[particle].numpy())
        reference.steps_taken = int(case.step) - 1
        update = torch.from_numpy(reference.step(case.grad[particle].numpy()))
        found.append({"update": update, **{e: torch.from_numpy(getattr(reference, e)) for e in case.state}})
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}
