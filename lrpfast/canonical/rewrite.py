"""The pass: each node of a captured graph becomes what its handler makes of it, or stays what it is."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lrpfast.canonical.handlers import HANDLERS, Parts
from lrpfast.errors import CaptureError
from lrpfast.graph import Builder, Constants, Program, argument, describe, is_tensor, operation_name, value
from lrpfast.ops.filters import Filters

aten = torch.ops.aten

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


def _cast_fake(program: Program, fake: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    with program.fake_mode:
        return _cast(fake, dtype)


def _emit(builder: Builder, node: fx.Node, env: dict[fx.Node, Any], dtype: torch.dtype | None) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
    name = operation_name(node)
    if node.target is operator.getitem:
        return args[0][args[1]] if isinstance(args[0], Parts) else builder.call(node.target, *args)
    args, kwargs = _cast_dtypes(args, kwargs, dtype)
    if name in _IDENTITIES:
        if name in ("alpha_dropout", "feature_dropout") and args[2]:
            raise _random(node)
        return Parts([args[0], None]) if name == "native_dropout" else args[0]
    if name in _DRAWS or (name == "rrelu" and argument(node, 3, "training", False)):
        raise _random(node)
    handler = HANDLERS.get(name)
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
