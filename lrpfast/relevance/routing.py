"""Operations that only move values: relevance goes back the way the values came.

Every output of these is one of the inputs (or a constant), so a message in ratio form, too, is routed as it is: ``R_x = Σ y q
= x Σ q`` over the places that ``x`` went to. Each function below is the transpose of its operation, on one tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from lrpfast.errors import UnsupportedOperationError
from lrpfast.graph import argument, describe, normalise_dim, rank, same_sizes, value
from lrpfast.relevance.pooling import apply_transposed, spatial_matrices
from lrpfast.relevance.walk import Message, Walk, propagates
from lrpfast.rules import Rule

aten = torch.ops.aten

Transpose = Callable[[Walk, fx.Node, fx.Node], fx.Node]


def _routes(*names: str) -> Callable[[Transpose], Transpose]:
    """Register the transpose of an operation whose first argument is what it moves."""

    def register(transpose: Transpose) -> Transpose:
        @propagates(*names)
        def propagate(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
            own = message.carrier is node
            tensor = walk.single(message) if own else walk.relevance(message)
            walk.send(node.args[0], Message((transpose(walk, node, tensor),), node.args[0] if own else None))

        return transpose

    return register


@propagates("getitem")
def _getitem(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
    """A result of an operation with several: its propagator takes the message."""
    walk.send(node.args[0], message)


@_routes("reshape", "squeeze", "unsqueeze")
def _reshape(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    return walk.call(aten.reshape.default, t, walk.build.shape(node.args[0]))


@_routes("permute")
def _permute(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    order = [normalise_dim(d, rank(node)) for d in node.args[1]]
    return walk.call(aten.permute.default, t, [order.index(d) for d in range(len(order))])


@_routes("flip")
def _flip(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    return walk.call(aten.flip.default, t, node.args[1])


@_routes("roll")
def _roll(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    return walk.call(aten.roll.default, t, [-s for s in node.args[1]], argument(node, 2, "dims", []))


@_routes("slice")
def _slice(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    x = node.args[0]
    dim = normalise_dim(argument(node, 1, "dim", 0), rank(x))
    start, step = argument(node, 2, "start") or 0, argument(node, 4, "step", 1)
    size = value(x).shape[dim]
    if not isinstance(size, int) or isinstance(start, fx.Node):
        if step == 1 and start == 0 and same_sizes([value(node).shape[dim]], [size]):
            return t
        raise UnsupportedOperationError(f"{describe(node)} cuts the batch; explain the samples one by one instead")
    start = max(start + size, 0) if start < 0 else min(start, size)
    length = value(node).shape[dim]
    if step == 1:
        return _pad_dim(walk, t, dim, start, size - start - length)
    zeros = walk.call(aten.zeros_like.default, x)
    return walk.call(aten.slice_scatter.default, zeros, t, dim, start, size, step)


def _pad_dim(walk: Walk, t: fx.Node, dim: int, before: int, after: int) -> fx.Node:
    if before == after == 0:
        return t
    return walk.call(aten.constant_pad_nd.default, t, [0, 0] * (rank(t) - 1 - dim) + [before, after], 0.0)


@_routes("select")
def _select(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    x, dim, index = node.args
    dim = normalise_dim(dim, rank(x))
    size = value(x).shape[dim]
    if not isinstance(size, int):
        raise UnsupportedOperationError(f"{describe(node)} picks a sample of the batch; explain the samples instead")
    index = normalise_dim(index, size)
    return _pad_dim(walk, walk.call(aten.unsqueeze.default, t, dim), dim, index, size - 1 - index)


@_routes("expand")
def _expand(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    return walk.sum_to(t, node.args[0])


@_routes("repeat")
def _repeat(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    x, counts = node.args
    lead = len(counts) - rank(x)
    shape = [1] * lead + walk.build.shape(x)
    split = [s for count, size in zip(counts, shape, strict=True) for s in (count, size)]
    tiles = walk.call(aten.reshape.default, t, split)
    total = walk.call(aten.sum.dim_IntList, tiles, list(range(0, len(split), 2)), False)
    return walk.call(aten.reshape.default, total, walk.build.shape(x))


@_routes("constant_pad_nd")
def _constant_pad(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    return walk.call(aten.constant_pad_nd.default, t, [-a for a in node.args[1]], 0.0)


@_routes(
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d",
)  # fmt: skip
def _mirror_pad(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    return apply_transposed(walk, t, spatial_matrices(walk, node))


@_routes("index_select")
def _index_select(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    x, dim, index = node.args
    zeros = walk.call(aten.zeros_like.default, x)
    return walk.call(aten.index_add.default, zeros, dim, index, t)


@_routes("index")
def _index(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    x, indices = node.args
    if any(i is not None and i in walk.reached for i in indices):
        raise UnsupportedOperationError(
            f"{describe(node)} is indexed by values of the input; there is no rule for that"
        )
    zeros = walk.call(aten.zeros_like.default, x)
    return walk.call(aten.index_put.default, zeros, indices, t, True)


@_routes("pixel_shuffle")
def _pixel_shuffle(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    return walk.call(aten.pixel_unshuffle.default, t, node.args[1])


@_routes("pixel_unshuffle")
def _pixel_unshuffle(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    return walk.call(aten.pixel_shuffle.default, t, node.args[1])


@_routes("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    x, groups = node.args
    return walk.call(aten.channel_shuffle.default, t, value(x).shape[1] // groups)


@propagates("cat")
def _cat(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
    parts = node.args[0]
    dim = normalise_dim(argument(node, 1, "dim", 0), rank(node))
    own = message.carrier is node
    tensor = walk.single(message) if own else walk.relevance(message)
    start = 0
    for part in parts:
        length = value(part).shape[dim]
        if not isinstance(length, int):
            raise UnsupportedOperationError(f"{describe(node)} joins batches; explain the samples one by one instead")
        if part in walk.reached:
            piece = walk.call(aten.slice.Tensor, tensor, dim, start, start + length)
            walk.send(part, Message((piece,), part if own else None))
        start += length


@propagates("masked_fill")
def _masked_fill(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
    x, mask = node.args[:2]
    relevance = walk.relevance(message)
    walk.send(x, Message((walk.sum_to(walk.call(aten.masked_fill.Scalar, relevance, mask, 0.0), x),)))


@propagates("where")
def _where(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
    """A choice by a condition: each side gets the relevance of the places that it was chosen for."""
    condition, a, b = node.args
    relevance = walk.relevance(message)
    zeros = walk.call(aten.zeros_like.default, relevance)
    for operand, pair in ((a, (relevance, zeros)), (b, (zeros, relevance))):
        if isinstance(operand, fx.Node) and operand in walk.reached:
            chosen = walk.call(aten.where.self, condition, *pair)
            walk.send(operand, Message((walk.sum_to(chosen, operand),)))
