"""The error of a float32 result that roundings alone explain, by Monte Carlo arithmetic.

A tolerance that is taken from another float32 path depends on that path's luck, which changes with the processor. Here
the mathematics runs in float64, and what each operation returns is off by a random relative error as large as float32's
roundings (Parker 1997, Monte Carlo Arithmetic; Higham & Mary 2019, A New Approach to Probabilistic Rounding Error
Analysis). The spread of such runs is, element by element, the error that the arithmetic explains: roundings along
the path, their magnitudes, and cancellation. It is the same on every machine.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

EPSILON = torch.finfo(torch.float32).eps
aten = torch.ops.aten
EXACT = {aten.neg, aten.abs, aten.clamp, aten.where, aten.cat, aten.stack, aten.clone, aten._to_copy, aten.sgn}
EXACT |= {aten.remainder}
"""Operations that do not round."""
COMPOSED: dict[Any, Callable[..., Tensor]] = {
    aten.lerp.Scalar: lambda start, end, weight: start + weight * (end - start),
    aten.lerp.Tensor: lambda start, end, weight: start + weight * (end - start),
    aten.tanh_backward.default: lambda grad, output: grad * (1 - output * output),
    aten.sigmoid_backward.default: lambda grad, output: grad * ((1 - output) * output),
}
"""Operations that round more than once."""

Results = Mapping[str, Tensor]


class RandomRounding(TorchDispatchMode):
    """Adds errors as large as the roundings of float32, uniform and independent, to results in float64.

    A sum of n terms, in products of matrices too, rounds n partial sums. Added one after the other, the mean square of
    those is half the terms' sum of squares where signs are random, and a third of the total's where they are one sign;
    both are taken, so that no order of the terms is further off.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSED:
            with self:
                return COMPOSED[func](*args, **kwargs)
        result = func(*args, **kwargs)
        if func.is_view or func._schema.is_mutable or func.overloadpacket in EXACT:
            return result
        if func is aten.mm.default:
            result = self._summed(result, args[0].square() @ args[1].square(), args[0].shape[1])
        elif func.overloadpacket is aten.sum:
            squares = func(args[0].square(), *args[1:], **kwargs)
            result = self._summed(result, squares, args[0].numel() // max(1, result.numel()))
        return tree_map_only(Tensor, self._rounded, result)

    def _summed(self, total: Tensor, sum_of_squares: Tensor, terms: int) -> Tensor:
        partial = (terms * (sum_of_squares / 2 + total.square() / 3)).sqrt()
        return total + partial * self._noise(total)

    def _rounded(self, value: Tensor) -> Tensor:
        return value + value * self._noise(value) if value.dtype == torch.float64 else value

    def _noise(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).uniform_(-EPSILON / 2, EPSILON / 2, generator=self.generator)


def spread(compute: Callable[[], Results], draws: int = 8) -> dict[str, Tensor]:
    """Root mean square error that roundings bring to each element of the results, and no less than one at its end.

    Args:
        compute: results by name, computed in float64.
        draws: runs of it; some deviations are drawn too small, of eight seldom by more than half.
    """
    exact = compute()
    squares = {name: torch.zeros_like(value) for name, value in exact.items()}
    for draw in range(draws):
        with RandomRounding(draw):
            found = compute()
        for name, value in exact.items():
            squares[name] += (found[name] - value).square() / draws
    return {name: torch.maximum(squares[name].sqrt(), EPSILON / 4 * value.abs()) for name, value in exact.items()}


TYPICAL = 2.0
"""Bound on the root mean square of errors in units of the spread: 1 for independent roundings. Seen: up to 0.8 on the
plain path and in C, 1.2 in Triton's interpreter, whose exponential (NumPy's) is right to 2.5 last places only."""
LARGEST = 16.0
"""Bound on a single error in the same units: 8 is seen among ten thousand. It finds a few wrong elements among many
right ones: a remainder, a branch, a bound."""
OF_KERNELS = 1.5
"""Roundings of a kernel for each one of the plain path: quotients are products with reciprocals, and gates quotients of
exponentials."""
GATED = ("hidden", "cell", "d_hidden", "d_cell")


def assert_only_rounded(
    found: Results, truth: Results, spreads: Results, stored: Results | None = None, roundings: float = 1.0
) -> None:
    """Every result is as near to the truth as the roundings of float32 explain.

    Args:
        found: results by name.
        truth: the results in float64.
        spreads: errors that :func:`spread` returns.
        stored: name -> error that storing the result in a coarser dtype may add.
        roundings: number of roundings of this implementation for each one of the path that the spread was taken on.
    """
    for name, expected in truth.items():
        apart = (found[name].double() - expected).abs()
        assert apart.shape == spreads[name].shape, name
        assert apart.isfinite().all(), name
        if apart.numel() == 0:
            continue
        if stored and name in stored:
            apart = (apart - stored[name]).clamp(min=0)
        allowed = roundings * spreads[name] + torch.finfo(torch.float32).tiny  # below, numbers lose digits
        if name in GATED:
            # Gates are right to roundings of 1, not of their own size: a tanh is (1 - e) / (1 + e), and e is cut.
            allowed += EPSILON / 8 * expected.square().mean().sqrt()
        relative = apart / allowed
        largest, typical = relative.max().item(), relative.square().mean().sqrt().item()
        assert largest <= LARGEST, f"{name}: an error of {largest:.1f} times what roundings explain"
        if apart.numel() >= 32:  # a mean of few says no more than the largest
            assert typical <= TYPICAL, f"{name}: errors of {typical:.2f} times what roundings explain"
