"""Canonicalise: rewrite a captured graph so that every later pass meets few forms.

Each handler below takes one ATen operation and emits the canonical one. After this pass

- every convolution is ``aten.convolution`` (padding and all else as lists), every dense layer with constant weights is
  ``aten.linear``;
- batch norm is folded into the layer before it, or is one ``aten.batch_norm`` node;
- dropout, clone, contiguous and other identities are gone; ``view`` is ``reshape``;
- results of multi-output operations are slices, and max pooling returns its indices;
- values that no output needs are gone.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lrpfast.errors import CaptureError
from lrpfast.graph import (
    Builder,
    Constants,
    Program,
    argument,
    as_list,
    describe,
    is_size,
    is_tensor,
    known_shape,
    normalise_dim,
    operation_name,
    rank,
    static_sizes,
    value,
)
from lrpfast.ops.filters import Filters

aten = torch.ops.aten

Handler = Callable[[Builder, fx.Node, tuple, dict], Any]
_HANDLERS: dict[str, Handler] = {}

_IDENTITIES = {
    "clone", "contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh", "lift", "dropout", "native_dropout",
    "feature_dropout", "alpha_dropout", "positive", "identity", "_assert_tensor_metadata",
}  # fmt: skip

# What draws random numbers: each call would have a map of its own.
_DRAWS = {
    "bernoulli", "bernoulli_", "exponential", "multinomial", "normal", "normal_", "poisson", "rand", "rand_like", "randint",
    "randint_like", "randn", "randn_like", "randperm", "rrelu_with_noise", "uniform", "uniform_",
}  # fmt: skip


def canonicalise(program: Program, dtype: torch.dtype | None = None) -> Program:
    """Rewrite a captured program into canonical form.

    Parameters
    ----------
    program
        As `lrpfast.capture.capture` returns it; not changed.
    dtype
        Where given, floating-point constants and inputs are of this dtype in the result.

    Raises
    ------
    CaptureError
        Batch norm with the statistics of the batch.
    """
    builder = Builder(program.fake_mode)
    env: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        builder.path = node.meta.get("path", "")
        if node.op == "placeholder":
            env[node] = builder.placeholder(node.name, _cast_fake(program, value(node), dtype))
        elif node.op == "get_attr":
            env[node] = _constant(builder, program.constants, node.target, dtype)
        elif node.op == "output":
            builder.graph.output(env[node.args[0]])
        else:
            env[node] = _emit(builder, node, env, dtype)
    return Program(builder.graph, builder.constants, program.fake_mode).drop_unused()


def _constant(builder: Builder, constants: Constants, name: str, dtype: torch.dtype | None) -> fx.Node:
    if _cast(constants[name], dtype) is constants[name]:
        return builder.constant(constants[name], name)
    node = builder.derived(("cast", name), lambda: _cast(constants[name], dtype), name)
    if constants[name].dtype is torch.float32:
        builder.constants.fold(node.target, Filters(constants[name]))  # kernels round it once, whatever is made of it
    return node


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _given(builder: Builder, node: fx.Node) -> torch.Tensor | None:
    """A constant as the model has it, in its own dtype; None where it is derived in another way than by a cast."""
    filters = builder.constants.filters(node.target)
    return None if filters is None or filters.factors is not None else filters.weight


def _uncast(builder: Builder, node: fx.Node) -> torch.Tensor:
    given = _given(builder, node)
    return builder.tensor(node) if given is None else given


def _cast_fake(program: Program, fake: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    with program.fake_mode:
        return _cast(fake, dtype)


def _emit(builder: Builder, node: fx.Node, env: dict[fx.Node, Any], dtype: torch.dtype | None) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
    name = operation_name(node)
    if node.target is operator.getitem:
        return args[0][args[1]] if isinstance(args[0], _Parts) else builder.call(node.target, *args)
    args, kwargs = _cast_dtypes(args, kwargs, dtype)
    if name in _IDENTITIES:
        if name in ("alpha_dropout", "feature_dropout") and args[2]:
            raise _random(node)
        return _Parts([args[0], None]) if name == "native_dropout" else args[0]
    if name in _DRAWS or (name == "rrelu" and argument(node, 3, "training", False)):
        raise _random(node)
    handler = _HANDLERS.get(name)
    result = handler(builder, node, args, kwargs) if handler else builder.call(node.target, *args, **kwargs)
    return _cast_result(builder, result, dtype)


def _random(node: fx.Node) -> CaptureError:
    return CaptureError(f"{describe(node)} is random: call model.eval() first, or draw nothing in forward")


def _cast_dtypes(args: tuple, kwargs: dict, dtype: torch.dtype | None) -> tuple[tuple, dict]:
    """The arguments of a call, the floating-point dtype among them replaced."""

    def cast(given: Any) -> Any:
        return dtype if dtype is not None and isinstance(given, torch.dtype) and given.is_floating_point else given

    return tuple(map(cast, args)), {key: cast(given) for key, given in kwargs.items()}


def _cast_result(builder: Builder, result: Any, dtype: torch.dtype | None) -> Any:
    """What is of torch's default dtype for want of another: new tensors, and what is made of masks and integers alone."""
    if dtype is None or not is_tensor(result) or not value(result).is_floating_point() or value(result).dtype is dtype:
        return result
    return builder.call(aten.to.dtype, result, dtype)


class _Parts(list):
    """The results of an operation that returns several tensors, by number."""


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


# --- layers with parameters -------------------------------------------------------------------------------------------


@_handles("conv1d", "conv2d", "conv3d")
def _conv(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    x, weight, bias, stride, padding, dilation, groups = _fill(
        args, kwargs, [None, None, None, 1, 0, 1, 1], _CONV_NAMES
    )
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


@_handles("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    names = ["input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"]
    defaults = [None, None, None, 1, 0, 0, 1, 1]
    x, weight, bias, stride, padding, output_padding, groups, dilation = _fill(args, kwargs, defaults, names)
    dims = rank(weight) - 2
    lists = (as_list(v, dims) for v in (stride, padding, dilation))
    return _convolution(builder, x, weight, bias, *lists, True, as_list(output_padding, dims), groups)


@_handles("convolution")
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


def _fill(args: tuple, kwargs: dict, defaults: list, names: list[str]) -> list:
    filled = list(args) + defaults[len(args) :]
    for key, given in kwargs.items():
        filled[names.index(key)] = given
    return filled


@_handles("addmm")
def _addmm(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    bias, x, matrix = args
    scaled = any(kwargs.get(k, 1) != 1 for k in ("alpha", "beta"))
    if scaled or not (_is_constant(matrix) and _is_constant(bias)) or rank(bias) != 1:
        return builder.call(node.target, *args, **kwargs)
    return builder.call(aten.linear.default, x, _transposed(builder, matrix), bias)


@_handles("mm", "matmul", "mv")
def _matmul(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    x, matrix = args
    if _is_constant(matrix) and rank(matrix) == 1 and rank(x) > 1:
        return _times_vector(builder, x, matrix)
    if _is_constant(x) and rank(x) == 1 and rank(matrix) > 1:
        order = [*range(rank(matrix) - 2), rank(matrix) - 1, rank(matrix) - 2]
        return _times_vector(builder, builder.call(aten.permute.default, matrix, order), x)
    if _is_constant(matrix) and not _is_constant(x) and rank(matrix) == 2:
        return builder.call(aten.linear.default, x, _transposed(builder, matrix), None)
    if _is_constant(x) and rank(x) == 2 and rank(matrix) == 2:
        swapped = builder.call(aten.permute.default, matrix, [1, 0])
        return builder.call(aten.permute.default, builder.call(aten.linear.default, swapped, x, None), [1, 0])
    return builder.call(node.target, *args, **kwargs)


def _times_vector(builder: Builder, x: fx.Node, vector: fx.Node) -> fx.Node:
    """``x @ v``: a dense layer of one output, which has no dimension of its own."""
    make = builder.constants.maker(vector.target)
    row = builder.derived(("row", vector.target), lambda: make().reshape(1, -1), f"{vector.target}_row")
    product = builder.call(aten.linear.default, x, row, None)
    return builder.call(aten.reshape.default, product, builder.shape(x)[:-1])


@_handles("linear")
def _linear(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    x, weight, bias = _fill(args, kwargs, [None, None, None], ["input", "weight", "bias"])
    return builder.call(aten.linear.default, x, weight, bias)


def _is_constant(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _transposed(builder: Builder, matrix: fx.Node) -> fx.Node:
    make = builder.constants.maker(matrix.target)
    return builder.derived(("t", matrix.target), lambda: make().t().contiguous(), f"{matrix.target}_t")


# --- batch norm -------------------------------------------------------------------------------------------------------


@_handles("_native_batch_norm_legit_no_training", "batch_norm", "native_batch_norm", "_native_batch_norm_legit")
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
    statistics = [None if n is None else _uncast(builder, n) for n in (weight, bias, mean, var)]
    folded = _fold(builder, node, x, statistics, eps)
    result = folded or builder.call(aten.batch_norm.default, x, weight, bias, mean, var, False, 0.0, eps, False)
    return result if name == "batch_norm" else _Parts([result, None, None])


def _fold(builder: Builder, node: fx.Node, layer: fx.Node, statistics: list, eps: float) -> fx.Node | None:
    """Fold a batch norm into the layer before it, RULES §3; None where the layer's output is used elsewhere."""
    source = node.args[0]
    convolution = layer.target is aten.convolution.default
    if not (convolution or (layer.target is aten.linear.default and rank(layer) == 2)):
        return None
    if len(source.users) != 1 or not _is_constant(layer.args[1]):
        return None
    weight, bias = layer.args[1:3]
    scale, shift = batch_norm_affine(statistics, eps)
    transposed, groups = convolution and layer.args[6], layer.args[8] if convolution else 1

    dtype = value(weight).dtype
    given = _given(builder, weight)
    make = builder.constants.maker(weight.target)

    def new_weight() -> torch.Tensor:
        old = make() if given is None else given
        return _scale_outputs(old.double(), scale, transposed, groups).to(dtype)

    old_bias = torch.zeros_like(shift) if bias is None else _uncast(builder, bias).double()
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


# --- joins ------------------------------------------------------------------------------------------------------------


@_handles("cat", "concat", "concatenate")
def _cat(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """A join whose first operands were joined before continues that one.

    In a DenseNet every layer joins all that came before it; relevance then flows back along a chain, not along a number of
    slices that grows with the square of the depth.
    """
    return _join(builder, list(args[0]), normalise_dim(argument(node, 1, "dim", 0), rank(node)))


@_handles("hstack", "column_stack", "dstack")
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


# --- pooling ----------------------------------------------------------------------------------------------------------


@_handles("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    dims = int(operation_name(node)[-2])
    names = ["input", "kernel_size", "stride", "padding", "dilation", "ceil_mode"]
    x, kernel, stride, padding, dilation, ceil = _fill(args, kwargs, [None, None, [], 0, 1, False], names)
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


@_handles("adaptive_max_pool1d")
def _adaptive_max_pool1d(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> _Parts:
    x = builder.call(aten.unsqueeze.default, args[0], -2)
    pooled = builder.call(aten.adaptive_max_pool2d.default, x, [1, *as_list(args[1], 1)])
    first = builder.call(operator.getitem, pooled, 0)
    return _Parts([builder.call(aten.squeeze.dim, first, -2), None])


@_handles("adaptive_max_pool2d", "adaptive_max_pool3d")
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


@_handles("max_pool2d_with_indices", "max_pool3d_with_indices")
def _max_pool_with_indices(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> _Parts:
    return _Parts([_max_pool_named(builder, node, args, kwargs), None])


def _max_pool_named(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    dims = 3 if "3d" in operation_name(node) else 2
    names = ["self", "kernel_size", "stride", "padding", "dilation", "ceil_mode"]
    x, kernel, stride, padding, dilation, ceil = _fill(args, kwargs, [None, None, [], 0, 1, False], names)
    kernel = as_list(kernel, dims)
    stride = as_list(stride, dims) if stride not in (None, [], ()) else kernel
    call = builder.call(node.target, x, kernel, stride, as_list(padding, dims), as_list(dilation, dims), ceil)
    return builder.call(operator.getitem, call, 0)


@_handles("amax", "max")
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
    return _Parts([result, builder.call(aten.argmax.default, x, dims[0], keepdim)])


@_handles("avg_pool1d")
def _avg_pool1d(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """As one row of an image: average pooling then has one form for its way back."""
    x, kernel, stride, padding, ceil, include = _fill(args, kwargs, [None, None, [], 0, False, True], _AVG_NAMES)
    kernel = as_list(kernel, 1)
    stride = as_list(stride, 1) if stride not in (None, [], ()) else kernel
    row = builder.call(aten.unsqueeze.default, x, -2)
    pooled = builder.call(
        aten.avg_pool2d.default, row, [1, *kernel], [1, *stride], [0, *as_list(padding, 1)], ceil, include
    )
    return builder.call(aten.squeeze.dim, pooled, -2)


_AVG_NAMES = ["input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"]


# --- shapes -----------------------------------------------------------------------------------------------------------


@_handles("view", "_unsafe_view", "reshape", "_reshape_copy", "view_copy")
def _view(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    if isinstance(args[1], torch.dtype):
        return builder.call(node.target, *args, **kwargs)
    return builder.call(aten.reshape.default, args[0], args[1])


@_handles("flatten", "unflatten")
def _reshaping(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    target = builder.call(node.target, *args, **kwargs)
    return builder.call(aten.reshape.default, args[0], [builder.size(target, d) for d in range(rank(target))])


@_handles("view_as", "reshape_as", "expand_as")
def _as_other(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    x, other = args
    target = aten.expand.default if operation_name(node) == "expand_as" else aten.reshape.default
    return builder.call(target, x, builder.shape(other))


@_handles("broadcast_to")
def _broadcast_to(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    return builder.call(aten.expand.default, *args)


@_handles("broadcast_tensors")
def _broadcast_tensors(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> _Parts:
    shape: list[Any] = [1] * max(rank(x) for x in args[0])
    for x in args[0]:
        for d in range(-rank(x), 0):
            if not is_size(value(x).shape[d], 1):
                shape[d] = builder.size(x, d + rank(x))
    return _Parts(builder.call(aten.expand.default, x, shape) for x in args[0])


@_handles("tile")
def _tile(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    x, counts = args
    return builder.call(aten.repeat.default, x, [1] * (rank(x) - len(counts)) + list(counts))


@_handles("squeeze")
def _squeeze(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """Only what is of size 1 whatever the batch goes: a batch of one sample is a batch still."""
    x = args[0]
    given = argument(node, 1, "dim")
    dims = range(rank(x)) if given is None else [normalise_dim(d, rank(x)) for d in as_list(given, 1)]
    gone = {d for d in dims if is_size(value(x).shape[d], 1)}
    kept = [builder.size(x, d) for d in range(rank(x)) if d not in gone]
    return builder.call(aten.reshape.default, x, kept) if gone else x


@_handles("movedim", "moveaxis")
def _movedim(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    dims = rank(args[0])
    moved, places = ([normalise_dim(d, dims) for d in as_list(a, 1)] for a in args[1:3])
    rest = iter([d for d in range(dims) if d not in moved])
    order = [moved[places.index(d)] if d in places else next(rest) for d in range(dims)]
    return builder.call(aten.permute.default, args[0], order)


@_handles("narrow")
def _narrow(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    x, dim, start, length = args
    start = normalise_dim(start, value(x).shape[dim])
    return builder.call(aten.slice.Tensor, x, dim, start, start + length)


@_handles("repeat_interleave")
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


@_handles("neg", "rsub")
def _negation(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """``-x`` is a product with a constant, ``c - x`` a sum with that."""
    if operation_name(node) == "neg":
        return builder.call(aten.mul.Tensor, args[0], -1.0)
    negated = builder.call(aten.mul.Tensor, args[0], -argument(node, 2, "alpha", 1))
    return builder.call(aten.add.Tensor, negated, args[1])


@_handles("transpose", "t", "swapaxes", "swapdims", "mT", "numpy_T", "mH", "matrix_H", "adjoint")
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


@_handles("split", "split_with_sizes", "chunk", "unbind", "tensor_split")
def _split(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    x = args[0]
    name = operation_name(node)
    names = ["self", "dim"] if name == "unbind" else ["self", "sizes", "dim"]
    filled = _fill(args, kwargs, [None, 0] if name == "unbind" else [None, None, 0], names)
    dim = normalise_dim(filled[-1], rank(x))
    shapes = [part.shape for part in node.meta["val"]]
    if name == "unbind":
        return _Parts(builder.call(aten.select.int, x, dim, i) for i in range(len(shapes)))
    parts, start = _Parts(), 0
    for shape in shapes:
        parts.append(builder.call(aten.slice.Tensor, x, dim, start, start + shape[dim]))
        start += shape[dim]
    return parts


@_handles("stack")
def _stack(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    dim = normalise_dim(args[1] if len(args) > 1 else kwargs.get("dim", 0), rank(node))
    parts = [builder.call(aten.unsqueeze.default, x, dim) for x in args[0]]
    return parts[0] if len(parts) == 1 else builder.call(aten.cat.default, parts, dim)


@_handles("pad")
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


_FILLS = {"zeros": 0, "ones": 1, "full": None}


@_handles(*(name for kind in _FILLS for name in (f"{kind}_like", f"new_{kind}")))
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


@_handles("index")
def _index(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """A constant mask chooses places that are known now; how many a mask chooses would else be known at run time alone."""
    indices: list[fx.Node | None] = []
    for index in args[1]:
        if _is_constant(index) and value(index).dtype is torch.bool:
            places = builder.tensor(index).nonzero(as_tuple=True)
            indices.extend(builder.constant(place, f"{index.target}_places") for place in places)
        else:
            indices.append(index)
    return builder.call(node.target, args[0], indices)


# --- sums and products ------------------------------------------------------------------------------------------------

_ALIASES = {"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div"}


@_handles(*_ALIASES)
def _alias(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    packet = getattr(aten, _ALIASES[operation_name(node)])
    return builder.call(getattr(packet, node.target._overloadname), *args, **kwargs)


@_handles("glu")
def _glu(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
    """One half gates the other."""
    x, dim = args[0], normalise_dim(argument(node, 1, "dim", -1), rank(args[0]))
    half = static_sizes(x, [dim])[0] // 2
    signal, gate = (builder.call(aten.slice.Tensor, x, dim, start, start + half) for start in (0, half))
    return builder.call(aten.mul.Tensor, signal, builder.call(aten.sigmoid.default, gate))


# --- activations ------------------------------------------------------------------------------------------------------


@_handles("clamp_min", "clamp", "threshold", "hardtanh", "relu6", "maximum")
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


@_handles("to", "_to_copy", "to_copy", "type_as")
def _to(builder: Builder, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """A cast between floating-point types is left out: the program has one precision. One to the type of another value takes
    nothing else of that."""
    if is_tensor(args[0]) and value(args[0]).is_floating_point() and node.meta["val"].is_floating_point():
        return args[0]
    if len(args) > 1 and is_tensor(args[1]):
        other = value(args[1])
        return builder.call(aten.to.device, args[0], other.device, other.dtype)
    return builder.call(node.target, *args, **kwargs)
