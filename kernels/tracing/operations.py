"""Lowering of torch's elementwise operations to operations of a program."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch

from learned_optim.kernels.tracing.program import Constant, Scalar

aten = torch.ops.aten


class Tracer(Protocol):
    """The recorder of a program's operations."""

    def apply(self, name: str, *operands: Scalar | float) -> Scalar:
        """The result of an operation."""


def _same(name: str) -> Callable[..., Scalar]:
    return lambda tracer, *operands: tracer.apply(name, *operands)


def _sum_of(tracer: Tracer, one: Scalar, other: Scalar, alpha: float = 1) -> Scalar:
    return tracer.apply("add", one, other if alpha == 1 else tracer.apply("mul", other, alpha))


def _difference(tracer: Tracer, one: Scalar, other: Scalar, alpha: float = 1) -> Scalar:
    return tracer.apply("sub", one, other if alpha == 1 else tracer.apply("mul", other, alpha))


def _power(tracer: Tracer, base: Scalar, exponent: Scalar | float) -> Scalar:
    """A constant to some power is an exponential; of others, squares and roots are what kernels do best."""
    if exponent == 2 or exponent == Constant(2.0):
        return tracer.apply("mul", base, base)
    if exponent == 0.5 or exponent == Constant(0.5):
        return tracer.apply("sqrt", base)
    number = base.value if isinstance(base, Constant) else base
    if isinstance(number, int | float) and number > 0:
        return tracer.apply("exp", tracer.apply("mul", exponent, math.log(number)))
    return tracer.apply("pow", base, exponent)


def _clamp(tracer: Tracer, value: Scalar, low: Scalar | None = None, high: Scalar | None = None) -> Scalar:
    """Clamp a value; NaN stays NaN, as it is the first operand."""
    if low is not None:
        value = tracer.apply("maximum", value, low)
    return value if high is None else tracer.apply("minimum", value, high)


def _lerp(tracer: Tracer, start: Scalar, end: Scalar, weight: Scalar) -> Scalar:
    return tracer.apply("add", start, tracer.apply("mul", weight, tracer.apply("sub", end, start)))


def _log1p(tracer: Tracer, x: Scalar) -> Scalar:
    """log(1 + x) without cancellation: the quotient restores what ``1 + x`` loses (Higham 2002, section 1.14.1)."""
    more = tracer.apply("add", x, 1.0)
    quotient = tracer.apply("div", tracer.apply("mul", tracer.apply("log", more), x), tracer.apply("sub", more, 1.0))
    return tracer.apply("where", tracer.apply("eq", more, 1.0), x, quotient)


LOWERINGS: dict[Any, Callable[..., Scalar]] = {
    aten.log1p.default: _log1p,
    **{
        getattr(aten, name).default: _same(name)
        for name in (
            "abs",
            "cos",
            "erf",
            "exp",
            "expm1",
            "log",
            "neg",
            "reciprocal",
            "relu",
            "rsqrt",
            "sigmoid",
            "sign",
            "sin",
            "sqrt",
            "tanh",
        )
    },
    **{
        getattr(getattr(aten, name), kind): _same(name)
        for name in ("eq", "ge", "gt", "le", "lt", "ne")
        for kind in ("Scalar", "Tensor")
    },
    **{getattr(torch.ops.prims, name).default: _same(name) for name in ("eq", "ge", "gt", "le", "lt", "ne")},
    aten.add.Tensor: _sum_of,
    aten.add.Scalar: _sum_of,
    aten.sub.Tensor: _difference,
    aten.sub.Scalar: _difference,
    aten.rsub.Scalar: lambda tracer, one, other, alpha=1: _difference(tracer, other, one, alpha),
    aten.mul.Tensor: _same("mul"),
    aten.mul.Scalar: _same("mul"),
    aten.div.Tensor: _same("div"),
    aten.div.Scalar: _same("div"),
    aten.remainder.Scalar: _same("remainder"),
    aten.remainder.Tensor: _same("remainder"),
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Tensor_Tensor: _power,
    aten.pow.Scalar: _power,
    aten.sgn.default: _same("sign"),
    aten.addcmul.default: lambda tracer, start, one, other, value=1: tracer.apply(
        "add", start, tracer.apply("mul", tracer.apply("mul", one, other), value)
    ),
    aten.addcdiv.default: lambda tracer, start, one, other, value=1: tracer.apply(
        "add", start, tracer.apply("mul", tracer.apply("div", one, other), value)
    ),
    aten.where.ScalarOther: _same("where"),
    aten.where.ScalarSelf: _same("where"),
    aten.where.Scalar: _same("where"),
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
"""The operations of torch that a kernel can compute, lowered to operations of a program."""
