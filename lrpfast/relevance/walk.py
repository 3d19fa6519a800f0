"""Messages, and the state of the backward walk.

A message at a value ``v`` is a product that is not yet carried out, ``R_v = carrier * (tensor + ...)``. With no carrier it is
the relevance itself (RULES §4's relevance form); with ``carrier is v`` it is the ratio form. Any other carrier is as good:
behind ``y = relu(z)`` the message keeps ``y`` as its carrier, which is how the gate comes for free, and any operation whose
rule is Pass hands its message on as it is. A layer's ratio ``s = carrier * tensor / S(denominator)`` is one fused step whatever
the carrier. Only where messages with different carriers meet are the products carried out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lrpfast.assign import Assignment
from lrpfast.errors import UnsupportedOperationError
from lrpfast.facts import Facts
from lrpfast.graph import Builder, describe, is_size, operation_name, rank, same_shape, value
from lrpfast.rules import Rule

aten = torch.ops.aten
ops = torch.ops.lrpfast


@dataclasses.dataclass(frozen=True)
class Message:
    """``R = carrier * sum(parts)``; without a carrier ``R = sum(parts)``."""

    parts: tuple[fx.Node, ...]
    carrier: fx.Node | None = None
    seed: OneHot | None = None


@dataclasses.dataclass(frozen=True)
class OneHot:
    """A message that is still one relevance a sample, at the output that `target` names (RULES §5, the logit layer)."""

    target: fx.Node


Propagator = Callable[["Walk", fx.Node, Message, Rule | None], None]
_PROPAGATORS: dict[str, Propagator] = {}


def propagates(*names: str) -> Callable[[Propagator], Propagator]:
    """Register the propagator of the operations with these names."""

    def register(function: Propagator) -> Propagator:
        _PROPAGATORS.update(dict.fromkeys(names, function))
        return function

    return register


def propagator(node: fx.Node) -> Propagator:
    """The propagator of a node's operation.

    Raises
    ------
    UnsupportedOperationError
        There is none.
    """
    found = _PROPAGATORS.get(operation_name(node))
    if found is None:
        raise UnsupportedOperationError(
            f"relevance reaches {describe(node)}, for which there is no rule. Give the operation a propagator with "
            f"lrpfast.relevance.walk.propagates({operation_name(node)!r}), or explain the part of the model above it"
            f"{_HINTS.get(operation_name(node), '')}"
        )
    return found


_HINTS = {
    name: ". If this is the model's last step, wrap the model so that it returns the logits"
    for name in ("log_softmax", "_log_softmax", "argmax", "topk", "sort")
}


class Walk:
    """The state of a backward walk: the program that is being built, and the messages under way.

    Attributes
    ----------
    build
        Appends to the joint program.
    facts, reached
        What is proved of the forward values; those that depend on the input.
    notes
        What each operation's propagator chose to do, for the plan.
    """

    def __init__(
        self,
        build: Builder,
        facts: Facts,
        reached: frozenset[fx.Node],
        rules: dict[fx.Node, Assignment],
        output: fx.Node,
    ) -> None:
        self.build = build
        self.facts = facts
        self.reached = reached
        self.rules = rules
        self.output = output
        self.notes: dict[fx.Node, str] = {}
        self._messages: dict[fx.Node, list[Message]] = {}

    # --- messages ---

    def send(self, node: Any, message: Message) -> None:
        """Send a message to a forward value; a value that no input reaches takes none."""
        if isinstance(node, fx.Node) and node in self.reached:
            self._messages.setdefault(node, []).append(message)

    def collect(self, node: fx.Node) -> Message | None:
        """The sum of all messages at a value: one message, or None where no relevance arrived."""
        messages = self._messages.pop(node, [])
        if not messages:
            return None
        carriers = {m.carrier for m in messages}
        if len(carriers) == 1 and all(m.seed is None for m in messages):
            return Message(tuple(p for m in messages for p in m.parts), messages[0].carrier)
        if len(messages) == 1:
            return messages[0]
        return Message(tuple(self.relevance(m) for m in messages))

    def single(self, message: Message) -> fx.Node:
        """The sum of a message's parts, without its carrier."""
        total = message.parts[0]
        for part in message.parts[1:]:
            total = self.call(aten.add.Tensor, total, part)
        return total

    def relevance(self, message: Message) -> fx.Node:
        """Carry the product out: the relevance itself."""
        total = self.single(message)
        return total if message.carrier is None else self.call(aten.mul.Tensor, message.carrier, total)

    # --- steps ---

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.build.call(target, *args, **kwargs)

    def ratio(self, message: Message, denominator: fx.Node, eps: float) -> fx.Node:
        """``s = R / S(denominator)``, one fused step; with `eps` 0 it is 0 where the denominator is 0."""
        if len(message.parts) >= 2:
            head = self.single(Message(message.parts[:-1]))
            return self.call(ops.ratio_sum.default, message.carrier, head, message.parts[-1], denominator, eps)
        return self.call(ops.ratio.default, message.carrier, message.parts[0], denominator, eps)

    def output_ratio(self, message: Message, node: fx.Node, eps: float) -> fx.Node:
        """``R / S(y)`` for the operation's own output ``y``.

        Behind a ReLU the denominator may be the ReLU's output: the two are equal where any relevance is, and ``y`` itself need
        not be kept.
        """
        return self.ratio(message, message.carrier if is_relu_of(message.carrier, node) else node, eps)

    def constant(self, tensor: torch.Tensor, hint: str) -> fx.Node:
        return self.build.constant(tensor, hint)

    def sum_to(self, tensor: fx.Node, like: fx.Node) -> fx.Node:
        """Undo a broadcast: sum over the dimensions that `like` lacks or has with size 1."""
        if same_shape(tensor, like):
            return tensor
        lead = rank(tensor) - rank(like)
        dims = [
            d
            for d in range(rank(like))
            if is_size(value(like).shape[d], 1) and not is_size(value(tensor).shape[d + lead], 1)
        ]
        if lead:
            tensor = self.call(aten.sum.dim_IntList, tensor, list(range(lead)), False)
        return self.call(aten.sum.dim_IntList, tensor, dims, True) if dims else tensor

    def rule_path(self, node: fx.Node) -> str:
        return node.meta.get("path", "") or operation_name(node)


def is_relu_of(carrier: fx.Node | None, node: fx.Node) -> bool:
    return carrier is not None and operation_name(carrier) == "relu" and carrier.args[0] is node


def expand_like(walk: Walk, tensor: fx.Node, node: fx.Node) -> fx.Node:
    """Broadcast a tensor to the shape of another."""
    return walk.call(aten.expand.default, tensor, walk.build.shape(node))


def filled(like: torch.Tensor, shape: list[int], fill: float) -> torch.Tensor:
    return torch.full(shape, fill, dtype=like.dtype, device=like.device)
