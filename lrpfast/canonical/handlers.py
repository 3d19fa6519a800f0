"""Where a canonical form is registered, and what the forms of several subjects share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lrpfast.graph import Builder

Handler = Callable[[Builder, fx.Node, tuple, dict], Any]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register what emits the canonical form of the ATen operations of these names; its arguments are canonical already."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Parts(list):
    """The results of an operation that returns several tensors, by number."""


def fill(args: tuple, kwargs: dict, defaults: list, names: list[str]) -> list:
    """All arguments of a call in the order of `names`."""
    filled = list(args) + defaults[len(args) :]
    for key, given in kwargs.items():
        filled[names.index(key)] = given
    return filled


def is_constant(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def given_constant(builder: Builder, node: fx.Node) -> torch.Tensor | None:
    """A constant as the model has it, in its own dtype; None where it is derived in another way than by a cast."""
    filters = builder.constants.filters(node.target)
    return None if filters is None or filters.factors is not None else filters.weight


def uncast(builder: Builder, node: fx.Node) -> torch.Tensor:
    """A constant in the dtype that the model has it in, where that is known."""
    given = given_constant(builder, node)
    return builder.tensor(node) if given is None else given
