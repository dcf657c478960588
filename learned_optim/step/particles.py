"""The step of rules in meta-training, by kernels: many particles in compiled C, or differentiable on a GPU."""

import torch
from torch import Tensor

from learned_optim.kernels.cpu.kernel import kernel
from learned_optim.kernels.cpu.launch import launch_particles
from learned_optim.kernels.gpu.training import TrainingStep, training_step_of
from learned_optim.kernels.sources.registry import Sources
from learned_optim.rules import NO_CONDITIONS, Conditions, RuleState, UpdateRule
from learned_optim.step.modes import without_autocast
from learned_optim.step.programs import flat_weights, sources_of


def training_step(rule: UpdateRule) -> TrainingStep:
    """The step of a rule as a differentiable function of weights, gradient and state.

    Args:
        rule: one that :func:`~learned_optim.step.programs.unsupported_reason` does not refuse; only its architecture
            matters.
    """
    sources = sources_of(rule, torch.float32)
    assert isinstance(sources, Sources), sources
    return training_step_of(sources.key)


class ParticleStep:
    """A step in place of P rules of one architecture, on a CPU, by compiled C: each steps coordinates of its own.

    Args:
        rule: any rule of the architecture that :func:`~learned_optim.step.programs.unsupported_reason` does not refuse.
        meta_parameters: ``(P, M)``, float32.

    Raises:
        CompilationError: the C compiler failed.
    """

    def __init__(self, rule: UpdateRule, meta_parameters: Tensor) -> None:
        sources = sources_of(rule, torch.float32)
        assert isinstance(sources, Sources), sources
        shapes = [parameter.shape for parameter in rule.parameters()]
        order = torch.tensor(sources.c.weights, dtype=torch.int64)

        def weights_of(row: Tensor) -> Tensor:
            parts = row.split([shape.numel() for shape in shapes])
            parameters = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            return flat_weights(sources.traced, [*parameters, *rule.buffers()])[order]

        self.entries = tuple(rule.state_features)
        with without_autocast(meta_parameters.device):
            self.weights = torch.func.vmap(weights_of)(meta_parameters.detach()).contiguous()
        self.kernel = kernel(sources.key, (torch.float32,) * (2 + len(self.entries)))

    def __call__(
        self, parameters: Tensor, grad: Tensor, state: RuleState, step: Tensor, conditions: Conditions = NO_CONDITIONS
    ) -> None:
        """Overwrite ``parameters`` and ``state``.

        Args:
            parameters: ``(P, *coordinates)``, float32 and contiguous.
            grad: ``(P, *coordinates)``, with any strides.
            state: entries of shape ``(P, features, *coordinates)``, float32 and contiguous.
            step: 0-d.
            conditions: lr, progress and averaging as the rule gets them. In place of the parameter stands 1 where the
                rule gets its value and 0 where it gets zero: 0-d, or one number for each of a particle's coordinates.
        """
        grad, step = grad.contiguous(), step.to(torch.float32)
        sees_parameter = torch.as_tensor(conditions.parameter, dtype=torch.float32)
        sees_parameter = (
            sees_parameter.expand(parameters.shape[1:]).contiguous() if sees_parameter.dim() else sees_parameter
        )
        entries = [state[entry] for entry in self.entries]
        numbers = [float(number) for number in conditions[1:]]
        launch_particles(self.kernel, self.weights, parameters, grad, entries, step, sees_parameter, numbers)
