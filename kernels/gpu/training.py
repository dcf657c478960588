"""The step of a rule as a differentiable function of gradient, state and weights, for meta-training on a GPU.

It works out of place and in float32, for P *particles* with weights of their own in one launch. For the backward pass
only the arguments are kept; the rest is computed again. Large products are computed by torch. Triton is imported by the
first launch, not before.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from learned_optim.kernels.devices import interpreting
from learned_optim.kernels.gpu.launch import OPTIONS, WARPS, device_guard
from learned_optim.kernels.gpu.modules import module_of
from learned_optim.kernels.gpu.shared import Shared
from learned_optim.kernels.sources.registry import registered
from learned_optim.kernels.sources.segments import Segment, segments
from learned_optim.kernels.sources.triton import arguments_of, segments_source
from learned_optim.kernels.tracing.derivative import SIGNALS, Derivative, derivative
from learned_optim.kernels.tracing.program import PARAMETER_INPUT, Program
from learned_optim.kernels.tracing.simplify import simplified

TRAINING_BLOCK = 128
"""Coordinates of a program: one for each thread, as in meta-training there are few."""
INTERPRETED_BLOCK = 1024
"""Coordinates of a program in the interpreter, whose time is proportional to the number of operations."""


class Pass:
    """One direction of a step: kernels for its segments, and torch's products between them.

    Args:
        program: a program without shared operations.
        title: the first line of the source.
    """

    def __init__(self, program: Program, title: str) -> None:
        self.program = program
        self.segments, self.features = segments(program)
        self.text = segments_source(self.segments, title)
        sizes = list(map(math.prod, program.shapes))
        self.starts = [sum(sizes[:tensor]) for tensor in range(len(sizes))]

    def __call__(self, weights: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of the program by name, ``(P, features, C)`` each.

        Args:
            weights: ``(P, W)``, contiguous.
            inputs: tensors of shape ``(P, features, C)``, contiguous.
        """
        like = next(iter(inputs.values()))
        particles, _, coordinates = like.shape
        tensors = dict(inputs)
        for name, features in self.features.items():
            if not name.startswith("rows"):
                tensors[name] = like.new_empty(particles, features, coordinates)
        for number, segment in enumerate(self.segments):
            if like.numel() > 0:
                self._launch(number, segment, weights, tensors)
            for product, operation in segment.products:
                start, width = self.starts[operation.matrix], len(operation.operands)
                matrix = weights[:, start : start + operation.outputs * width]
                if operation.transposed:
                    matrix = matrix.view(particles, width, operation.outputs).mT
                else:
                    matrix = matrix.view(particles, operation.outputs, width)
                tensors[f"rows{product}"] = matrix @ tensors[f"inputs{product}"]
        return {name: tensors[name] for name in self.program.outputs}

    def _launch(self, number: int, segment: Segment, weights: Tensor, tensors: Mapping[str, Tensor]) -> None:
        if not segment.stores:
            return
        particles, _, coordinates = next(iter(tensors.values())).shape
        block = INTERPRETED_BLOCK if interpreting() else TRAINING_BLOCK
        kernel = getattr(module_of(self.text, interpreting()), f"segment{number}")
        with device_guard(weights.device):
            kernel[(-(-coordinates // block), particles)](
                **{f"{name}_state": tensors[name] for name in arguments_of(segment)},
                weights=weights,
                size=coordinates,
                weights_stride=weights.stride(0),
                BLOCK=block,
                num_warps=WARPS,
                **OPTIONS,
            )


class TrainingStep:
    """The step of a rule's architecture in meta-training; weights are an argument.

    Args:
        program: the program as it was traced.
        name: name of the rule, for its sources.
    """

    def __init__(self, program: Program, name: str) -> None:
        self.program = program
        plain = simplified(program, short_cuts=False)
        self.entries = tuple(program.features)
        self.inputs = ("grad", *([PARAMETER_INPUT] if program.reads_parameter else []), *self.entries)
        self.prologue = program.prologue
        self.shared = Shared(plain)
        coordinates = self.shared.for_coordinates()
        results = {name if name == "update" else f"new_{name}": kept for name, kept in coordinates.outputs.items()}
        coordinates = replace(coordinates, outputs=results)
        self.forward = Pass(simplified(coordinates), f"The step of {name} in training")
        self.derivative: Derivative = derivative(coordinates)
        self.backward = Pass(self.derivative.program, f"The backward pass of {name}")

    def weights(self, parameters: Sequence[Tensor]) -> Tensor:
        """The weights that the program reads, ``(P, W)``, computed by its prologue; differentiable.

        Args:
            parameters: meta-parameters of all particles, ``(P, *shape)`` each.
        """

        def flat(*of_particle: Tensor) -> Tensor:
            results = self.prologue(*of_particle)
            return torch.cat([of_particle[0].new_empty(0), *(result.reshape(-1) for result in results)])

        found: Tensor = torch.func.vmap(flat)(*parameters)
        return found

    def __call__(
        self,
        weights: Tensor,
        grad: Tensor,
        state: Sequence[Tensor],
        given: Sequence[Tensor | float],
        parameter: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step of P particles: update ``(P, C)`` and new state, all float32; differentiable once.

        Args:
            weights: the result of :meth:`weights`, float32.
            grad: ``(P, C)``.
            state: entries of shape ``(P, features, C)``, in the program's order.
            given: a number for each of ``program.SHARED_INPUTS``, or 0-d tensors; no gradient flows to them.
            parameter: ``(P, C)``; None for a program that does not read it.

        Raises:
            RuntimeError: when the result is differentiated twice.
        """
        own = [grad] if parameter is None else [grad, parameter]
        tensors = [tensor.to(torch.float32).contiguous() for tensor in (*(t[:, None] for t in own), *state)]
        weights = self.shared(weights.to(torch.float32), given).contiguous()
        update, *new_state = _TrainingFunction.apply(self, weights, *tensors)  # type: ignore[no-untyped-call]
        return update[:, 0], tuple(new_state)

    def weight_gradients(self, signals: Tensor, weights: Tensor) -> Tensor:
        """Gradients of the weights ``(P, W)``, from the signals ``(P, features, C)`` of the backward pass."""
        found, starts = torch.zeros_like(weights), self.backward.starts
        for gradient in self.derivative.matrices:
            product = signals[:, list(gradient.deltas)] @ signals[:, list(gradient.inputs)].mT
            flat = (product.mT if gradient.transposed else product).flatten(1)
            start = starts[gradient.matrix]
            found[:, start : start + flat.shape[1]] += flat
        if self.derivative.weights:
            places = [starts[weight.tensor] + weight.place for weight in self.derivative.weights]
            index = torch.tensor(places, device=weights.device)
            found.index_add_(1, index, signals.sum(-1)[:, list(self.derivative.weights.values())])
        return found


class _TrainingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: TrainingStep, weights: Tensor, *tensors: Tensor) -> Any:
        inputs = dict(zip(step.inputs, tensors, strict=True))
        outputs = step.forward(weights, inputs)
        ctx.step = step
        ctx.save_for_backward(weights, *tensors)
        return outputs["update"], *(outputs[f"new_{entry}"] for entry in step.entries)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_update: Tensor, *d_new_state: Tensor) -> Any:
        step, (weights, *tensors) = ctx.step, ctx.saved_tensors
        inputs = {**dict(zip(step.inputs, tensors, strict=True)), "d_update": d_update.contiguous()}
        inputs |= {f"d_new_{entry}": d.contiguous() for entry, d in zip(step.entries, d_new_state, strict=True)}
        found = step.backward(weights, inputs)
        d_weights = step.weight_gradients(found[SIGNALS], weights) if ctx.needs_input_grad[1] else None
        return None, d_weights, *(found[f"d_{name}"] for name in step.inputs)


@functools.cache
def training_step_of(key: str) -> TrainingStep:
    """The step of a registered program."""
    sources = registered(key)
    return TrainingStep(sources.traced, sources.name)
