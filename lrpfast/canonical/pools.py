"""Canonical forms of pooling; a maximum over dimensions is a pool of one window."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from lrpfast.canonical.handlers import Parts, fill, handles
from lrpfast.graph import Builder, argument, as_list, known_shape, normalise_dim, operation_name, rank, value

aten = torch.ops.aten


@handles("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    dims = int(operation_name(node)[-2])
    names = ["input", "kernel_size", "stride", "padding", "dilation", "ceil_mode"]
    x, kernel, stride, padding, dilation, ceil = fill(args, kwargs, [None, None, [], 0, 1, False], names)
    kernel = as_list(kernel, dims)
    stride = as_list(stride, dims) if stride not in (None, [], ()) else kernel
    padding, dilation = as_list(padding, dims), as_list(dilation, dims)
    flat = dims == 1  # pooled as one row of an image: torch has no max_pool1d with indices and a way back
    if flat:
        x = builder.call(aten.unsqueeze.default, x, -2)
        kernel, stride, padding, dilation = [1, *kernel], [1, *stride], [0, *padding], [1, *dilation]
    target = aten.max_pool3d_with_indices.default if dims == 3 else aten.max_pool2d_with_indices.default
    pooled = builder.call(operator.getitem, builder.call(target, x, kernel, stride, padding, dilation, ceil), 0)
    return builder.call(aten.squeeze.dim, pooled, -2) if flat else pooled


@handles("adaptive_max_pool1d")
def _adaptive_max_pool1d(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> Parts:
    x = builder.call(aten.unsqueeze.default, args[0], -2)
    pooled = builder.call(aten.adaptive_max_pool2d.default, x, [1, *as_list(args[1], 1)])
    first = builder.call(operator.getitem, pooled, 0)
    return Parts([builder.call(aten.squeeze.dim, first, -2), None])


@handles("adaptive_max_pool2d", "adaptive_max_pool3d")
def _adaptive_max_pool(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """Where the windows are even it is a max pool, for which every rendering has a form."""
    dims = int(operation_name(node)[-2])
    x, counts = args[0], as_list(args[1], dims)
    sizes = [int(n) for n in value(x).shape[2:]]
    if rank(x) != dims + 2 or any(n % c for n, c in zip(sizes, counts, strict=True)):
        return builder.call(node.target, *args, **kwargs)
    kernel = [n // c for n, c in zip(sizes, counts, strict=True)]
    target = aten.max_pool3d_with_indices.default if dims == 3 else aten.max_pool2d_with_indices.default
    return builder.call(target, x, kernel, kernel, [0] * dims, [1] * dims, False)


@handles("max_pool2d_with_indices", "max_pool3d_with_indices")
def _max_pool_with_indices(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> Parts:
    return Parts([_max_pool_named(builder, node, args, kwargs), None])


def _max_pool_named(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    dims = 3 if "3d" in operation_name(node) else 2
    names = ["self", "kernel_size", "stride", "padding", "dilation", "ceil_mode"]
    x, kernel, stride, padding, dilation, ceil = fill(args, kwargs, [None, None, [], 0, 1, False], names)
    kernel = as_list(kernel, dims)
    stride = as_list(stride, dims) if stride not in (None, [], ()) else kernel
    call = builder.call(node.target, x, kernel, stride, as_list(padding, dims), as_list(dilation, dims), ceil)
    return builder.call(operator.getitem, call, 0)


@handles("amax", "max")
def _max_over_dims(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """Within a sample: a max pool with one window, over the reduced dimensions side by side."""
    x, given = args[0], argument(node, 1, "dim")
    named = operation_name(node) == "amax" or node.target is aten.max.dim
    dims = sorted({normalise_dim(d, rank(x)) for d in as_list(given, 1)}) if named and given not in (None, []) else []
    sizes = known_shape(x)
    if not dims or dims[0] == 0 or -1 in sizes[1:] or not value(x).is_floating_point():
        return builder.call(node.target, *args, **kwargs)
    others = [d for d in range(1, rank(x)) if d not in dims]
    batch = builder.size(x, 0)
    window = [1, math.prod(sizes[d] for d in dims)]
    moved = builder.call(aten.permute.default, x, [0, *others, *dims])
    rows = builder.call(aten.reshape.default, moved, [batch, math.prod(sizes[d] for d in others), *window])
    pooled = builder.call(aten.max_pool2d_with_indices.default, rows, window, window, [0, 0], [1, 1], False)
    keepdim = argument(node, 2, "keepdim", False)
    shape = [1 if d in dims else sizes[d] for d in range(1, rank(x)) if keepdim or d not in dims]
    result = builder.call(aten.reshape.default, builder.call(operator.getitem, pooled, 0), [batch, *shape])
    if operation_name(node) == "amax":
        return result
    return Parts([result, builder.call(aten.argmax.default, x, dims[0], keepdim)])


@handles("avg_pool1d")
def _avg_pool1d(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """As one row of an image: average pooling then has one form for its way back."""
    x, kernel, stride, padding, ceil, include = fill(args, kwargs, [None, None, [], 0, False, True], _AVG_NAMES)
    kernel = as_list(kernel, 1)
    stride = as_list(stride, 1) if stride not in (None, [], ()) else kernel
    row = builder.call(aten.unsqueeze.default, x, -2)
    pooled = builder.call(
        aten.avg_pool2d.default, row, [1, *kernel], [1, *stride], [0, *as_list(padding, 1)], ceil, include
    )
    return builder.call(aten.squeeze.dim, pooled, -2)


_AVG_NAMES = ["input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"]
