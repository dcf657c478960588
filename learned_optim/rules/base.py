"""The interface of update rules: one pure, differentiable function of gradient history."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

RuleState = dict[str, Tensor]
"""The memory of a rule: for each entry, a tensor ``(features, *coordinates)``."""

RuleSettings = Mapping[str, int | float | str | tuple[float, ...]]
"""Keyword arguments that rebuild a rule's architecture; they travel with its weights."""


class Conditions(NamedTuple):
    """Inputs of a step beside gradients and state. The defaults are those of a rule that is called by itself."""

    parameter: Tensor | float = 0.0
    """Values before the step, over their tensor's :meth:`UpdateRule.tensor_scale`, of the shape of the gradient. Zero
    for vectors and scalars, and wherever the user has turned the rule's own weight decay off."""
    lr: Tensor | float = 1.0
    """The user's factor on the rate of learning, positive: 1 unless a scheduler changes it. 0-d."""
    progress: Tensor | float = 0.0
    """Fraction of the training that is done, above 0 and below 1; 0 if its length is unknown. 0-d."""
    averaging: Tensor | float = 1.0
    """1, or 0 where the parameters are to follow the latest iterate, not an average of all. 0-d."""


NO_CONDITIONS = Conditions()
"""The conditions of a rule that is called by itself: no weight decay, lr 1, unknown length, averaging."""


class UpdateRule(nn.Module, ABC):
    """A learned function from the gradient history of a coordinate to its update.

    A rule is *coordinatewise*: the update of a coordinate depends on that coordinate's own gradients, on the step
    count and on nothing else; with :attr:`uses_conditions` also on the coordinate's value and on what holds for all.
    It therefore commutes with concatenating and sharding parameters. A matrix may have a factor on all its updates,
    which is found once, before training: :meth:`tensor_scale`. But for that, a rule commutes with flattening too.

    Memory is feature-major: ``grad`` has any shape ``coordinates``; each entry of the state has the shape
    ``(features, *coordinates)``. Sub-classes keep no state of their own besides their weights, the meta-parameters.
    """

    name: ClassVar[str]
    """Name of the architecture in files and configurations."""
    recurrent_state: ClassVar[frozenset[str]] = frozenset({"hidden", "cell"})
    """Entries of the state that may be kept in less than float32: activations, not long averages."""
    recurrent_dtype: ClassVar[torch.dtype] = torch.float32
    """Dtype in which an optimizer keeps these entries, unless the user chooses another."""
    uses_conditions: ClassVar[bool] = False
    """Whether :meth:`forward` takes :class:`Conditions` as a fourth argument. Such a rule multiplies its moves by
    ``conditions.lr`` itself; the updates of others are multiplied by the learning rate afterwards."""

    @property
    @abstractmethod
    def settings(self) -> RuleSettings:
        """Keyword arguments that build this architecture again."""

    @property
    @abstractmethod
    def state_features(self) -> Mapping[str, int]:
        """Number of features of each entry of the state."""

    @abstractmethod
    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        """One step for every coordinate.

        Args:
            grad: gradient, shape ``coordinates``, in the dtype of the meta-parameters.
            state: entries of shape ``(features, *coordinates)``; any floating dtype.
            step: count of this step, 1 for the first; broadcasts against ``grad``.

        Returns:
            The update, to be *added* to the parameter, shape ``coordinates``; and the new state, in the dtype of the
            meta-parameters.
        """

    def forward_under(
        self, conditions: Conditions, grad: Tensor, state: RuleState, step: Tensor
    ) -> tuple[Tensor, RuleState]:
        """Call :meth:`forward`, with the conditions of the step if the rule uses them."""
        result: tuple[Tensor, RuleState] = self(grad, state, step, *condition_arguments(self, conditions))
        return result

    def tensor_scale(self, shape: Sequence[int], initial_rms: Tensor) -> Tensor | None:
        """A constant factor on the updates of a matrix; None for a rule that does not scale tensors.

        Only a rule whose updates do not depend on the scale of gradients may override it: meta-training changes the
        unit of the parameters instead. It is not called for vectors and scalars, whose factor is 1. The factor must
        not depend on the rule's weights. A rule that overrides it has no entry ``"scale"`` in its state: optimizers
        keep the factor under this name.

        Args:
            shape: the parameter's, with two or more dimensions.
            initial_rms: root mean square of the parameter's values before the first step; 0-d, or one value for each of
                several tensors.

        Returns:
            The positive factor, of the shape of ``initial_rms``.
        """
        return None

    @property
    def uses_tensor_scale(self) -> bool:
        """Whether the rule overrides :meth:`tensor_scale`."""
        return type(self).tensor_scale is not UpdateRule.tensor_scale

    @abstractmethod
    def reset_parameters(self, seed: int) -> None:
        """Draw fresh meta-parameters, independent of torch's global random state."""

    def pruned(self) -> "UpdateRule":
        """A rule with the same updates that computes and keeps less; this one itself, if there is none.

        An optimizer runs it. It has the same :attr:`name`, and its parameters are copies.
        """
        return self

    def init_state(
        self, coordinates: tuple[int, ...], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> RuleState:
        """The state before the first step: all zeros, shape ``(features, *coordinates)`` each."""
        return {
            entry: torch.zeros((features, *coordinates), device=device, dtype=dtype)
            for entry, features in self.state_features.items()
        }

    def extra_repr(self) -> str:
        """The architecture's settings, as in the constructor call."""
        return ", ".join(f"{key}={value!r}" for key, value in self.settings.items())


def condition_arguments(rule: object, conditions: Conditions) -> tuple[Conditions, ...]:
    """The conditions as the last arguments of a call: one for a rule that uses conditions, none for another."""
    return (conditions,) if getattr(rule, "uses_conditions", False) else ()


def linear(weight: Tensor, inputs: Tensor) -> Tensor:
    """Apply ``weight`` ``(out, in)`` to feature-major ``inputs`` ``(in, *coordinates)``: ``(out, *coordinates)``."""
    coordinates = inputs.shape[1:]
    flat = inputs.reshape(inputs.shape[0], math.prod(coordinates))
    return (weight @ flat).reshape(weight.shape[0], *coordinates)


def truncated_normal_(parameter: Tensor, deviation: float, generator: torch.Generator) -> None:
    """Fill ``parameter``, on whatever device, with normal numbers cut at two deviations, drawn on the CPU."""
    if parameter.is_meta:
        return  # only shapes are wanted; they may be anything
    values = torch.empty(parameter.shape, device="cpu")
    nn.init.trunc_normal_(values, 0.0, deviation, -2 * deviation, 2 * deviation, generator=generator)
    parameter.copy_(values)


def per_feature(values: Tensor, like: Tensor) -> Tensor:
    """Shape ``values`` ``(features,)`` to broadcast against ``(features, *like.shape)``."""
    return values.reshape(-1, *([1] * like.dim()))
