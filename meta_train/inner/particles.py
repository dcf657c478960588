"""One rule with many sets of meta-parameters, which advance together."""

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from learned_optim.rules import Conditions, RuleState, UpdateRule


def flat_meta_parameters(rule: UpdateRule) -> Tensor:
    """The meta-parameters as one vector, ``(M,)``, without a graph; the counterpart of :func:`as_meta_grads`."""
    return torch.cat([parameter.detach().flatten() for parameter in rule.parameters()])


def as_meta_grads(rule: UpdateRule, vector: Tensor) -> tuple[Tensor, ...]:
    """A vector ``(M,)`` cut into one tensor for each of the rule's parameters."""
    sizes = [parameter.numel() for parameter in rule.parameters()]
    parts = zip(vector.split(sizes), rule.parameters(), strict=True)
    return tuple(part.view(parameter.shape).to(parameter.dtype) for part, parameter in parts)


class ParticleRule:
    """A rule as P particles: applied to ``(P, ...)`` with meta-parameters of each one's own, in batched products.

    Args:
        rule: gives architecture; its own meta-parameters are not used.
        meta_parameters: ``(P, M)``, each row as from :func:`flat_meta_parameters`. May require a gradient.
    """

    def __init__(self, rule: UpdateRule, meta_parameters: Tensor) -> None:
        self.rule, self.meta_parameters = rule, meta_parameters
        self.uses_conditions = rule.uses_conditions
        named = dict(rule.named_parameters())
        parts = meta_parameters.split([parameter.numel() for parameter in named.values()], dim=1)
        self.stacked = {
            name: part.view(-1, *parameter.shape) for (name, parameter), part in zip(named.items(), parts, strict=True)
        }
        self.particles = len(meta_parameters)

    def __call__(
        self, grad: Tensor, state: RuleState, step: Tensor, conditions: Conditions | None = None
    ) -> tuple[Tensor, RuleState]:
        """:meth:`UpdateRule.forward` of every particle, differentiable.

        Args:
            grad: ``(P, *coordinates)``.
            state: entries of shape ``(P, features, *coordinates)``.
            step: 0-d.
            conditions: the parameter of every particle, ``(P, *coordinates)``, or a number; for a rule that uses them.

        Returns:
            Updates and new states, shaped as these.
        """
        given = () if conditions is None or not self.uses_conditions else tuple(conditions)
        dims = [0 if isinstance(value, Tensor) and value.dim() > 0 else None for value in given]
        forward = vmap(self._forward, in_dims=(0, 0, 0, None, *dims))
        result: tuple[Tensor, RuleState] = forward(self.stacked, grad, state, step, *given)
        return result

    def _forward(
        self, meta_parameters: dict[str, Tensor], grad: Tensor, state: RuleState, step: Tensor, *given: Tensor | float
    ) -> tuple[Tensor, RuleState]:
        arguments = grad, state, step, *([Conditions(*given)] if given else [])
        result: tuple[Tensor, RuleState] = functional_call(self.rule, meta_parameters, arguments)
        return result
