"""Canonical forms of layers with parameters: convolutions, dense layers, and batch norms, which are folded into the layer before."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lrpfast.canonical.handlers import Parts, fill, given_constant, handles, is_constant, uncast
from lrpfast.errors import CaptureError
from lrpfast.graph import Builder, as_list, describe, operation_name, rank, value
from lrpfast.ops.filters import Filters

aten = torch.ops.aten


@handles("conv1d", "conv2d", "conv3d")
def _conv(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    x, weight, bias, stride, padding, dilation, groups = fill(args, kwargs, [None, None, None, 1, 0, 1, 1], _CONV_NAMES)
    dims = rank(weight) - 2
    stride, dilation = as_list(stride, dims), as_list(dilation, dims)
    if isinstance(padding, str):
        kernel = value(weight).shape[2:]
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            flat = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
            x = builder.call(aten.constant_pad_nd.default, x, flat, 0.0)
            x.meta["layer_padding"] = True
            total = [0] * dims
        padding = [t // 2 for t in total]
    return _convolution(builder, x, weight, bias, stride, as_list(padding, dims), dilation, False, [0] * dims, groups)


_CONV_NAMES = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]


@handles("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    names = ["input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"]
    defaults = [None, None, None, 1, 0, 0, 1, 1]
    x, weight, bias, stride, padding, output_padding, groups, dilation = fill(args, kwargs, defaults, names)
    dims = rank(weight) - 2
    lists = (as_list(v, dims) for v in (stride, padding, dilation))
    return _convolution(builder, x, weight, bias, *lists, True, as_list(output_padding, dims), groups)


@handles("convolution")
def _plain_convolution(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    dims = rank(weight) - 2
    lists = (as_list(v, dims) for v in (stride, padding, dilation))
    return _convolution(builder, x, weight, bias, *lists, transposed, as_list(output_padding, dims), groups)


def _convolution(builder: Builder, x: fx.Node, weight: fx.Node, *rest: Any) -> fx.Node:
    """A convolution on a batch; torch takes a sample without one too, which has no place here."""
    if rank(x) != rank(weight):
        raise CaptureError(
            f"a convolution in the module {builder.path!r} runs on a value of rank {rank(x)}: give inputs with the batch "
            "as their first dimension"
        )
    return builder.call(aten.convolution.default, x, weight, *rest)


@handles("addmm")
def _addmm(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    bias, x, matrix = args
    scaled = any(kwargs.get(k, 1) != 1 for k in ("alpha", "beta"))
    if scaled or not (is_constant(matrix) and is_constant(bias)) or rank(bias) != 1:
        return builder.call(node.target, *args, **kwargs)
    return builder.call(aten.linear.default, x, _transposed(builder, matrix), bias)


@handles("mm", "matmul", "mv")
def _matmul(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    x, matrix = args
    if is_constant(matrix) and rank(matrix) == 1 and rank(x) > 1:
        return _times_vector(builder, x, matrix)
    if is_constant(x) and rank(x) == 1 and rank(matrix) > 1:
        order = [*range(rank(matrix) - 2), rank(matrix) - 1, rank(matrix) - 2]
        return _times_vector(builder, builder.call(aten.permute.default, matrix, order), x)
    if is_constant(matrix) and not is_constant(x) and rank(matrix) == 2:
        return builder.call(aten.linear.default, x, _transposed(builder, matrix), None)
    if is_constant(x) and rank(x) == 2 and rank(matrix) == 2:
        swapped = builder.call(aten.permute.default, matrix, [1, 0])
        return builder.call(aten.permute.default, builder.call(aten.linear.default, swapped, x, None), [1, 0])
    return builder.call(node.target, *args, **kwargs)


def _times_vector(builder: Builder, x: fx.Node, vector: fx.Node) -> fx.Node:
    """``x @ v``: a dense layer of one output, which has no dimension of its own."""
    make = builder.constants.maker(vector.target)
    row = builder.derived(("row", vector.target), lambda: make().reshape(1, -1), f"{vector.target}_row")
    product = builder.call(aten.linear.default, x, row, None)
    return builder.call(aten.reshape.default, product, builder.shape(x)[:-1])


@handles("linear")
def _linear(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    x, weight, bias = fill(args, kwargs, [None, None, None], ["input", "weight", "bias"])
    return builder.call(aten.linear.default, x, weight, bias)


def _transposed(builder: Builder, matrix: fx.Node) -> fx.Node:
    make = builder.constants.maker(matrix.target)
    return builder.derived(("t", matrix.target), lambda: make().t().contiguous(), f"{matrix.target}_t")


# --- batch norm -------------------------------------------------------------------------------------------------------


@handles("_native_batch_norm_legit_no_training", "batch_norm", "native_batch_norm", "_native_batch_norm_legit")
def _batch_norm(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    name = operation_name(node)
    x, weight, bias, mean, var = args[:5]
    training = name != "_native_batch_norm_legit_no_training" and args[5]
    if training or mean is None or var is None:
        raise CaptureError(
            f"{describe(node)} normalises with the statistics of the batch (track_running_stats=False, or training mode): a "
            "sample's map would depend on its neighbours"
        )
    eps = args[-2] if name == "batch_norm" else args[-1]
    statistics = [None if n is None else uncast(builder, n) for n in (weight, bias, mean, var)]
    folded = _fold(builder, node, x, statistics, eps)
    result = folded or builder.call(aten.batch_norm.default, x, weight, bias, mean, var, False, 0.0, eps, False)
    return result if name == "batch_norm" else Parts([result, None, None])


def _fold(builder: Builder, node: fx.Node, layer: fx.Node, statistics: list, eps: float) -> fx.Node | None:
    """Fold a batch norm into the layer before it, RULES §3; None where the layer's output is used elsewhere."""
    source = node.args[0]
    convolution = layer.target is aten.convolution.default
    if not (convolution or (layer.target is aten.linear.default and rank(layer) == 2)):
        return None
    if len(source.users) != 1 or not is_constant(layer.args[1]):
        return None
    weight, bias = layer.args[1:3]
    scale, shift = batch_norm_affine(statistics, eps)
    transposed, groups = convolution and layer.args[6], layer.args[8] if convolution else 1

    dtype = value(weight).dtype
    given = given_constant(builder, weight)
    make = builder.constants.maker(weight.target)

    def new_weight() -> torch.Tensor:
        old = make() if given is None else given
        return _scale_outputs(old.double(), scale, transposed, groups).to(dtype)

    old_bias = torch.zeros_like(shift) if bias is None else uncast(builder, bias).double()
    new_bias = (old_bias * scale + shift).to(dtype)
    path, builder.path = builder.path, layer.meta["path"]
    nodes = [
        builder.derived(("folded", node.name), new_weight, f"{weight.target}_folded", value(weight)),
        builder.constant(new_bias, f"{weight.target}_folded_bias"),
    ]
    if given is not None and not transposed:
        builder.constants.fold(nodes[0].target, Filters.of(given, scale))
    folded = builder.call(layer.target, layer.args[0], *nodes, *layer.args[3:])
    builder.path = path
    folded.meta["aliases"] = (*layer.meta.get("aliases", ()), path)
    return folded


def batch_norm_affine(statistics: list[torch.Tensor | None], eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch norm, given by weight, bias, mean and variance, as ``y = scale * x + shift`` a channel, in float64."""
    weight, bias, mean, var = statistics
    assert mean is not None and var is not None
    with torch.no_grad():
        scale = (var.double() + eps).rsqrt()
        if weight is not None:
            scale = scale * weight.double()
        shift = -mean.double() * scale
        if bias is not None:
            shift = shift + bias.double()
    return scale, shift


def _scale_outputs(weight: torch.Tensor, scale: torch.Tensor, transposed: bool, groups: int) -> torch.Tensor:
    """Multiply the rows of a weight that make one output channel; a transposed convolution has them in dim 1, by group."""
    if not transposed:
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    by_group = weight.reshape(groups, -1, *weight.shape[1:])
    scaled = by_group * scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return scaled.reshape(weight.shape)
