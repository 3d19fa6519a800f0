"""One call of an executor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import fx


@dataclasses.dataclass
class Step:
    """One call: `node` is its result; `args` hold nodes, tensors and plain values.

    `also` are the nodes of further results; `computes`, where a step does more than its node, the layers within it; `note` says how.
    """

    node: fx.Node
    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""
    also: tuple[fx.Node, ...] = ()
    computes: tuple[fx.Node, ...] = ()
