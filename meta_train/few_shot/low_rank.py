r"""Gradient descent on perceptrons without forming the adapted weights.

The gradient of a linear layer's weights on n examples is a product of two thin matrices, :math:`D^\top A`, of the
gradients at its outputs and of its inputs. So after steps with the rate :math:`\alpha` on examples :math:`1, 2, \dots`
the adapted layer maps inputs :math:`X` to

.. math:: X (W - \alpha \textstyle\sum_k D_k^\top A_k)^\top = X W^\top - \alpha \sum_k (X A_k^\top) D_k ,

with one product by the shared :math:`W` for all tasks together. The weights of B tasks, most of the memory and of the
time of MAML on a perceptron, never exist. The result is the same, and differentiable to any order.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from learned_optim.meta_train.few_shot.episodes import Examples
from learned_optim.meta_train.few_shot.learner import Learner

ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.ELU, nn.SiLU, nn.Softplus)


@dataclass
class AdaptedLinear:
    """A linear layer's own weights, and by what they differ from them in each of B tasks."""

    weight: Tensor
    """``(outputs, inputs)``, shared."""
    bias: Tensor
    """``(B, 1, outputs)``"""
    terms: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """A pair for each step: inputs ``(B, n, inputs)``, ``-rate`` times gradients at the outputs ``(B, n, outputs)``."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """``(B, m, inputs)`` to ``(B, m, outputs)``."""
        outputs = inputs @ self.weight.t() + self.bias
        for seen, step in self.terms:
            outputs = outputs + (inputs @ seen.transpose(1, 2)) @ step
        return outputs


@dataclass
class AdaptedNorm:
    """A batch norm's affine parameters in each of B tasks, ``(B, 1, features)``."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, inputs: Tensor) -> Tensor:
        """``(B, m, features)``, normalised over m."""
        centred = inputs - inputs.mean(1, keepdim=True)
        variance = centred.square().mean(1, keepdim=True)  # torch.var_mean takes four times as long over this axis
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias


class LowRankSGD:
    """B perceptrons that gradient descent adapts from a shared starting point.

    Args:
        learner: whose module is one: see :func:`is_perceptron`.
        initial: the starting point ``(N,)``; may require a gradient.
        lr: rate.
        count: B.
    """

    def __init__(self, learner: Learner, initial: Tensor, lr: float, count: int) -> None:
        self.learner, self.lr = learner, lr
        named = learner.named(initial)
        self.layers: list[AdaptedLinear | AdaptedNorm | nn.Module] = []
        # without ``remove_duplicate=False`` an activation that is used twice would come once
        for name, module in learner.skeleton.module.named_modules(remove_duplicate=False):
            if isinstance(module, nn.Linear | nn.BatchNorm1d):
                weight, bias = named[f"module.{name}.weight"], named[f"module.{name}.bias"]
                bias = bias.expand(count, 1, -1)
                if isinstance(module, nn.Linear):
                    self.layers.append(AdaptedLinear(weight, bias))
                else:
                    self.layers.append(AdaptedNorm(weight.expand(count, 1, -1), bias, module.eps))
            elif not isinstance(module, nn.Sequential | nn.Flatten):
                self.layers.append(module)

    def losses(self, batch: Examples) -> Tensor:
        """Losses ``(B,)`` of the learners as they are."""
        return self._pass(batch)[0]

    def step(self, batch: Examples, *, second_derivatives: bool) -> Tensor:
        """Take one inner step; returns the losses ``(B,)`` before it."""
        losses, inputs, outputs = self._pass(batch)
        linears = [layer for layer in self.layers if isinstance(layer, AdaptedLinear)]
        norms = [layer for layer in self.layers if isinstance(layer, AdaptedNorm)]
        wanted = [*outputs, *(norm.weight for norm in norms), *(norm.bias for norm in norms)]
        grads = torch.autograd.grad(losses.sum(), wanted, create_graph=second_derivatives)
        steps = [-self.lr * grad for grad in grads]
        for linear, seen, step in zip(linears, inputs, steps[: len(linears)], strict=True):
            linear.terms.append((seen if second_derivatives else seen.detach(), step))
            linear.bias = linear.bias + step.sum(1, keepdim=True)
        of_norms = steps[len(linears) :]
        for norm, weight, bias in zip(norms, of_norms[: len(norms)], of_norms[len(norms) :], strict=True):
            norm.weight, norm.bias = norm.weight + weight, norm.bias + bias
        return losses

    def _pass(self, batch: Examples) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Losses, and of each linear layer what goes in and what comes out."""
        signal, targets = batch[0].flatten(2), batch[1]
        inputs, outputs = [], []
        for layer in self.layers:
            if isinstance(layer, AdaptedLinear):
                inputs.append(signal)
            signal = layer(signal)
            if isinstance(layer, AdaptedLinear):
                outputs.append(signal)
        return self.learner.few_shot.losses(signal, targets), inputs, outputs


def is_perceptron(module: nn.Module) -> bool:
    """Whether a module is a sequence of linear layers, batch norms and functions of single values.

    Each layer has weights of its own, all of them trained, and computes what its class says: no sub-class, whose
    ``forward`` may do anything, and nothing that overwrites the outputs of the layer before it.
    """
    if type(module) is not nn.Sequential or not all(_is_known(layer) for layer in module):
        return False
    # ``module`` may hold a layer twice, or two layers the same weights.
    parameters = [parameter for layer in module for parameter in layer.parameters()]
    return len(set(parameters)) == len(parameters) and all(parameter.requires_grad for parameter in parameters)


def _is_known(layer: nn.Module) -> bool:
    if type(layer) in (nn.Linear, nn.BatchNorm1d):
        return dict(layer.named_parameters()).keys() == {"weight", "bias"}
    if type(layer) is nn.Flatten:
        return (layer.start_dim, layer.end_dim) == (1, -1)
    return type(layer) in ELEMENTWISE and not getattr(layer, "inplace", False)


def applies(learner: Learner, inputs: Tensor) -> bool:
    """Whether the learner, on ``inputs`` ``(B, n, ...)``, is one for :class:`LowRankSGD`."""
    module = learner.skeleton.module
    if not isinstance(module, nn.Module) or not is_perceptron(module):
        return False
    return inputs.dim() == 3 or isinstance(next(module.children(), None), nn.Flatten)


def is_cheaper(learner: Learner, rank: int) -> bool:
    """Whether :class:`LowRankSGD` is the faster way, where it applies.

    ``rank``: examples of all inner steps together. Up to twice as many multiplications still pay: the weights of every
    task would be written and read some ten times, as gradients, updates and results.
    """
    shapes = [layer.weight.shape for layer in learner.skeleton.modules() if isinstance(layer, nn.Linear)]
    thin = sum(rank * (rows + columns) for rows, columns in shapes)
    return thin < 2 * sum(rows * columns for rows, columns in shapes)
