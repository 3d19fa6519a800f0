"""The vector-Jacobian product of any operation, as part of the joint program.

Composites that modify the gradient need the plain gradient of whatever the network holds. It is traced once, when the
program is built, from torch's own derivative of the operation; nothing of autograd is left at run time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from lrpfast.errors import UnsupportedOperationError
from lrpfast.graph import describe, operation_name
from lrpfast.relevance.walk import Message, Walk

aten = torch.ops.aten


def vector_jacobian_product(walk: Walk, node: fx.Node, message: Message) -> None:
    """Send ``Jᵀ R`` to every operand of a node that the input reaches."""
    relevance = walk.relevance(message)
    if operation_name(node) == "relu":  # by far the most frequent: no need to trace it
        walk.send(node.args[0], Message((walk.call(aten.threshold_backward.default, relevance, node, 0),)))
        return
    operands = [a for a in node.all_input_nodes if a in walk.reached]
    others = [a for a in node.all_input_nodes if a not in walk.reached]
    for operand, gradient in zip(operands, _traced(walk, node, operands, others, relevance), strict=True):
        walk.send(operand, Message((gradient,)))


def _traced(
    walk: Walk, node: fx.Node, operands: list[fx.Node], others: list[fx.Node], relevance: fx.Node
) -> list[fx.Node]:
    def pull_back(values: list[Any], constants: list[Any], cotangent: torch.Tensor) -> list[torch.Tensor]:
        known = dict(zip(others, constants, strict=True))

        def forward(*inputs: torch.Tensor) -> torch.Tensor:
            env = {**known, **dict(zip(operands, inputs, strict=True))}
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            return node.target(*args, **kwargs)

        pull = torch.func.vjp(forward, *values)[1]
        return list(pull(cotangent))

    nodes = [*operands, *others, relevance]
    fakes = [n.meta["val"] for n in nodes]
    split = len(operands)
    try:
        with walk.build.fake_mode:
            traced = make_fx(
                lambda *flat: pull_back(list(flat[:split]), list(flat[split:-1]), flat[-1]),
                decomposition_table=torch._decomp.core_aten_decompositions(),
                tracing_mode="symbolic",
                _allow_non_fake_inputs=True,
            )(*fakes)
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedOperationError(
            f"relevance reaches {describe(node)}, whose gradient torch cannot trace: {str(error).splitlines()[0]}"
        ) from error
    return _inline(walk, traced, nodes)


def _inline(walk: Walk, traced: fx.GraphModule, inputs: list[fx.Node]) -> list[fx.Node]:
    env: dict[fx.Node, Any] = {}
    remaining = iter(inputs)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(remaining)
        elif node.op == "get_attr":
            tensor = getattr(traced, node.target)
            env[node] = walk.constant(tensor, "traced")
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            # traced on fakes whose memory is contiguous, which what runs here need not be
            target = aten.reshape.default if node.target is aten.view.default else node.target
            env[node] = walk.call(target, *args, **kwargs)
        else:
            results = fx.map_arg(node.args[0], lambda n: env[n])
    return list(results)
