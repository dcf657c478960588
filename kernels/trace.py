"""From a rule's ``forward`` to the program of one coordinate.

The function is traced for three coordinates. Every tensor of the trace is then followed element by element: an element
is a scalar of the program and the coordinate that it belongs to. Views, stacks and splits are run by torch itself, on
tensors of codes; elementary operations and matrix products become operations of the program. Elements of different
coordinates that meet show that the function is not coordinatewise.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from learned_optim.kernels.program import (
    STEP,
    Constant,
    Elementwise,
    Input,
    Operation,
    Product,
    Program,
    Result,
    Scalar,
    Weight,
)

COORDINATES = 3
"""Coordinates that are traced: of each element it is seen which it belongs to."""
ALL = COORDINATES
"""The coordinate of what is equal for all."""
BASE = COORDINATES + 1
"""An element's code is this times the number of its scalar, plus its coordinate."""

aten = torch.ops.aten
BOOKKEEPING = {
    aten.alias.default, aten.cat.default, aten.clone.default, aten.detach.default, aten.expand.default,
    aten.permute.default, aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default,
    aten.squeeze.default, aten.squeeze.dim, aten.stack.default, aten.t.default, aten.transpose.int,
    aten.unbind.int, aten.unsqueeze.default, aten.view.default, aten._unsafe_view.default, aten.reshape.default,
    operator.getitem,
}  # fmt: skip
"""Operations that move elements and compute nothing."""
SUMS = {aten.sum.dim_IntList, aten.sum.default}


class NotCoordinatewiseError(ValueError):
    """A function mixes coordinates, or computes what a kernel does not know."""


def trace(
    forward: Callable[..., tuple[Tensor, Mapping[str, Tensor]]],
    parameters: Mapping[str, Tensor],
    features: Mapping[str, int],
) -> Program:
    """The program of one coordinate.

    Args:
        forward: from meta-parameters, gradient, state and step count to update and new state, as
            :meth:`UpdateRule.forward` with :func:`torch.func.functional_call`.
        parameters: meta-parameters; only shapes and dtype matter.
        features: of each entry of the state.

    Raises:
        NotCoordinatewiseError: coordinates meet, or an operation is not known.
    """
    dtype = next(iter(parameters.values())).dtype
    grad = torch.ones(COORDINATES, dtype=dtype)
    state = {entry: torch.ones(count, COORDINATES, dtype=dtype) for entry, count in features.items()}

    def in_order(*arguments: Any) -> list[Tensor]:
        update, new_state = forward(*arguments)
        return [update, *(new_state[entry] for entry in features)]

    made = make_fx(in_order, record_stack_traces=True)(dict(parameters), grad, state, torch.ones((), dtype=dtype))
    return _Tracer(made, len(parameters), features).program()


class _Tracer:
    """Follows the elements of a traced graph, node by node."""

    def __init__(self, module: fx.GraphModule, parameters: int, features: Mapping[str, int]) -> None:
        self.module, self.graph = module, module.graph
        self.features = features
        self.scalars: list[Scalar] = []
        self.codes: dict[Scalar, int] = {}
        self.operations: dict[Operation, int] = {}
        self.weights: dict[fx.Node, int] = {}
        self.elements: dict[fx.Node, Any] = {}
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.shared = set(placeholders[:parameters])  # what follows from meta-parameters alone
        self.elements[placeholders[-1]] = torch.tensor(self._code(Input(STEP, 0)) * BASE + ALL)
        self.elements[placeholders[parameters]] = self._inputs("grad", ())
        for node, (entry, count) in zip(placeholders[parameters + 1 : -1], features.items(), strict=True):
            self.elements[node] = self._inputs(entry, (count,))

    def program(self) -> Program:
        """Follow all nodes."""
        for node in self.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "get_attr":  # a tensor that the function holds
                node.meta.setdefault("val", getattr(self.module, node.target))
            if node.op == "output":
                names = ["update", *self.features]
                outputs = {name: self._output(leaf) for name, leaf in zip(names, node.args[0], strict=True)}
                shapes = tuple(tuple(weight.meta["val"].shape) for weight in self.weights)
                return Program(self._prologue(), shapes, dict(self.features), tuple(self.operations), outputs)
            if not any(argument in self.elements for argument in node.all_input_nodes):
                self.shared.add(node)
                continue
            self.elements[node] = self._follow(node)
        raise AssertionError("a graph ends with its outputs")

    def _follow(self, node: fx.Node) -> Any:
        """The elements of a node that depends on a coordinate."""
        arguments: Any = fx.map_arg(node.args, self._elements)
        keywords: Any = fx.map_arg(node.kwargs, self._elements)
        target: Any = node.target
        if target in BOOKKEEPING:
            return target(*arguments, **keywords)
        if target is aten.mm.default:
            return self._product(node, arguments)
        if target in SUMS:
            return self._sum(node, *arguments, **keywords)
        if target not in ELEMENTWISE:
            raise self._refusal(node, "is not an operation that a kernel knows")
        return self._elementwise(node, arguments, keywords)

    def _elements(self, node: fx.Node) -> Any:
        """Codes of the elements of a node, in its shape."""
        if node not in self.elements:
            tensor = self._of_prologue(node)
            shape = node.meta["val"].shape
            codes = [self._code(Weight(tensor, place)) for place in range(shape.numel())]
            self.elements[node] = (torch.tensor(codes, dtype=torch.int64) * BASE + ALL).view(shape)
        return self.elements[node]

    def _elementwise(self, node: fx.Node, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Tensor:
        """Operations on elements that belong together."""
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        joined = torch.stack(torch.broadcast_tensors(*tensors))
        made = torch.empty(joined.shape[1:], dtype=torch.int64)
        for place in range(made.numel()):
            column = joined.reshape(len(tensors), -1)[:, place].tolist()
            operands = iter([self.scalars[code // BASE] for code in column])
            mixed = [next(operands) if isinstance(argument, Tensor) else argument for argument in arguments]
            scalar = ELEMENTWISE[node.target](self, *mixed, **keywords)
            made.view(-1)[place] = self._code(scalar) * BASE + self._coordinate(node, column)
        return made

    def _product(self, node: fx.Node, arguments: Sequence[Any]) -> Tensor:
        """A matrix of weights times the features of each coordinate."""
        left: Any
        right: Any
        left, right = node.args
        if left in self.shared and right not in self.shared:
            matrix, codes = self._of_prologue(left), arguments[1]
        elif right in self.shared and left not in self.shared:
            matrix, codes = self._of_prologue(right, transposed=True), arguments[0].T
        else:
            raise self._refusal(node, "multiplies coordinates with one another")
        outputs = left.meta["val"].shape[0] if left in self.shared else right.meta["val"].shape[1]
        made = torch.empty(outputs, codes.shape[1], dtype=torch.int64)
        for column in range(codes.shape[1]):
            entries = codes[:, column].tolist()
            product = Product(matrix, outputs, tuple(self.scalars[code // BASE] for code in entries))
            place = self._place(product)
            coordinate = self._coordinate(node, entries)
            for output in range(outputs):
                made[output, column] = self._code(Result(place, output)) * BASE + coordinate
        return made if left in self.shared else made.T

    def _sum(self, node: fx.Node, codes: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
        """A sum over features."""
        dims = list(range(codes.dim())) if not dims else [dim % codes.dim() for dim in dims]
        kept = [dim for dim in range(codes.dim()) if dim not in dims]
        rows = codes.permute(*kept, *dims).reshape(*(codes.shape[dim] for dim in kept), -1)
        made = torch.empty(rows.shape[:-1], dtype=torch.int64)
        for place, row in enumerate(rows.reshape(-1, rows.shape[-1]).tolist()):
            scalar = self.scalars[row[0] // BASE]
            for code in row[1:]:
                scalar = self.apply("add", scalar, self.scalars[code // BASE])
            made.view(-1)[place] = self._code(scalar) * BASE + self._coordinate(node, row)
        shape = [1 if dim in dims else size for dim, size in enumerate(codes.shape)]
        return made.view(shape) if keepdim else made

    def apply(self, name: str, *operands: "Scalar | float") -> Scalar:
        """The result of an operation; the same one for the same operands."""
        scalars = tuple(Constant(float(o)) if isinstance(o, int | float) else o for o in operands)
        return Result(self._place(Elementwise(name, scalars)))

    def _place(self, operation: Operation) -> int:
        return self.operations.setdefault(operation, len(self.operations))

    def _code(self, scalar: Scalar) -> int:
        if scalar not in self.codes:
            self.codes[scalar] = len(self.scalars)
            self.scalars.append(scalar)
        return self.codes[scalar]

    def _coordinate(self, node: fx.Node, codes: Sequence[int]) -> int:
        """The one that all these elements belong to."""
        coordinates = {code % BASE for code in codes} - {ALL}
        if len(coordinates) > 1:
            raise self._refusal(node, "mixes coordinates")
        return coordinates.pop() if coordinates else ALL

    def _refusal(self, node: fx.Node, reason: str) -> NotCoordinatewiseError:
        lines = [line.strip() for line in (node.stack_trace or "").strip().splitlines()]
        where = f"; traced from {' '.join(lines[-2:])}" if lines else ""
        return NotCoordinatewiseError(f"{node.target} {reason}: a rule must be coordinatewise and elementary{where}")

    def _inputs(self, entry: str, features: tuple[int, ...]) -> Tensor:
        codes = [self._code(Input(entry, feature)) for feature in range(features[0] if features else 1)]
        column = torch.tensor(codes, dtype=torch.int64)[:, None] * BASE + torch.arange(COORDINATES)
        return column if features else column[0]

    def _output(self, node: fx.Node) -> tuple[Scalar, ...]:
        codes = self._elements(node)
        codes = codes.reshape(-1, codes.shape[-1])
        if ((codes % BASE != torch.arange(COORDINATES)) & (codes % BASE != ALL)).any():
            raise self._refusal(node, "puts coordinates into another order")
        return tuple(self.scalars[code // BASE] for code in codes[:, 0].tolist())

    def _of_prologue(self, node: fx.Node, transposed: bool = False) -> int:
        if transposed:
            with self.graph.inserting_after(node):
                value = node.meta["val"].T
                node = self.graph.call_function(aten.t.default, (node,))
                node.meta["val"] = value
            self.shared.add(node)
        return self.weights.setdefault(node, len(self.weights))

    def _prologue(self) -> fx.GraphModule:
        """The part of the graph that follows from meta-parameters alone."""
        prologue = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            if node in self.shared:
                copies[node] = prologue.node_copy(node, copies.__getitem__)
        prologue.output(tuple(copies[node] for node in self.weights))
        prologue.eliminate_dead_code()
        return fx.GraphModule(self.module, prologue)


def _same(name: str) -> Callable[..., Scalar]:
    return lambda tracer, *operands: tracer.apply(name, *operands)


def _sum_of(tracer: _Tracer, one: Scalar, other: Scalar, alpha: float = 1) -> Scalar:
    return tracer.apply("add", one, other if alpha == 1 else tracer.apply("mul", other, alpha))


def _difference(tracer: _Tracer, one: Scalar, other: Scalar, alpha: float = 1) -> Scalar:
    return tracer.apply("sub", one, other if alpha == 1 else tracer.apply("mul", other, alpha))


def _power(tracer: _Tracer, base: Scalar, exponent: float) -> Scalar:
    if exponent == 2:
        return tracer.apply("mul", base, base)
    return tracer.apply("pow", base, exponent)


def _clamp(tracer: _Tracer, value: Scalar, low: Scalar | None = None, high: Scalar | None = None) -> Scalar:
    """NaN stays NaN, as it is the first operand."""
    if low is not None:
        value = tracer.apply("maximum", value, low)
    return value if high is None else tracer.apply("minimum", value, high)


def _lerp(tracer: _Tracer, start: Scalar, end: Scalar, weight: Scalar) -> Scalar:
    return tracer.apply("add", start, tracer.apply("mul", weight, tracer.apply("sub", end, start)))


ELEMENTWISE: dict[Any, Callable[..., Scalar]] = {
    **{
        getattr(aten, name).default: _same(name)
        for name in (
            "abs",
            "exp",
            "expm1",
            "log",
            "neg",
            "reciprocal",
            "relu",
            "rsqrt",
            "sigmoid",
            "sign",
            "sqrt",
            "tanh",
        )
    },
    **{
        getattr(getattr(aten, name), kind): _same(name)
        for name in ("eq", "ge", "gt", "le", "lt")
        for kind in ("Scalar", "Tensor")
    },
    aten.add.Tensor: _sum_of,
    aten.add.Scalar: _sum_of,
    aten.sub.Tensor: _difference,
    aten.sub.Scalar: _difference,
    aten.rsub.Scalar: lambda tracer, one, other, alpha=1: _difference(tracer, other, one, alpha),
    aten.mul.Tensor: _same("mul"),
    aten.mul.Scalar: _same("mul"),
    aten.div.Tensor: _same("div"),
    aten.div.Scalar: _same("div"),
    aten.pow.Tensor_Scalar: _power,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: lambda tracer, value, high: _clamp(tracer, value, None, high),
    aten.maximum.default: _same("maximum"),
    aten.minimum.default: _same("minimum"),
    aten.lerp.Scalar: _lerp,
    aten.lerp.Tensor: _lerp,
    aten.where.self: _same("where"),
    aten._to_copy.default: lambda tracer, value, **_: value,
}
"""What a kernel can compute, in terms of the operations of a program."""
