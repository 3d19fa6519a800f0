"""The portable rendering of a joint program: plain ATen operations alone, for `torch.export`, ONNX and other compilers.

Every operator of lrpfast is replaced by its decomposition, the same function that serves as its reference. What the
decomposition makes of constants alone (a flipped weight) is computed now and not at every call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from lrpfast.graph import Builder, Program, is_tensor, operation_name
from lrpfast.ops.decompositions import DECOMPOSITIONS
from lrpfast.ops.transposes import TRANSPOSES

_DECOMPOSITIONS: dict[Any, Callable[..., torch.Tensor]] = {
    **DECOMPOSITIONS,
    **{getattr(torch.ops.lrpfast, name).default: portable for name, (_, _, portable, _) in TRANSPOSES.items()},
}


def portable(program: Program) -> Program:
    """Replace lrpfast's operators in a joint program by plain ATen."""
    builder = Builder(program.fake_mode)
    env: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        builder.path = node.meta.get("path", "")
        if node.op == "placeholder":
            env[node] = builder.placeholder(node.name, node.meta["val"])
        elif node.op == "get_attr":
            env[node] = builder.constant(program.constants[node.target], node.target)
        elif node.op == "output":
            builder.graph.output(fx.map_arg(node.args[0], lambda n: env[n]))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
                env[node] = args[0][args[1]]  # one of the results of a decomposed operator
                continue
            ours = node.target in _DECOMPOSITIONS
            env[node] = _decompose(builder, node, args) if ours else builder.call(node.target, *args, **kwargs)
    return Program(builder.graph, builder.constants, program.fake_mode).drop_unused()


def _decompose(builder: Builder, node: fx.Node, args: tuple) -> Any:
    function = _DECOMPOSITIONS[node.target]
    tensors = [a for a in args if is_tensor(a)]

    def compute(*values: torch.Tensor) -> torch.Tensor:
        remaining = iter(values)
        return function(*(next(remaining) if is_tensor(a) else a for a in args))

    with builder.fake_mode:
        traced = make_fx(compute, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
            *(t.meta["val"] for t in tensors)
        )
    env: dict[fx.Node, Any] = {}
    remaining = iter(tensors)
    for inner in traced.graph.nodes:
        if inner.op == "placeholder":
            env[inner] = next(remaining)
        elif inner.op == "output":
            return fx.map_arg(inner.args[0], lambda n: env[n])
        elif inner.op == "get_attr":
            env[inner] = builder.constant(getattr(traced, inner.target), f"{operation_name(node)}_constant")
        else:
            inner_args, kwargs = fx.map_arg((inner.args, inner.kwargs), lambda n: env[n])
            env[inner] = _call(builder, inner.target, inner_args, kwargs)
    raise AssertionError("a traced graph ends with its output")


def _call(builder: Builder, target: Callable[..., Any], args: tuple, kwargs: dict) -> fx.Node:
    """Append a call, or compute it now where all its operands are constants."""
    nodes: list[fx.Node] = []
    fx.map_arg((args, kwargs), nodes.append)
    if not nodes or any(n.op != "get_attr" for n in nodes):
        return builder.call(target, *args, **kwargs)
    key = (str(target), str(args), str(kwargs))
    makers = {n: builder.constants.maker(n.target) for n in nodes}

    def compute() -> torch.Tensor:
        real_args, real_kwargs = fx.map_arg((args, kwargs), lambda n: makers[n]())
        return target(*real_args, **real_kwargs)

    return builder.derived(key, compute, f"{nodes[0].target}_folded")
