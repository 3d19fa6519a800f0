"""Average and max pooling, means, sums over dimensions, interpolation (RULES §3).

All that averages is linear and homogeneous: ``R_x = x * Jᵀ(R_y / S(y))``. The transposes ``Jᵀ``: a mean or sum over
whole dimensions spreads; a pool or an interpolation acts on each spatial dimension by itself, so ``J`` is a
product of one matrix a dimension, which is read off the operation itself when the program is built.
"""

from __future__ import annotations

import functools
import operator

import torch
from torch import fx

from lrpfast.graph import argument, as_list, normalise_dim, operation_name, rank, static_sizes, value
from lrpfast.kinds import AVERAGES
from lrpfast.relevance.walk import Message, Walk, propagates
from lrpfast.rules import Gradient, Norm, Rule

aten = torch.ops.aten
ops = torch.ops.lrpfast


@propagates(*AVERAGES)
def _average(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
    x = node.args[0]
    if isinstance(rule, Gradient):
        walk.send(x, Message((_transpose(walk, node, walk.relevance(message)),)))
        return
    ratio = walk.output_ratio(message, node, rule.stabilizer if isinstance(rule, Norm) else Norm().stabilizer)
    walk.send(x, Message((_transpose(walk, node, ratio),), x))


def _transpose(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    name, x = operation_name(node), node.args[0]
    if name in ("mean", "sum"):
        return _spread(walk, node, t)
    if name.startswith("adaptive_avg_pool") and all(size == 1 for size in value(node).shape[2:]):
        return _scaled_expand(walk, t, x, _count(x, range(2, rank(x))))
    if name.startswith("adaptive_avg_pool") and value(node).shape[2:] == value(x).shape[2:]:
        return t  # every window is one value
    matrices = spatial_matrices(walk, node)
    if name == "avg_pool2d":
        return _avg_pool2d(walk, node, t, matrices)
    return apply_transposed(walk, t, matrices)


def _spread(walk: Walk, node: fx.Node, t: fx.Node) -> fx.Node:
    """The transpose of a mean or sum over dimensions."""
    x = node.args[0]
    given = argument(node, 1, "dim")
    dims = range(rank(x)) if given in (None, []) else as_list(given, 1)
    reduced = sorted(normalise_dim(d, rank(x)) for d in dims)
    if not argument(node, 2, "keepdim", False):
        for dim in reduced:
            t = walk.call(aten.unsqueeze.default, t, dim)
    return _scaled_expand(walk, t, x, _count(x, reduced) if operation_name(node) == "mean" else 1)


def _count(x: fx.Node, dims: range | list[int]) -> int:
    count = 1
    for size in static_sizes(x, dims):
        count *= size
    return count


def _scaled_expand(walk: Walk, t: fx.Node, x: fx.Node, count: int) -> fx.Node:
    scaled = t if count == 1 else walk.call(aten.div.Tensor, t, count)
    return walk.call(aten.expand.default, scaled, walk.build.shape(x))


def spatial_matrices(walk: Walk, node: fx.Node) -> list[fx.Node]:
    """One matrix ``[out, in]`` a spatial dimension, whose product is the operation.

    Read off the operation: its response to a plane that is one along all but one dimension and a unit vector there.
    Responses at a fixed place of the other dimensions are the matrix up to that place's own factor, which is divided out.
    """
    x = node.args[0]
    sizes = static_sizes(x, range(2, rank(x)))
    key = (operation_name(node), tuple(sizes), str(node.args[1:]), str(node.kwargs))
    like = value(x)

    def run(plane: torch.Tensor) -> torch.Tensor:
        return node.target(plane, *node.args[1:], **node.kwargs)

    def matrix(dim: int) -> torch.Tensor:
        ones = run(torch.ones((1, 1, *sizes), dtype=torch.float64, device="cpu"))
        place = [int(i) for i in torch.unravel_index(ones.argmax(), ones.shape)]
        size = sizes[dim]
        shape = [size, 1, *(size if d == dim else 1 for d in range(len(sizes)))]
        units = torch.eye(size, dtype=torch.float64, device="cpu").reshape(shape).expand(size, 1, *sizes).contiguous()
        response = run(units)
        index = [slice(None), 0, *(slice(None) if d == dim else place[d + 2] for d in range(len(sizes)))]
        # the product of all matrices holds each place's factor once too often but for one dimension
        scale = 1.0 if dim == 0 else float(ones[tuple(place)])
        return (response[tuple(index)].t() / scale).to(device=like.device, dtype=like.dtype).contiguous()

    return [
        walk.build.derived((*key, dim), functools.partial(matrix, dim), f"{operation_name(node)}_matrix")
        for dim in range(len(sizes))
    ]


def apply_transposed(walk: Walk, t: fx.Node, matrices: list[fx.Node]) -> fx.Node:
    """``Jᵀ t`` for ``J`` a product of one matrix a spatial dimension.

    Each is a product of two matrices in the strict sense: how `matmul` folds dimensions depends on strides, which an
    export would take for facts about the batch.
    """
    dims = rank(t)
    for dim, matrix in enumerate(matrices, 2):
        order = [d for d in range(dims) if d != dim] + [dim]
        moved = t if dim == dims - 1 else walk.call(aten.permute.default, t, order)
        rows = walk.call(aten.reshape.default, moved, [-1, *static_sizes(moved, [dims - 1])])
        product = walk.call(aten.mm.default, rows, matrix)
        shape = [*walk.build.shape(moved)[:-1], *static_sizes(matrix, [1])]
        t = walk.call(aten.reshape.default, product, shape)
        if dim != dims - 1:
            t = walk.call(aten.permute.default, t, [order.index(d) for d in range(dims)])
    return t


def _avg_pool2d(walk: Walk, node: fx.Node, t: fx.Node, matrices: list[fx.Node]) -> fx.Node:
    x = node.args[0]
    kernel = as_list(node.args[1], 2)
    given = argument(node, 2, "stride", [])
    stride = as_list(given, 2) if given not in (None, [], ()) else kernel
    padding = as_list(argument(node, 3, "padding", 0), 2)
    ceil, include = argument(node, 4, "ceil_mode", False), argument(node, 5, "count_include_pad", True)
    divisor = argument(node, 6, "divisor_override")
    size = static_sizes(x, (2, 3))
    return walk.call(
        ops.avg_pool_dgrad.default, t, size, kernel, stride, padding, ceil, include, divisor, matrices[0], matrices[1]
    )


@propagates("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d")
def _max_pool(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
    """The winner takes all. A message of the pool's own output is routed as it is: the winner's value is the output's."""
    (pooled,) = [u for u in node.users if u.args[1] == 0]
    indices = _indices(walk, node)
    own = message.carrier is pooled
    q = walk.single(message) if own else walk.relevance(message)
    x = node.args[0]
    size = static_sizes(x, range(2, rank(x)))
    windows = [list(a) for a in node.args[1:5]] if operation_name(node).startswith("max_pool") else [[], [], [], []]
    ceil = bool(node.args[5]) if operation_name(node).startswith("max_pool") else False
    routed = walk.call(ops.max_pool_dgrad.default, q, indices, size, *windows, ceil)
    walk.send(x, Message((routed,), x if own else None))


def _indices(walk: Walk, node: fx.Node) -> fx.Node:
    return walk.call(operator.getitem, node, 1)
