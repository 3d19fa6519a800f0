"""Do the samples of a batch meet in a model? Such a batch is explained as a whole, and may not be padded.

Followed is where the batch lies in each value: in which dimension, and behind how many others where a reshape joined some with it
(sequence-first attention joins and parts them). Every operation must leave samples beside one another; one that is not known to do so
for any dimension must have the batch in front, where layers have it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from lrpfast.facts import depends_on_input
from lrpfast.graph import argument, operation_name, rank
from lrpfast.relevance import Joint

# Operations along dimensions that are given: over that of the batch they mix the samples. The position of the argument.
_ALONG = {
    "softmax": 1, "_softmax": 1, "log_softmax": 1, "_log_softmax": 1, "cumsum": 1, "cumprod": 1, "flip": 1, "roll": 2, "sort": 1,
    "argsort": 1, "topk": 2, "gather": 1, "scatter": 1, "index_select": 1, "cat": 1, "stack": 1, "logsumexp": 1, "unbind": 1,
}  # fmt: skip
# Operations whose operand's and result's elements are the same in the same order.
_RESHAPES = {"reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"}
# Operations that move whole dimensions.
_MOVES = {"permute", "transpose", "t", "movedim", "expand", "getitem", "alias", "detach", "clone", "contiguous"}
# Operations on the last dimensions alone, of sizes that are given: the batch is not among them.
_LAST = {"linear", "layer_norm", "rms_norm", "native_layer_norm"}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a value has the batch: in dimension `dim`, of `times` times its size, behind `before` others of that dimension."""

    dim: int
    times: int
    before: int


def samples_meet(joint: Joint) -> bool:
    """Whether a sample's output may depend on others of its batch."""
    places: dict[fx.Node, _Place] = {}
    reached = depends_on_input(joint.program)
    for node in joint.program.graph.nodes:
        if node not in reached or (node.op != "placeholder" and node not in joint.forward) or node.op == "output":
            continue
        place = _place(node, places)
        if place is None:
            return True
        places[node] = place
    return False


def _place(node: fx.Node, places: dict[fx.Node, _Place]) -> _Place | None:
    """Where a value has the batch; None where its samples met, or may have."""
    found = _by_shape(node)
    operands = [n for n in node.all_input_nodes if n in places]
    if found is None or not operands:
        return found if node.op == "placeholder" else None
    first = places[operands[0]]
    name = operation_name(node)
    if name in _RESHAPES:
        before, rest = divmod(_in_front(operands[0], first), math.prod(_sizes(node)[: found.dim]))
        return None if rest or found.times % before else dataclasses.replace(found, before=before)
    found = dataclasses.replace(found, before=first.before)
    if any(places[n].times != found.times or places[n].before != found.before for n in operands):
        return None
    if name in _ALONG:
        return None if found.dim in _along(node, _ALONG[name]) else found
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    if pointwise or name == "where":
        from_the_end = {places[n].dim - rank(n) for n in operands}
        return found if from_the_end == {found.dim - rank(node)} else None
    if name in _MOVES or name in _LAST or (name == "matmul" and operands == [node.args[0]]):
        return found
    in_front = all(places[n].dim == 0 for n in operands) and found.dim == 0
    return None if not in_front or (name == "index" and node.args[1][0] is not None) else found


def _by_shape(node: fx.Node) -> _Place | None:
    """The one dimension whose size is a multiple of the batch's; None where there is none, or several."""
    sizes = _sizes(node)
    free = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if len(free) != 1:
        return None
    expression = sizes[free[0]].node.expr
    symbols = expression.free_symbols
    times = expression.subs(dict.fromkeys(symbols, 1))
    linear = len(symbols) == 1 and expression == times * next(iter(symbols))
    return _Place(free[0], int(times), 1) if linear and times >= 1 else None


def _sizes(node: fx.Node) -> list[Any]:
    """Of a value, or of the first of several."""
    results = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
    first = next((r for r in results if isinstance(r, torch.Tensor)), None)
    return [] if first is None else list(first.shape)


def _in_front(node: fx.Node, place: _Place) -> int:
    return place.before * math.prod(_sizes(node)[: place.dim])


def _along(node: fx.Node, position: int) -> set[int]:
    """The dimensions that an operation works along; all, where none is given."""
    given = argument(
        node, position, "dim", argument(node, position, "dims", 0 if operation_name(node) == "cat" else None)
    )
    dims = given if isinstance(given, (list, tuple)) else [given]
    size = len(_sizes(node))
    return {d % size for d in dims if isinstance(d, int)} or set(range(size))
