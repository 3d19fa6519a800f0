"""Fusion: find the groups of nodes that a product of our own (lrpfast.ops.products) computes in one call.

Three shapes are looked for in a joint program, all of which the rules of RULES §2 make:

- a convolution that is the denominator of one ratio;
- the positive part of a 1 x 1 layer with signed input, ``conv(x⁺, W⁺) + conv(x⁻, W⁻)``, and the ratio that it is for;
- the transpose of such a layer, a choice by the sign of x between two transposes of one message.

Such a group runs where its last node stands, so what it reads has to be there still, unwritten.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import fx

from lrpfast.graph import argument, is_tensor, operation_name, same_sizes, value

aten = torch.ops.aten
ops = torch.ops.lrpfast


class Uses(Protocol):
    """What fusion asks of the lowering."""

    def only_user(self, node: fx.Node) -> fx.Node | None: ...
    def readable(self, node: fx.Node, at: fx.Node, instead_of: set[fx.Node]) -> bool: ...


@dataclasses.dataclass(frozen=True)
class SignedPart:
    """``conv(x⁺, positive, bias) + conv(x⁻, negative)``, all 1 x 1: `first` is the former convolution."""

    x: fx.Node
    first: fx.Node
    negative: fx.Node


@dataclasses.dataclass(frozen=True)
class Group:
    """Nodes computed in one call, as the value of `last`.

    Attributes
    ----------
    layer
        The convolution or the signed part that is the denominator of the ratio `last`; or that is `last`.
    replaced
        The nodes that need no step of their own.
    """

    last: fx.Node
    layer: fx.Node | SignedPart
    replaced: frozenset[fx.Node]


@dataclasses.dataclass(frozen=True)
class Either:
    """``x >= 0 ? upperᵀs : lowerᵀs``."""

    last: fx.Node
    x: fx.Node
    upper: fx.Node
    lower: fx.Node
    replaced: frozenset[fx.Node]


def find_groups(nodes: list[fx.Node], uses: Uses) -> list[Group | Either]:
    """All groups of a program; no node is in two of them."""
    found: list[Group | Either] = []
    taken: set[fx.Node] = set()
    for node in reversed(nodes):  # the ratio before the sum that is its denominator
        if node in taken or node.op != "call_function":
            continue
        group = _ratio(node, uses) or _signed_group(node, uses) or _either(node, uses)
        if group is not None and not group.replaced & taken:
            found.append(group)
            taken |= group.replaced | {node}
    return found


def _ratio(node: fx.Node, uses: Uses) -> Group | None:
    if operation_name(node) not in ("ratio", "ratio_sum"):
        return None
    *operands, denominator, _ = node.args
    if (
        denominator in operands
        or uses.only_user(denominator) is not node
        or not same_sizes(value(denominator).shape, value(node).shape)
    ):
        return None
    if denominator.target is aten.convolution.default:
        replaced = {denominator}
        layer: fx.Node | SignedPart = denominator
        read = denominator.args[0]
    else:
        part = _signed_part(denominator, uses)
        if part is None:
            return None
        layer, replaced = part
        replaced.add(denominator)
        read = part[0].x
    if not uses.readable(read, node, replaced):
        return None
    return Group(node, layer, frozenset(replaced))


def _signed_group(node: fx.Node, uses: Uses) -> Group | None:
    found = _signed_part(node, uses)
    if found is None or not uses.readable(found[0].x, node, found[1]):
        return None
    return Group(node, found[0], frozenset(found[1]))


def _signed_part(node: fx.Node, uses: Uses) -> tuple[SignedPart, set[fx.Node]] | None:
    if node.target is not aten.add.Tensor or argument(node, 2, "alpha", 1) != 1:
        return None
    terms = [t for t in node.args[:2] if is_tensor(t) and t.target is aten.convolution.default]
    if len(terms) != 2 or terms[0] is terms[1] or any(uses.only_user(t) is not node for t in terms):
        return None
    first, second = terms
    positive, negative = first.args[0], second.args[0]
    clamped = positive.target is aten.clamp_min.default and negative.target is aten.clamp_max.default
    if not clamped or positive.args != (positive.args[0], 0) or negative.args != (positive.args[0], 0):
        return None
    if second.args[2] is not None or first.args[3:] != second.args[3:]:
        return None
    replaced = {first, second}
    replaced |= {c for c, user in ((positive, first), (negative, second)) if uses.only_user(c) is user}
    return SignedPart(positive.args[0], first, second.args[1]), replaced


def _either(node: fx.Node, uses: Uses) -> Either | None:
    if node.target is not aten.where.self:
        return None
    condition, upper, lower = node.args
    by_sign = condition.target is aten.ge.Scalar and condition.args[1] == 0 and uses.only_user(condition) is node
    both = all(t.target is ops.conv_dgrad.default and uses.only_user(t) is node for t in (upper, lower))
    if not by_sign or not both or upper.args[0] is not lower.args[0] or upper.args[2:] != lower.args[2:]:
        return None
    x, s = condition.args[0], upper.args[0]
    replaced = {condition, upper, lower}
    if not same_sizes(value(x).shape, value(node).shape):
        return None
    if not all(uses.readable(read, node, replaced) for read in (x, s)):
        return None
    return Either(node, x, upper, lower, frozenset(replaced))
