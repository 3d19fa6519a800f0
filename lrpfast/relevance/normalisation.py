"""Batch norm that could not be folded; layer, group, instance and RMS norm (RULES §3).

The normaliser is held constant. What is left is ``y = w (x - mean(x)) / σ + b``, which is linear in x, and ε is its rule:
``R_x = x * Jᵀ(R_y / S(y))`` with ``Jᵀ t = u - mean(u)`` and ``u = w t / σ``.
"""

from __future__ import annotations

import torch
from torch import fx

from lrpfast.canonical import batch_norm_affine
from lrpfast.errors import UnsupportedOperationError
from lrpfast.graph import argument, describe, operation_name, rank, static_sizes, value
from lrpfast.kinds import NORMS
from lrpfast.relevance.gradient import vector_jacobian_product
from lrpfast.relevance.walk import Message, Walk, propagates
from lrpfast.rules import Epsilon, Gradient, Pass, Rule

aten = torch.ops.aten


@propagates("batch_norm")
def _batch_norm(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
    """``y = ax + c``: Pass by default, as where it is folded it has no rule of its own."""
    x = node.args[0]
    if rule is None or isinstance(rule, Pass):
        walk.send(x, message)
        return
    tensors = [None if a is None else walk.build.tensor(a) for a in node.args[1:5]]
    scale, _ = batch_norm_affine(tensors, node.args[7])
    shaped = scale.to(value(x).dtype).reshape(-1, *[1] * (rank(x) - 2))
    factor = walk.constant(shaped, "batch_norm_scale")
    if isinstance(rule, Gradient):
        walk.send(x, Message((walk.call(aten.mul.Tensor, walk.relevance(message), factor),)))
        return
    assert isinstance(rule, Epsilon)
    ratio = walk.output_ratio(message, node, rule.epsilon)
    walk.send(x, Message((walk.call(aten.mul.Tensor, ratio, factor),), x))


@propagates(*NORMS)
def _norm(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
    if isinstance(rule, Gradient):
        vector_jacobian_product(walk, node, message)
        return
    if isinstance(rule, Pass):
        walk.send(node.args[0], message)
        return
    epsilon = rule.epsilon if isinstance(rule, Epsilon) else Epsilon().epsilon
    x = node.args[0]
    ratio = walk.output_ratio(message, node, epsilon)
    walk.notes[node] = "normaliser constant, ε"
    walk.send(x, Message((_transpose(walk, node, ratio),), x))


def _transpose(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    """``Jᵀ t`` with σ constant."""
    x, name = node.args[0], operation_name(node)
    weight, eps, groups, dims = _parameters(walk, node)
    u = t if weight is None else walk.call(aten.mul.Tensor, t, weight)
    shape = walk.build.shape(x)
    if groups is not None:
        grouped = [shape[0], groups, value(x).shape[1] // groups, *shape[2:]]
        x, u = (walk.call(aten.reshape.default, v, grouped) for v in (x, u))
    centred = name != "rms_norm"
    u = walk.call(aten.mul.Tensor, u, _inverse_deviation(walk, x, dims, eps, centred))
    if centred:
        u = walk.call(aten.sub.Tensor, u, walk.call(aten.mean.dim, u, dims, True))
    return u if groups is None else walk.call(aten.reshape.default, u, shape)


def _inverse_deviation(walk: Walk, x: fx.Node, dims: list[int], eps: float, centred: bool) -> fx.Node:
    if centred:
        x = walk.call(aten.sub.Tensor, x, walk.call(aten.mean.dim, x, dims, True))
    square = walk.call(aten.mean.dim, walk.call(aten.mul.Tensor, x, x), dims, True)
    return walk.call(aten.rsqrt.default, walk.call(aten.add.Tensor, square, eps))


def _parameters(walk: Walk, node: fx.Node) -> tuple[fx.Node | None, float, int | None, list[int]]:
    """Weight as it broadcasts against the input, eps, number of groups (None: no grouping), normalised dimensions."""
    name, x = operation_name(node), node.args[0]
    dims = rank(x)
    if name in ("layer_norm", "rms_norm"):
        normalised = list(argument(node, 1, "normalized_shape"))
        eps = argument(node, 4, "eps", 1e-5) if name == "layer_norm" else argument(node, 3, "eps")
        if eps is None:
            eps = torch.finfo(value(x).dtype).eps
        return argument(node, 2, "weight"), eps, None, list(range(dims - len(normalised), dims))
    channels = static_sizes(x, [1])[0]
    if name == "group_norm":
        groups, weight, eps = node.args[1], argument(node, 2, "weight"), argument(node, 4, "eps", 1e-5)
    else:
        if not argument(node, 5, "use_input_stats", True):
            raise UnsupportedOperationError(f"{describe(node)} uses running statistics, for which there is no rule")
        groups, weight, eps = channels, argument(node, 1, "weight"), argument(node, 7, "eps", 1e-5)
    return _per_channel(walk, weight, dims), eps, groups, list(range(2, dims + 1))


def _per_channel(walk: Walk, weight: fx.Node | None, dims: int) -> fx.Node | None:
    if weight is None:
        return None
    return walk.call(aten.reshape.default, weight, [-1, *[1] * (dims - 2)])
