"""Tracing: a rule's ``forward`` becomes the program of one coordinate.

The function is run once, for three coordinates, and each of torch's operations is recorded. Every tensor is followed
element by element: an element is a scalar of the program and the coordinate that it belongs to. Views, stacks and
splits are run by torch itself, on tensors of codes; elementary operations and matrix products become operations of the
program. Elements of different coordinates that meet show that the function is not coordinatewise.
"""

import linecache
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from learned_optim.kernels.tracing.operations import LOWERINGS
from learned_optim.kernels.tracing.program import (
    PARAMETER_INPUT,
    SHARED_INPUTS,
    Constant,
    Elementwise,
    Input,
    MatrixProduct,
    Operation,
    OperationResult,
    Program,
    Scalar,
    Weight,
)
from learned_optim.kernels.tracing.prologue import Prologue

TRACED_COORDINATES = 3
"""Number of coordinates that are traced, so that each element is known to belong to one of them."""
ALL_COORDINATES = TRACED_COORDINATES
"""The coordinate of elements that are equal for all."""
BASE = TRACED_COORDINATES + 1
"""An element's code is this times the number of its scalar, plus its coordinate."""
HERE, TORCH = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)

aten = torch.ops.aten
BOOKKEEPING = {
    aten.alias.default, aten.cat.default, aten.clone.default, aten.detach.default, aten.expand.default,
    aten.permute.default, aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default,
    aten.squeeze.default, aten.squeeze.dim, aten.stack.default, aten.t.default, aten.transpose.int,
    aten.unbind.int, aten.unsqueeze.default, aten.view.default, aten._unsafe_view.default, aten.reshape.default,
}  # fmt: skip
"""Operations that move elements and compute nothing."""
FILLS = {
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_full.default,
}  # fmt: skip
"""Operations that look at the shape of a tensor alone."""
EXTREMES = {aten.amax.default: "maximum", aten.amin.default: "minimum"}
SUMS = {aten.sum.dim_IntList, aten.sum.default, torch.ops.prims.sum.default}


class NotCoordinatewiseError(ValueError):
    """A function mixes coordinates, or computes what a kernel does not know."""


def trace(
    forward: Callable[..., tuple[Tensor, Mapping[str, Tensor]]],
    parameters: Sequence[Tensor],
    features: Mapping[str, int],
    *,
    conditions: bool = False,
) -> Program:
    """The program of one coordinate.

    Args:
        forward: computes update and new state from gradient, state and step count, as :meth:`UpdateRule.forward`.
        parameters: meta-parameters and buffers that it reads, on the CPU; their values do not matter.
        features: number of features of each entry of the state.
        conditions: whether ``forward`` takes four more arguments: the parameter, lr, progress and averaging.

    Raises:
        NotCoordinatewiseError: coordinates meet, or an operation is not known.
    """
    dtype = parameters[0].dtype if parameters else torch.float32
    grad = torch.ones(TRACED_COORDINATES, dtype=dtype, device="cpu")
    state = {
        entry: torch.ones(count, TRACED_COORDINATES, dtype=dtype, device="cpu") for entry, count in features.items()
    }
    shared = {name: torch.ones((), dtype=dtype, device="cpu") for name in SHARED_INPUTS}
    values = torch.ones(TRACED_COORDINATES, dtype=dtype, device="cpu")
    taken = {*shared, "grad", PARAMETER_INPUT} & {*features}
    if taken:
        raise NotCoordinatewiseError(f"the state has an entry {taken.pop()!r}, which is the name of an input")
    tracer = _Tracer(parameters, state, {"grad": grad, PARAMETER_INPUT: values}, shared)
    step, *others = shared.values()
    with torch.no_grad(), tracer:
        update, new_state = forward(grad, state, step, *([values, *others] if conditions else []))
    return tracer.program({"update": update, **{entry: new_state[entry] for entry in features}})


class _Tracer(TorchDispatchMode):
    """Records the operations of a function, and follows the elements of its tensors."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        state: Mapping[str, Tensor],
        of_coordinates: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.features = {entry: len(tensor) for entry, tensor in state.items()}
        self.prologue = Prologue(weights)
        self.scalars: list[Scalar] = []
        self.codes: dict[Scalar, int] = {}
        self.operations: dict[Operation, int] = {}
        self.notes: list[str] = []
        self.elements: dict[int, Tensor] = {}  # of tensors that a coordinate or the step count has gone into
        self.seen: list[Tensor] = []  # which are kept, so that no other gets their id
        for name, tensor in of_coordinates.items():
            self._bind(tensor, self._inputs(name, ()))
        for entry, tensor in state.items():
            self._bind(tensor, self._inputs(entry, (len(tensor),)))
        for name, tensor in shared.items():
            self._bind(tensor, torch.tensor(self._code(Input(name, 0)) * BASE + ALL_COORDINATES))

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and follow it."""
        keywords = keywords or {}
        result = function(*arguments, **keywords)
        tensors = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
        if not any(id(tensor) in self.elements for tensor in tensors):
            self.prologue.record(function, arguments, keywords, result)
            return result
        if function._schema.is_mutable:
            return self._change(function, arguments, keywords, result)
        if function is aten._local_scalar_dense.default:
            raise self._refusal("a branch or a number", "depends on values of a tensor")
        if function not in KNOWN and (composed := composition(function)) is not None:
            with self:
                made = composed(*arguments, **keywords)
            if made is not None:
                return made
        made = tree_leaves(self._follow(function, arguments, keywords, result))
        for tensor, codes in zip(tree_leaves(result), made, strict=True):
            self._bind(tensor, codes)
        return result

    def _change(self, function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any], result: Tensor) -> Tensor:
        """An operation in place, on a tensor that no other views."""
        target, name = arguments[0], function._opname
        alike = [seen for seen in self.seen if seen.untyped_storage()._cdata == target.untyped_storage()._cdata]
        packet = getattr(aten, name.removesuffix("_"), None)
        if any(seen is not target for seen in alike) or packet is None or id(target) not in self.elements:
            raise self._refusal(function, "changes a tensor in place that others share")
        made = getattr(packet, function._overloadname)
        self._bind(target, self._follow(made, arguments, keywords, result))
        return result

    def program(self, results: Mapping[str, Tensor]) -> Program:
        """The program of everything that was computed."""
        outputs = {name: self._output(tensor) for name, tensor in results.items()}
        shapes = self.prologue.shapes
        self.prologue.finish()
        return Program(self.prologue, shapes, self.features, tuple(self.operations), outputs, tuple(self.notes))

    def _bind(self, tensor: Tensor, codes: Tensor) -> None:
        self.seen.append(tensor)
        self.elements[id(tensor)] = codes

    def _follow(self, function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any], result: Any) -> Any:
        """The elements of a result that depends on a coordinate or the step count."""
        if function is aten.mm.default or function is aten.mv.default:
            return self._product(function, *arguments)
        if function is aten.addmm.default and not keywords:
            return self._elementwise(
                aten.add.Tensor, [self._elements(arguments[0]), self._product(function, *arguments[1:])], {}
            )
        if function in FILLS:
            return self._shared([Constant(float(value)) for value in result.reshape(-1).tolist()], result.shape)
        codes, keyword_codes = tree_map_only(Tensor, self._elements, (tuple(arguments), dict(keywords)))
        if function in BOOKKEEPING:
            with torch._C._DisableTorchDispatch():
                return function(*codes, **keyword_codes)
        if function in SUMS:
            return self._sum(function, "add", *codes, **keyword_codes)
        if function in EXTREMES:
            return self._sum(function, EXTREMES[function], *codes, **keyword_codes)
        if function is aten.mean.dim:
            total = self._sum(function, "add", *codes, **keyword_codes)
            return self._elementwise(aten.mul.Tensor, [total, total.numel() / codes[0].numel()], {})
        if function not in LOWERINGS:
            raise self._refusal(function, "is not an operation that a kernel knows")
        return self._elementwise(function, codes, keyword_codes)

    def _elements(self, tensor: Tensor) -> Tensor:
        """Codes of the elements of a tensor, in its shape."""
        if id(tensor) not in self.elements:
            if self.prologue.is_constant(tensor):
                scalars: list[Scalar] = [Constant(float(value)) for value in tensor.reshape(-1).tolist()]
            else:
                place = self.prologue.result(tensor)
                scalars = [Weight(place, element) for element in range(tensor.numel())]
            return self._shared(scalars, tensor.shape)  # not bound: the tensor stays one of the prologue
        return self.elements[id(tensor)]

    def _shared(self, scalars: Sequence[Scalar], shape: Sequence[int]) -> Tensor:
        """Codes of scalars that are the same for all coordinates."""
        return (torch.tensor(list(map(self._code, scalars)), dtype=torch.int64) * BASE + ALL_COORDINATES).view(
            tuple(shape)
        )

    def _elementwise(self, function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Tensor:
        """Operations on elements that belong together."""
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        joined = torch.stack(torch.broadcast_tensors(*tensors))
        made = torch.empty(joined.shape[1:], dtype=torch.int64)
        for place in range(made.numel()):
            column = joined.reshape(len(tensors), -1)[:, place].tolist()
            operands = iter([self.scalars[code // BASE] for code in column])
            mixed = [next(operands) if isinstance(argument, Tensor) else argument for argument in arguments]
            scalar = LOWERINGS[function](self, *mixed, **keywords)
            made.view(-1)[place] = self._code(scalar) * BASE + self._coordinate(function, column)
        return made

    def _product(self, function: Any, left: Tensor, right: Tensor) -> Tensor:
        """A matrix of weights times the features of each coordinate."""
        of_weights = [self.prologue.knows(tensor) for tensor in (left, right)]
        if of_weights == [True, False]:
            matrix, codes = self.prologue.result(left), self._elements(right)
        elif of_weights == [False, True] and right.dim() == 2:
            matrix, codes = self.prologue.result(right, transposed=True), self._elements(left).T
        else:
            raise self._refusal(function, "multiplies coordinates with one another")
        columns = codes if codes.dim() == 2 else codes[:, None]
        outputs = self.prologue.shapes[matrix][0]
        made = torch.empty(outputs, columns.shape[1], dtype=torch.int64)
        for column in range(columns.shape[1]):
            entries = columns[:, column].tolist()
            product = MatrixProduct(matrix, outputs, tuple(self.scalars[code // BASE] for code in entries))
            place = self._place(product)
            coordinate = self._coordinate(function, entries)
            for output in range(outputs):
                made[output, column] = self._code(OperationResult(place, output)) * BASE + coordinate
        if codes.dim() == 1:
            return made[:, 0]
        return made if of_weights[0] else made.T

    def _sum(
        self,
        function: Any,
        by: str,
        codes: Tensor,
        dims: Sequence[int] | None = None,
        keepdim: bool = False,
        **_: Any,
    ) -> Tensor:
        """A sum over features, or their largest or smallest."""
        dims = list(range(codes.dim())) if not dims else [dim % codes.dim() for dim in dims]
        kept = [dim for dim in range(codes.dim()) if dim not in dims]
        rows = codes.permute(*kept, *dims).reshape(*(codes.shape[dim] for dim in kept), -1)
        made = torch.empty(rows.shape[:-1], dtype=torch.int64)
        for place, row in enumerate(rows.reshape(-1, rows.shape[-1]).tolist()):
            scalar = self.scalars[row[0] // BASE]
            for code in row[1:]:
                scalar = self.apply(by, scalar, self.scalars[code // BASE])
            made.view(-1)[place] = self._code(scalar) * BASE + self._coordinate(function, row)
        shape = [1 if dim in dims else size for dim, size in enumerate(codes.shape)]
        return made.view(shape) if keepdim else made

    def apply(self, name: str, *operands: "Scalar | float") -> Scalar:
        """The result of an operation; the same one for the same operands."""
        scalars = tuple(Constant(float(o)) if isinstance(o, int | float) else o for o in operands)
        return OperationResult(self._place(Elementwise(name, scalars)))

    def _place(self, operation: Operation) -> int:
        if operation not in self.operations:
            self.operations[operation] = len(self.operations)
            self.notes.append(line_of_the_rule())
        return self.operations[operation]

    def _code(self, scalar: Scalar) -> int:
        if scalar not in self.codes:
            self.codes[scalar] = len(self.scalars)
            self.scalars.append(scalar)
        return self.codes[scalar]

    def _coordinate(self, function: Any, codes: Sequence[int]) -> int:
        """The coordinate that all these elements belong to."""
        coordinates = {code % BASE for code in codes} - {ALL_COORDINATES}
        if len(coordinates) > 1:
            raise self._refusal(function, "mixes coordinates")
        return coordinates.pop() if coordinates else ALL_COORDINATES

    def _refusal(self, function: Any, reason: str) -> NotCoordinatewiseError:
        line = line_of_the_rule()
        where = f" (in `{line}`)" if line else ""
        return NotCoordinatewiseError(f"{function}{where} {reason}: a rule must be coordinatewise and elementary")

    def _inputs(self, entry: str, features: tuple[int, ...]) -> Tensor:
        codes = [self._code(Input(entry, feature)) for feature in range(features[0] if features else 1)]
        column = torch.tensor(codes, dtype=torch.int64)[:, None] * BASE + torch.arange(TRACED_COORDINATES)
        return column if features else column[0]

    def _output(self, tensor: Tensor) -> tuple[Scalar, ...]:
        codes = self._elements(tensor)
        if codes.shape[-1:] != (TRACED_COORDINATES,):
            raise NotCoordinatewiseError(f"a result has the shape {tuple(codes.shape)}, not one of the coordinates")
        codes = codes.reshape(-1, TRACED_COORDINATES)
        if ((codes % BASE != torch.arange(TRACED_COORDINATES)) & (codes % BASE != ALL_COORDINATES)).any():
            raise self._refusal("the result", "puts coordinates into another order")
        return tuple(self.scalars[code // BASE] for code in codes[:, 0].tolist())


def line_of_the_rule() -> str:
    """The line of source outside torch and this folder that is being run; empty if there is none."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((HERE, TORCH)):
        frame = frame.f_back  # type: ignore[assignment]
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() if frame is not None else ""


KNOWN = {*LOWERINGS, *BOOKKEEPING, *FILLS, *SUMS, *EXTREMES, aten.mean.dim, aten.mm.default, aten.mv.default}
KNOWN |= {aten.addmm.default}


def composition(function: Any) -> Callable[..., Any] | None:
    """Torch's decomposition of an operation; None if it is elementary."""
    from torch._decomp import decomposition_table  # takes a while

    if function is aten.bmm.default:
        return lambda left, right: (left[0] @ right[0])[None] if len(left) == 1 else None
    if function._can_decompose():
        whole: Callable[..., Any] = function.decompose
        return whole
    found: Callable[..., Any] | None = decomposition_table.get(function)
    return found
