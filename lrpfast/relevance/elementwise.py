"""Activations, sums and products (RULES §3)."""

from __future__ import annotations

import torch
from torch import fx

from lrpfast.errors import UnsupportedOperationError
from lrpfast.graph import argument, describe, operation_name, same_shape
from lrpfast.kinds import ACTIVATIONS
from lrpfast.relevance.gradient import vector_jacobian_product
from lrpfast.relevance.walk import Message, Walk, propagates
from lrpfast.rules import DeconvReLU, Gradient, GuidedReLU, Norm, Rule, SmoothReLU

aten = torch.ops.aten


@propagates(*ACTIVATIONS)
def _activation(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
    x = node.args[0]
    others = [a for a in node.all_input_nodes if a is not x and a in walk.reached]
    if isinstance(rule, Gradient):
        vector_jacobian_product(walk, node, message)
    elif others:
        raise UnsupportedOperationError(
            f"relevance reaches {describe(node)}, whose bound or slope is a value of the input, too ({describe(others[0])}); there is "
            "no rule for that. Choose between the two with torch.where"
        )
    elif isinstance(rule, (GuidedReLU, DeconvReLU, SmoothReLU)):
        walk.send(x, Message((_rectified(walk, node, walk.relevance(message), rule),)))
    else:
        walk.notes[node] = "pass: nothing to compute"
        walk.send(x, message)


def _rectified(walk: Walk, node: fx.Node, g: fx.Node, rule: Rule) -> fx.Node:
    if isinstance(rule, SmoothReLU):
        x = node.args[0]
        return walk.call(aten.mul.Tensor, g, walk.call(aten.sigmoid.default, walk.call(aten.mul.Tensor, x, rule.beta)))
    positive = walk.call(aten.relu.default, g)
    if isinstance(rule, DeconvReLU):
        return positive
    return walk.call(aten.threshold_backward.default, positive, node, 0)


@propagates("add", "sub")
def _sum(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
    """``y = a + b``: ``R_a = a R / S(y)``. A branch with another shape was broadcast; its relevance is summed over that."""
    sign = -1 if operation_name(node) == "sub" else 1
    factor = sign * argument(node, 2, "alpha", 1)
    if isinstance(rule, Gradient):
        total = walk.relevance(message)
        carriers: tuple = (None, None)
    else:
        total = walk.output_ratio(message, node, rule.stabilizer if isinstance(rule, Norm) else Norm().stabilizer)
        carriers = node.args[:2]
    for operand, carrier, scale in zip(node.args[:2], carriers, (1, factor), strict=True):
        if not isinstance(operand, fx.Node) or operand not in walk.reached:
            continue
        part = total if scale == 1 else walk.call(aten.mul.Tensor, total, scale)
        walk.send(operand, Message((walk.sum_to(part, operand),), carrier))


@propagates("mul")
def _product(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
    """A constant passes all on; a gate takes nothing; of ``y = ab`` each signal gets ``½ y R / S(y)``."""
    if isinstance(rule, Gradient):
        vector_jacobian_product(walk, node, message)
        return
    a, b = node.args[:2]
    live = [n for n in (a, b) if isinstance(n, fx.Node) and n in walk.reached]
    signals = [n for n in live if n not in walk.facts.gates]
    if len(live) == 2 and len(signals) == 1:
        walk.notes[node] = "signal takes all"
        _hand_on(walk, node, signals[0], message)
    elif len(live) == 2:
        walk.notes[node] = "two signals: half each"
        half = walk.call(aten.mul.Tensor, walk.output_ratio(message, node, Norm().stabilizer), 0.5)
        for operand in (a, b):
            _hand_on(walk, node, operand, Message((half,), node))
    else:
        _hand_on(walk, node, live[0], message)


def _hand_on(walk: Walk, node: fx.Node, operand: fx.Node, message: Message) -> None:
    """Send a message at a product to one of its factors; where that was broadcast, summed over the copies."""
    if same_shape(operand, node):
        walk.send(operand, message)
    else:
        walk.send(operand, Message((walk.sum_to(walk.relevance(message), operand),)))


@propagates("div")
def _quotient(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
    """By a constant: Pass. By a value of the input: a normaliser, held constant, and ε on what is left (RULES §3)."""
    if isinstance(rule, Gradient):
        vector_jacobian_product(walk, node, message)
        return
    signal, divisor = node.args[:2]
    if node.kwargs.get("rounding_mode") is not None:
        raise UnsupportedOperationError(f"{describe(node)} rounds its quotient; there is no rule for that")
    if not (isinstance(divisor, fx.Node) and divisor in walk.reached):
        _hand_on(walk, node, signal, message)
        return
    if not (isinstance(signal, fx.Node) and signal in walk.reached):
        raise UnsupportedOperationError(
            f"{describe(node)} divides a constant by a value of the input; there is no rule for that"
        )
    ratio = walk.output_ratio(message, node, Norm().stabilizer)
    _hand_on(walk, node, signal, Message((ratio,), node))
