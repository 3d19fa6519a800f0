"""Canonical forms of what moves values and changes none: joins, shapes, selections, padding."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lrpfast.canonical.handlers import Parts, fill, handles, is_constant
from lrpfast.graph import Builder, argument, as_list, is_size, normalise_dim, operation_name, rank, value

aten = torch.ops.aten


@handles("cat", "concat", "concatenate")
def _cat(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """A join whose first operands were joined before continues that one.

    In a DenseNet every layer joins all that came before it; relevance then flows back along a chain, not along a number of
    slices that grows with the square of the depth.
    """
    return _join(builder, list(args[0]), normalise_dim(argument(node, 1, "dim", 0), rank(node)))


@handles("hstack", "column_stack", "dstack")
def _stacked(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    parts, dim = list(args[0]), 2 if operation_name(node) == "dstack" else 1
    if any(rank(x) < 2 for x in parts):
        return builder.call(node.target, *args, **kwargs)
    return _join(builder, [builder.call(aten.unsqueeze.default, x, 2) if rank(x) == dim else x for x in parts], dim)


def _join(builder: Builder, parts: list[fx.Node], dim: int) -> fx.Node:
    while (begun := _joined_before(parts, dim)) is not None:
        parts = [begun, *parts[len(begun.args[0]) :]]
    return parts[0] if len(parts) == 1 else builder.call(aten.cat.default, parts, dim)


def _joined_before(parts: list[fx.Node], dim: int) -> fx.Node | None:
    """A join of some of the first parts, but not of all."""
    for user in parts[0].users:
        if user.target is aten.cat.default and user.args[1] == dim:
            count = len(user.args[0])
            if 1 < count < len(parts) and list(user.args[0]) == parts[:count]:
                return user
    return None


# --- shapes -----------------------------------------------------------------------------------------------------------


@handles("view", "_unsafe_view", "reshape", "_reshape_copy", "view_copy")
def _view(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    if isinstance(args[1], torch.dtype):
        return builder.call(node.target, *args, **kwargs)
    return builder.call(aten.reshape.default, args[0], args[1])


@handles("flatten", "unflatten")
def _reshaping(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    target = builder.call(node.target, *args, **kwargs)
    return builder.call(aten.reshape.default, args[0], [builder.size(target, d) for d in range(rank(target))])


@handles("view_as", "reshape_as", "expand_as")
def _as_other(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    x, other = args
    target = aten.expand.default if operation_name(node) == "expand_as" else aten.reshape.default
    return builder.call(target, x, builder.shape(other))


@handles("broadcast_to")
def _broadcast_to(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    return builder.call(aten.expand.default, *args)


@handles("broadcast_tensors")
def _broadcast_tensors(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> Parts:
    shape: list[Any] = [1] * max(rank(x) for x in args[0])
    for x in args[0]:
        for d in range(-rank(x), 0):
            if not is_size(value(x).shape[d], 1):
                shape[d] = builder.size(x, d + rank(x))
    return Parts(builder.call(aten.expand.default, x, shape) for x in args[0])


@handles("tile")
def _tile(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    x, counts = args
    return builder.call(aten.repeat.default, x, [1] * (rank(x) - len(counts)) + list(counts))


@handles("squeeze")
def _squeeze(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """Only what is of size 1 whatever the batch goes: a batch of one sample is a batch still."""
    x = args[0]
    given = argument(node, 1, "dim")
    dims = range(rank(x)) if given is None else [normalise_dim(d, rank(x)) for d in as_list(given, 1)]
    gone = {d for d in dims if is_size(value(x).shape[d], 1)}
    kept = [builder.size(x, d) for d in range(rank(x)) if d not in gone]
    return builder.call(aten.reshape.default, x, kept) if gone else x


@handles("movedim", "moveaxis")
def _movedim(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    dims = rank(args[0])
    moved, places = ([normalise_dim(d, dims) for d in as_list(a, 1)] for a in args[1:3])
    rest = iter([d for d in range(dims) if d not in moved])
    order = [moved[places.index(d)] if d in places else next(rest) for d in range(dims)]
    return builder.call(aten.permute.default, args[0], order)


@handles("narrow")
def _narrow(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    x, dim, start, length = args
    start = normalise_dim(start, value(x).shape[dim])
    return builder.call(aten.slice.Tensor, x, dim, start, start + length)


@handles("repeat_interleave")
def _repeat_interleave(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """By a number along a dimension: a selection of each index that many times."""
    x, repeats = args[:2]
    dim = argument(node, 2, "dim")
    size = value(x).shape[dim] if isinstance(dim, int) else None
    if not (isinstance(repeats, int) and isinstance(size, int)):
        return builder.call(node.target, *args, **kwargs)
    make = functools.partial(torch.repeat_interleave, torch.arange(size, device=value(x).device), repeats)
    index = builder.derived(("repeat_interleave", size, repeats), make, "repeat_index")
    return builder.call(aten.index_select.default, x, normalise_dim(dim, rank(x)), index)


@handles("transpose", "t", "swapaxes", "swapdims", "mT", "numpy_T", "mH", "matrix_H", "adjoint")
def _transpose(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    name, dims = operation_name(node), rank(args[0])
    order = list(range(dims))
    if value(args[0]).is_complex():  # some conjugate
        return builder.call(node.target, *args, **kwargs)
    if name in ("t", "numpy_T"):
        order.reverse()
    else:
        a, b = (normalise_dim(d, dims) for d in (args[1:3] if len(args) > 1 else (-2, -1)))
        order[a], order[b] = order[b], order[a]
    return builder.call(aten.permute.default, args[0], order)


@handles("split", "split_with_sizes", "chunk", "unbind", "tensor_split")
def _split(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    x = args[0]
    name = operation_name(node)
    names = ["self", "dim"] if name == "unbind" else ["self", "sizes", "dim"]
    filled = fill(args, kwargs, [None, 0] if name == "unbind" else [None, None, 0], names)
    dim = normalise_dim(filled[-1], rank(x))
    shapes = [part.shape for part in node.meta["val"]]
    if name == "unbind":
        return Parts(builder.call(aten.select.int, x, dim, i) for i in range(len(shapes)))
    parts, start = Parts(), 0
    for shape in shapes:
        parts.append(builder.call(aten.slice.Tensor, x, dim, start, start + shape[dim]))
        start += shape[dim]
    return parts


@handles("stack")
def _stack(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    dim = normalise_dim(args[1] if len(args) > 1 else kwargs.get("dim", 0), rank(node))
    parts = [builder.call(aten.unsqueeze.default, x, dim) for x in args[0]]
    return parts[0] if len(parts) == 1 else builder.call(aten.cat.default, parts, dim)


@handles("pad")
def _pad(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    x, amounts = args[0], list(args[1])
    mode = argument(node, 2, "mode", "constant")
    fill = argument(node, 3, "value", None)
    if mode == "constant":
        return builder.call(aten.constant_pad_nd.default, x, amounts, float(fill or 0.0))
    dims = len(amounts) // 2
    if mode == "circular":
        return _gather_pad(builder, x, amounts, mode)
    target = getattr(aten, f"{'reflection' if mode == 'reflect' else 'replication'}_pad{dims}d").default
    padded = builder.call(target, x, amounts)
    padded.meta["layer_padding"] = True
    return padded


def _gather_pad(builder: Builder, x: fx.Node, amounts: list[int], mode: str) -> fx.Node:
    """Circular padding as a selection along each dimension."""
    for pair in range(len(amounts) // 2):
        dim = rank(x) - 1 - pair
        size = value(x).shape[dim]
        left, right = amounts[2 * pair : 2 * pair + 2]
        places = torch.arange(size, dtype=torch.float64, device=value(x).device)[None, None]
        index = F.pad(places, (left, right), mode=mode)[0, 0].long()
        node = builder.derived(("pad", mode, size, left, right), functools.partial(torch.clone, index), "padding_index")
        x = builder.call(aten.index_select.default, x, dim, node)
        x.meta["layer_padding"] = True
    return x


@handles("index")
def _index(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """A constant mask chooses places that are known now; how many a mask chooses would else be known at run time alone."""
    indices: list[fx.Node | None] = []
    for index in args[1]:
        if is_constant(index) and value(index).dtype is torch.bool:
            places = builder.tensor(index).nonzero(as_tuple=True)
            indices.extend(builder.constant(place, f"{index.target}_places") for place in places)
        else:
            indices.append(index)
    return builder.call(node.target, args[0], indices)
