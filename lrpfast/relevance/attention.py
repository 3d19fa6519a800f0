"""Softmax, and products of two activations (RULES §3; Achtibat et al. 2024, props. 3.1 and 3.3)."""

from __future__ import annotations

import torch
from torch import fx

from lrpfast.errors import UnsupportedOperationError
from lrpfast.graph import describe, rank
from lrpfast.relevance.gradient import vector_jacobian_product
from lrpfast.relevance.walk import Message, Walk, propagates
from lrpfast.rules import Gradient, Norm, Rule

aten = torch.ops.aten


@propagates("softmax", "_softmax")
def _softmax(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
    """``R_x = x * (R_y - y ΣR_y)``."""
    if isinstance(rule, Gradient):
        vector_jacobian_product(walk, node, message)
        return
    relevance = walk.relevance(message)
    total = walk.call(aten.sum.dim_IntList, relevance, [node.args[1]], True)
    rest = walk.call(aten.sub.Tensor, relevance, walk.call(aten.mul.Tensor, node, total))
    walk.send(node.args[0], Message((rest,), node.args[0]))


@propagates("matmul", "bmm", "mm")
def _matmul(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
    """``y = AB``: half to each factor, ``R_A = ½ A * (R_y / S(y)) Bᵀ``; all to A where B is a constant."""
    if isinstance(rule, Gradient):
        vector_jacobian_product(walk, node, message)
        return
    a, b = node.args[:2]
    if rank(a) == 1 or rank(b) == 1:
        raise UnsupportedOperationError(
            f"{describe(node)} multiplies by a vector that is computed from the input; there is no rule for that. Write the "
            "product as (a * b).sum(-1)"
        )
    ratio = walk.output_ratio(message, node, Norm().stabilizer)
    if a in walk.reached and b in walk.reached:
        ratio = walk.call(aten.mul.Tensor, ratio, 0.5)
    if a in walk.reached:
        q = walk.call(aten.matmul.default, ratio, walk.call(aten.transpose.int, b, -1, -2))
        walk.send(a, Message((walk.sum_to(q, a),), a))
    if b in walk.reached:
        q = walk.call(aten.matmul.default, walk.call(aten.transpose.int, a, -1, -2), ratio)
        walk.send(b, Message((walk.sum_to(q, b),), b))
