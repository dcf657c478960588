"""A step of a rule as a differentiable function of gradient, state and weights: what meta-training needs on a GPU.

Out of place, in float32, for P *particles* with weights of their own in one launch. For the backward pass nothing is
kept but arguments and results; gates are computed again. Triton is imported by the first launch, not before.
"""

import functools
import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from learned_optim.kernels import launch
from learned_optim.kernels.sources import package_of_kind

Constants = Mapping[str, int | float | tuple[float, ...]]
UNROLLED_UNITS = 8
"""A layer of at most so many units is one straight piece of code; larger ones loop over their units."""

BLOCK = 128
"""Coordinates of a program of the forward pass, and of the first launch of the backward pass."""
ROWS = 16
"""Deltas that a program of the second launch takes: as many sums of a lane share the load of a signal."""
LANES = 32
"""Coordinates that it takes at a time."""
SPAN = 1024
"""Coordinates that it sums over: its sums then cost less to add up than to make; fewer are more programs."""
INTERPRETED_BLOCK = 1024
"""Coordinates of every program in the interpreter, whose time goes by operations."""


class Network(NamedTuple):
    """Sizes of a rule's network, from the constants of its kernels."""

    context: int
    """Inputs that all coordinates share."""
    inputs: int
    hidden: int
    layers: int
    outputs: int

    @property
    def deltas(self) -> int:
        """Gates of all layers, and outputs."""
        return 4 * self.hidden * self.layers + self.outputs


def network(architecture: str, constants: Constants) -> Network:
    """The network of a rule.

    Args:
        architecture: its name.
        constants: of its kernels.
    """
    hidden = int(constants["HIDDEN"])  # type: ignore[arg-type]
    if architecture == "lstm-l2l":
        return Network(0, 2, hidden, int(constants["LAYERS"]), 1)  # type: ignore[arg-type]
    momenta = len(constants["MOMENTUM_DECAYS"])  # type: ignore[arg-type]
    inputs, outputs = (momenta + 5, 3) if architecture == "schedule-free-lstm" else (momenta + 2, momenta + 2)
    return Network(len(constants["TIME_SCALES"]), inputs, hidden, 1, outputs)  # type: ignore[arg-type]


def sizes(file: str, hidden_size: int, *, interpreted: bool) -> dict[str, int]:
    """Constexpr arguments that divide the work of the kernels of a file.

    One coordinate a thread: in meta-training there are few, and the backward pass has no registers for more.
    """
    block = {"BLOCK": INTERPRETED_BLOCK if interpreted else BLOCK}
    if file == "backward":
        return block
    return block | {"UNITS": hidden_size if hidden_size <= UNROLLED_UNITS else 1}


INPUTS, OLD_HIDDEN, NEW_HIDDEN = range(3)
"""Signals that deltas are multiplied with, numbered as in ``weight_gradients.py``."""


class Product(NamedTuple):
    """Deltas times signals: a part of the weights' gradients, summed up by programs of the second launch."""

    source: int
    """Of the signals: ``INPUTS``, ``OLD_HIDDEN`` or ``NEW_HIDDEN``."""
    layer: int
    """Of the hidden state."""
    first: int
    """First row of the deltas: the gates layer by layer, four a unit, and then the outputs."""
    rows: int
    """At most ``ROWS``."""


def products(net: Network) -> list[Product]:
    """All that are needed: for the gates of each layer its inputs and its old hidden state; for the outputs the new."""
    found = []
    for layer in range(net.layers):
        for first, rows in _blocks(4 * net.hidden, layer * 4 * net.hidden):
            below = Product(NEW_HIDDEN, layer - 1, first, rows) if layer else Product(INPUTS, 0, first, rows)
            found += [below, Product(OLD_HIDDEN, layer, first, rows)]
    last = _blocks(net.outputs, net.layers * 4 * net.hidden)
    return found + [Product(NEW_HIDDEN, net.layers - 1, first, rows) for first, rows in last]


def _blocks(count: int, first: int) -> list[tuple[int, int]]:
    """Start and length of the blocks of at most ``ROWS`` that ``count`` rows from ``first`` are divided into."""
    return [(first + start, min(ROWS, count - start)) for start in range(0, count, ROWS)]


def columns(net: Network) -> int:
    """Bias, context and the most signals that a product has."""
    return 1 + net.context + max(net.inputs, net.hidden)


def places_of_weights(net: Network) -> list[int]:
    """Where the gradient of each weight, in the kernels' order, lies in the sums ``(products, columns, ROWS)``."""
    where = {}  # (row of the deltas, of the old hidden state?) -> place of its first column
    for number, product in enumerate(products(net)):
        for row in range(product.rows):
            where[product.first + row, product.source == OLD_HIDDEN] = number * columns(net) * ROWS + row
    places = []
    for unit in range(net.layers * net.hidden):
        inputs = net.inputs if unit < net.hidden else net.hidden
        signals = [(False, column) for column in range(1 + net.context + inputs)]
        signals += [(True, 1 + net.context + column) for column in range(net.hidden)]
        places += [where[4 * unit + gate, old] + column * ROWS for old, column in signals for gate in range(4)]
    outputs = [where[4 * net.layers * net.hidden + output, False] for output in range(net.outputs)]
    for column in [0, *range(1 + net.context, 1 + net.context + net.hidden)]:
        places += [start + column * ROWS for start in outputs]
    return places


@functools.cache
def _tables(net: Network, device: torch.device) -> tuple[Tensor, Tensor]:
    """Products ``(number, 4)`` and places of the weights, on the device."""
    rows = torch.tensor(products(net), dtype=torch.int32)
    return rows.to(device), torch.tensor(places_of_weights(net)).to(device)


class Rule(NamedTuple):
    """A rule as its kernels take it, without its weights."""

    architecture: str
    constants: Constants
    """Values of the kernels' constexpr arguments of the rule."""
    entries: tuple[str, ...]
    """Names of the entries of the state, in the kernels' order."""


def step(
    rule: Rule, weights: Tensor, grad: Tensor, state: Sequence[Tensor], count: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step of P particles: update ``(P, C)`` and new state, all float32; differentiable once.

    Args:
        rule: of all particles.
        weights: ``(P, M)``, in the kernels' order. Rows an even number of values apart are not copied.
        grad: ``(P, C)``.
        state: entries of shape ``(P, features, C)``, in the kernels' order.
        count: of this step, 0-d, on the device; no gradient flows to it.

    Raises:
        RuntimeError: when the result is differentiated twice.
    """
    tensors = [tensor.to(torch.float32).contiguous() for tensor in (grad, *state)]
    weights = with_aligned_rows(weights.to(torch.float32))
    update, *new_state = _Step.apply(rule, weights, count.to(torch.float32), *tensors)  # type: ignore[no-untyped-call]
    return update, tuple(new_state)


def with_aligned_rows(weights: Tensor) -> Tensor:
    """The same ``(P, M)`` in memory where every row begins at a multiple of 8 bytes: kernels load weights in pairs."""
    if weights.stride() == (weights.stride(0), 1) and weights.stride(0) % 2 == 0 and weights.data_ptr() % 8 == 0:
        return weights
    count = weights.shape[1]
    return torch.nn.functional.pad(weights, (0, count % 2 or 2))[:, :count]


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Rule, weights: Tensor, count: Tensor, grad: Tensor, *state: Tensor) -> Any:
        update, new_state = torch.empty_like(grad), [torch.empty_like(entry) for entry in state]
        _launch(
            "forward",
            rule,
            weights,
            {"step": count, "grad": grad, "update": update} | _named(rule, "", state) | _named(rule, "new_", new_state),
        )
        ctx.rule = rule
        ctx.save_for_backward(weights, count, grad, *state, new_state[rule.entries.index("hidden")])
        return update, *new_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_update: Tensor, *d_new_state: Tensor) -> Any:
        rule, (weights, count, grad, *state, new_hidden) = ctx.rule, ctx.saved_tensors
        net = network(rule.architecture, rule.constants)
        particles, coordinates = grad.shape
        d_grad = torch.empty_like(grad) if ctx.needs_input_grad[3] else None
        d_state = [torch.empty_like(entry) for entry in state]
        inputs = grad.new_empty(particles, net.inputs, coordinates)
        deltas = grad.new_empty(particles, net.deltas, coordinates)
        tensors = {"step": count, "grad": grad, "new_hidden": new_hidden, "inputs": inputs, "deltas": deltas}
        tensors |= _named(rule, "", state) | _named(rule, "d_", d_state)
        tensors |= _named(rule, "d_new_", [entry.contiguous() for entry in d_new_state])
        _launch("backward", rule, weights, {**tensors, "d_update": d_update.contiguous(), "d_grad": d_grad})
        d_weights = _weight_gradients(rule, tensors) if ctx.needs_input_grad[1] else None
        return None, d_weights, None, d_grad, *d_state


KERNELS = {
    "schedule-free-lstm": "schedule_free_lstm",
    "scale-free-lstm": "scale_free_lstm",
    "lstm-l2l": "lstm_l2l",
}
"""What the names of the kernels of the architectures begin with, in ``forward.py`` and ``backward.py``."""


def _named(rule: Rule, prefix: str, state: Sequence[Tensor]) -> dict[str, Tensor]:
    return {prefix + entry: tensor for entry, tensor in zip(rule.entries, state, strict=True)}


def _launch(file: str, rule: Rule, weights: Tensor, tensors: Mapping[str, Tensor | None]) -> None:
    """Launch the rule's kernel of a file: one program for each block of each particle's coordinates."""
    grad = tensors["grad"]
    assert grad is not None  # for the type checker
    particles, coordinates = grad.shape
    if grad.numel() == 0:
        return
    hidden_size = int(rule.constants["HIDDEN"])  # type: ignore[arg-type]
    chosen = sizes(file, hidden_size, interpreted=launch.interpreting())
    kernel = getattr(kernels(file), f"{KERNELS[rule.architecture]}_{file}")
    with launch.device_guard(grad.device):
        kernel[(-(-coordinates // chosen["BLOCK"]), particles)](
            weights=weights,
            **tensors,
            coordinates=coordinates,
            weights_stride=weights.stride(0),
            **rule.constants,
            **chosen,
            num_warps=launch.WARPS,
            **launch.OPTIONS,
        )


def _weight_gradients(rule: Rule, tensors: dict[str, Tensor]) -> Tensor:
    """Gradients of the weights ``(P, M)``: partial sums by the kernel, added up in a fixed order."""
    net = network(rule.architecture, rule.constants)
    deltas = tensors["deltas"]
    table, places = _tables(net, deltas.device)
    particles, _, coordinates = deltas.shape
    if deltas.numel() == 0:
        return deltas.new_zeros(particles, len(places))
    shape = -(-coordinates // SPAN), particles, len(table)
    partial_sums = deltas.new_empty(*shape, columns(net) * ROWS)
    with launch.device_guard(deltas.device):
        kernels("weight_gradients").weight_gradients[shape](
            table,
            *(tensors[name] for name in ("step", "deltas", "inputs", "hidden", "new_hidden")),
            partial_sums,
            coordinates,
            **weight_constants(rule, interpreted=launch.interpreting()),
            num_warps=launch.WARPS,
            **launch.OPTIONS,
        )
    return partial_sums.sum(0).flatten(1)[:, places]


def weight_constants(rule: Rule, *, interpreted: bool) -> dict[str, Any]:
    """Constexpr arguments of the kernel that sums up the weights' gradients."""
    net = network(rule.architecture, rule.constants)
    return {
        "TIME_SCALES": rule.constants.get("TIME_SCALES", ()),
        "ROWS_OF_DELTAS": net.deltas,
        "INPUTS": net.inputs,
        "HIDDEN": net.hidden,
        "LAYERS": net.layers,
        "COLUMNS": columns(net),
        "SPAN": SPAN,
        "ROWS": ROWS,
        "BLOCK": INTERPRETED_BLOCK if interpreted else LANES,
    }


def kernels(file: str) -> ModuleType:
    """The kernels of a file; with ``TRITON_INTERPRET=1`` in the environment, as Triton's interpreter runs them."""
    return load_kernels(launch.interpreting(), file)


@functools.cache
def load_kernels(interpreted: bool, file: str) -> ModuleType:
    """The kernels to be compiled or interpreted: Triton decides when it decorates, so that each kind is a copy."""
    return importlib.import_module(f"{package_of_kind(interpreted)}.{file}")
