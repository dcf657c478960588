"""The part of a rule that depends on its weights alone: recorded once, run again for other weights."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only


class Place(NamedTuple):
    """A placeholder for a tensor in a recorded call."""

    number: int


class Call(NamedTuple):
    """One operation, with places for tensors."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    results: list[int]


class Prologue:
    """Operations of torch that compute the weights of a program from meta-parameters.

    Args:
        parameters: meta-parameters, in the order of the arguments of a call.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.calls: list[Call] = []
        self.numbers: dict[int, int] = {}
        self.tensors: list[Tensor] = []
        self.parameters = len(parameters)
        self.held: dict[int, Tensor] = {}
        """Tensors that are neither parameters nor made from them."""
        self.results: dict[tuple[int, bool], int] = {}
        """Number of a tensor, and whether it is transposed -> place among the results."""
        self.shapes: tuple[tuple[int, ...], ...] = ()
        for parameter in parameters:
            self.keep(parameter)
        self.follows = set(range(len(parameters)))
        """Numbers of tensors that depend on a parameter; others are constants."""

    def keep(self, tensor: Tensor) -> int:
        """The number of a tensor."""
        if id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return self.numbers[id(tensor)]

    def record(self, function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any], result: Any) -> None:
        """Record an operation on weights."""

        def place(tensor: Tensor) -> Place:
            if id(tensor) not in self.numbers:
                self.held[self.keep(tensor)] = tensor
            return Place(self.keep(tensor))

        positional, named = tree_map_only(Tensor, place, (tuple(arguments), dict(keywords)))
        results = [self.keep(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.calls.append(Call(function, positional, named, results))
        used = {leaf.number for leaf in _leaves(positional, named) if isinstance(leaf, Place)}
        if used & self.follows:
            self.follows |= set(results)

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on weights alone, or is a constant that has been recorded."""
        return id(tensor) in self.numbers

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on no weight."""
        return self.numbers.get(id(tensor)) not in self.follows

    def result(self, tensor: Tensor, *, transposed: bool = False) -> int:
        """The place of a tensor among the results."""
        if id(tensor) not in self.numbers:
            self.held[self.keep(tensor)] = tensor
        key = self.keep(tensor), transposed
        if key not in self.results:
            self.results[key] = len(self.results)
            self.shapes = (*self.shapes, tuple((tensor.T if transposed else tensor).shape))
        return self.results[key]

    def finish(self) -> None:
        """Drop the operations that no result needs, and the tensors of the recording."""
        needed = {number for number, _ in self.results}
        kept = []
        for call in reversed(self.calls):
            if needed & set(call.results):
                kept.append(call)
                needed |= {leaf.number for leaf in _leaves(call.arguments, call.keywords) if isinstance(leaf, Place)}
        self.calls = kept[::-1]
        self.held = {number: tensor for number, tensor in self.held.items() if number in needed}
        self.tensors, self.numbers = [], {}

    def __repr__(self) -> str:
        """A text of everything that it computes, the same in every process."""
        held = {number: tensor.tolist() for number, tensor in self.held.items()}
        return f"{self.calls} {held} {self.results}"

    def __call__(self, *parameters: Tensor) -> list[Tensor]:
        """The results for these meta-parameters, on their device and in their dtype."""
        like = parameters[0]
        values = dict(enumerate(parameters[: self.parameters]))
        values |= {number: tensor.to(like) for number, tensor in self.held.items()}

        def value(leaf: Any) -> Any:
            return values[leaf.number] if isinstance(leaf, Place) else leaf

        for function, arguments, keywords, results in self.calls:
            keywords = {key: like.device if key == "device" else kept for key, kept in keywords.items()}
            filled = tree_map(value, (arguments, keywords), is_leaf=lambda leaf: isinstance(leaf, Place))
            made = function(*filled[0], **filled[1])
            values |= dict(zip(results, tree_leaves(made), strict=True))
        return [values[number].T if transposed else values[number] for number, transposed in self.results]


def _leaves(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Any]:
    return tree_leaves((arguments, keywords), is_leaf=lambda leaf: isinstance(leaf, Place))
