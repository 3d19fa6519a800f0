"""Canonical forms of what computes values one by one: sums, products, activations, casts, and tensors that are filled."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lrpfast.canonical.handlers import handles
from lrpfast.graph import Builder, argument, is_tensor, normalise_dim, operation_name, rank, static_sizes, value

aten = torch.ops.aten

_ALIASES = {"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div"}


@handles(*_ALIASES)
def _alias(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    packet = getattr(aten, _ALIASES[operation_name(node)])
    return builder.call(getattr(packet, node.target._overloadname), *args, **kwargs)


@handles("glu")
def _glu(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """One half gates the other."""
    x, dim = args[0], normalise_dim(argument(node, 1, "dim", -1), rank(args[0]))
    half = static_sizes(x, [dim])[0] // 2
    signal, gate = (builder.call(aten.slice.Tensor, x, dim, start, start + half) for start in (0, half))
    return builder.call(aten.mul.Tensor, signal, builder.call(aten.sigmoid.default, gate))


@handles("neg", "rsub")
def _negation(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """``-x`` is a product with a constant, ``c - x`` a sum with that."""
    if operation_name(node) == "neg":
        return builder.call(aten.mul.Tensor, args[0], -1.0)
    negated = builder.call(aten.mul.Tensor, args[0], -argument(node, 2, "alpha", 1))
    return builder.call(aten.add.Tensor, negated, args[1])


@handles("clamp_min", "clamp", "threshold", "hardtanh", "relu6", "maximum")
def _clamps(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """The several ways to write a ReLU become ``relu``; ``relu6`` becomes ``hardtanh(0, 6)``."""
    name = operation_name(node)
    bounds = [argument(node, 1, "min"), argument(node, 2, "max")]
    numbers = [b for b in bounds if not isinstance(b, fx.Node)]
    if name == "relu6":
        return builder.call(aten.hardtanh.default, args[0], 0.0, 6.0)
    if name == "clamp" and len(numbers) == 2 and bounds[0] == 0 and bounds[1] is not None:
        return builder.call(aten.hardtanh.default, args[0], 0.0, float(bounds[1]))
    is_relu = {
        "clamp_min": len(numbers) == 2 and bounds[0] == 0,
        "clamp": len(numbers) == 2 and bounds[0] == 0 and bounds[1] is None,
        "threshold": len(args) == 3 and args[1] == 0 and args[2] == 0,
    }.get(name, False)
    if is_relu:
        return builder.call(aten.relu.default, args[0])
    return builder.call(node.target, *args, **kwargs)


@handles("to", "_to_copy", "to_copy", "type_as")
def _to(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """A cast between floating-point types is left out: the program has one precision. One to the type of another value takes
    nothing else of that."""
    if is_tensor(args[0]) and value(args[0]).is_floating_point() and node.meta["val"].is_floating_point():
        return args[0]
    if len(args) > 1 and is_tensor(args[1]):
        other = value(args[1])
        return builder.call(aten.to.device, args[0], other.device, other.dtype)
    return builder.call(node.target, *args, **kwargs)


_FILLS = {"zeros": 0, "ones": 1, "full": None}


@handles(*(name for kind in _FILLS for name in (f"{kind}_like", f"new_{kind}")))
def _filled(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """A value that takes shape or dtype from another takes nothing else: no relevance reaches that other through it."""
    name, x = operation_name(node), args[0]
    like = name.endswith("_like")
    fill = _FILLS[name.removesuffix("_like").removeprefix("new_")]
    if fill is None:
        fill = argument(node, 1 if like else 2, "fill_value")
    dtype, device = kwargs.get("dtype") or value(x).dtype, kwargs.get("device") or value(x).device
    shape = builder.shape(x) if like else args[1]
    return builder.call(aten.full.default, shape, fill, dtype=dtype, device=device)
